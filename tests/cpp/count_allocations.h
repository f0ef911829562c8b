// Counts the program's allocations. Aligned memory is filled with NaN.
#pragma once

#include <atomic>
#include <cstddef>

extern std::atomic<std::size_t> allocations;
