// Overwriting memory that held what somebody's stream has learned.
#pragma once

#include <cstddef>
#include <cstring>

namespace titans::core {

// Zeros that no compiler leaves out, although nobody reads them.
inline void wipe(void* data, std::size_t bytes) noexcept {
  if (bytes == 0) return;
  std::memset(data, 0, bytes);
  __asm__ __volatile__("" : : "r"(data) : "memory");
}

}  // namespace titans::core
