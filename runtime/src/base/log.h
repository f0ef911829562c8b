// The application's log: rare events, never one per token.
#pragma once

#include <cstdint>
#include <string_view>

#include "titans/titans.h"

namespace titans::core {

void set_log(titans_log_function function, void* user, std::int32_t level);

// True if messages of that level are wanted; checked before one is composed.
bool log_wanted(std::int32_t level) noexcept;

// Sends "[where] message" on one line to the application. Never throws: messages that cannot be sent are dropped, and
// so are messages caused by the application's own log function.
void log(std::int32_t level, std::string_view where, std::string_view message) noexcept;

// In the child of a fork: a thread of the parent may have held the log's lock.
void reset_log_after_fork() noexcept;

}  // namespace titans::core
