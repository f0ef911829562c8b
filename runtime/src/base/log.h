// What the library tells an application's log: rare events, never one for each token.
#pragma once

#include <cstdint>
#include <string_view>

#include "titans/titans.h"

namespace titans::core {

void set_log(titans_log_function function, void* user, std::int32_t level);

// Whether somebody wants messages of that level: asked before one is composed.
bool log_wanted(std::int32_t level) noexcept;

// "[where] message" on one line, to the application. Throws nothing: what cannot be told is dropped, as is what an
// application's function causes itself.
void log(std::int32_t level, std::string_view where, std::string_view message) noexcept;

}  // namespace titans::core
