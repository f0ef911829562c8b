// fork(): the child has one thread, and locks of the other threads stay locked in it. So the child may not use sessions
// of its parent. It may exit, exec, or open sessions of its own.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>

namespace titans::core {

// The number of forks between the process that loaded this library and the present one.
std::uint32_t fork_count() noexcept;

// Throws an Error unless `made_by`, the fork_count() of an object's process, is that of the present one.
void require_own_process(std::uint32_t made_by, std::string_view where);

// A part of the program that may hold locks of other libraries, such as opening a session. A child that was forked
// meanwhile cannot enter one. The constructor throws an Error then, unless `leaving`.
class ForkSensitive {
 public:
  explicit ForkSensitive(bool leaving = false);
  ~ForkSensitive();
  ForkSensitive(const ForkSensitive&) = delete;
  ForkSensitive& operator=(const ForkSensitive&) = delete;
};

// Opens a descriptor whose file lock no child inherits: a child closes it as soon as it is forked. Otherwise the lock
// would outlive a killed parent. Returns what `open` returns.
int open_unshared(const std::function<int()>& open);
// Closes it. Returns what close() returns, and leaves errno.
int close_unshared(int descriptor) noexcept;

}  // namespace titans::core
