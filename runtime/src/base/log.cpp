#include "base/log.h"

#include <atomic>
#include <mutex>
#include <new>
#include <string>

#include "base/error.h"

namespace titans::core {
namespace {

std::atomic<std::int32_t> wanted{0};
std::mutex mutex;  // guards the variables below; held while the function runs, so a replaced function is not running
titans_log_function function_now = nullptr;
void* user_now = nullptr;
thread_local bool telling = false;

}  // namespace

void set_log(titans_log_function function, void* user, std::int32_t level) {
  if (level < TITANS_LOG_ERROR || level > TITANS_LOG_DEBUG) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0501", "log", text("unknown log level: ", level), "pass a titans_log_level");
  }
  if (telling) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0501", "log", "titans_set_log called from the log function",
                "call it outside the log function");
  }
  const std::lock_guard lock(mutex);
  function_now = function;
  user_now = user;
  wanted.store(function == nullptr ? 0 : level, std::memory_order_relaxed);
}

bool log_wanted(std::int32_t level) noexcept { return level <= wanted.load(std::memory_order_relaxed) && !telling; }

void log(std::int32_t level, std::string_view where, std::string_view message) noexcept {
  if (!log_wanted(level)) return;
  try {
    const std::string line = one_line(text('[', where, "] ", message));
    const std::lock_guard lock(mutex);
    if (function_now == nullptr) return;
    telling = true;
    function_now(user_now, level, line.c_str());
    telling = false;
  } catch (...) {  // out of memory, or an exception from a C++ function
    telling = false;
  }
}

void reset_log_after_fork() noexcept { new (&mutex) std::mutex; }

}  // namespace titans::core
