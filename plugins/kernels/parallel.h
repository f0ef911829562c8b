// The caller's threads, as kernels use them.
#pragma once

#include <cstddef>

namespace titans::kernels {

// The caller's thread pool. Runs body(context, index) for each index below `count` on any number of threads, and
// returns after the last.
struct Parallel {
  void (*run)(void* pool, std::size_t count, void (*body)(void* context, std::size_t index), void* context);
  void* pool;
};

}  // namespace titans::kernels
