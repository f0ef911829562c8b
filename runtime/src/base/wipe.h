// Overwrites memory that held learned state.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace titans::core {

// Zeroes memory in a way that the compiler cannot remove.
inline void wipe(void* data, std::size_t bytes) noexcept {
  if (bytes == 0) return;
  std::memset(data, 0, bytes);
  __asm__ __volatile__("" : : "r"(data) : "memory");
}

// Wipes memory when it is freed, so no learned state stays in free pages. Growth is not zero-filled, because the
// content is always overwritten.
template <typename T>
struct WipingAllocator {
  using value_type = T;
  WipingAllocator() = default;
  template <typename U>
  WipingAllocator(const WipingAllocator<U>& /*other*/) noexcept {}  // NOLINT: allocators convert implicitly

  T* allocate(std::size_t count) { return std::allocator<T>().allocate(count); }
  void deallocate(T* data, std::size_t count) noexcept {
    wipe(data, count * sizeof(T));
    std::allocator<T>().deallocate(data, count);
  }
  template <typename U>
  void construct(U* place) noexcept {
    ::new (static_cast<void*>(place)) U;
  }
  template <typename U, typename... Arguments>
  void construct(U* place, Arguments&&... arguments) {
    ::new (static_cast<void*>(place)) U(std::forward<Arguments>(arguments)...);
  }

  friend bool operator==(const WipingAllocator& /*a*/, const WipingAllocator& /*b*/) noexcept { return true; }
  friend bool operator!=(const WipingAllocator& /*a*/, const WipingAllocator& /*b*/) noexcept { return false; }
};

using Bytes = std::vector<std::byte, WipingAllocator<std::byte>>;
using Floats = std::vector<float, WipingAllocator<float>>;

}  // namespace titans::core
