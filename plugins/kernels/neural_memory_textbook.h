// NeuralMemory in its plainest form: one head at a time, float32, no vectors, no threads, no reuse of scratch. Read
// this kernel first. The fast kernels compute the same function and are tested against it.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "plugins/kernels/cpu_kernel.h"

namespace titans::kernels {

inline constexpr std::string_view kTextbookTarget = "textbook";

// Returns null and sets `error` if the memory dtype is not "float32".
std::unique_ptr<CpuKernel> make_textbook_kernel(const Configuration& configuration, std::string& error);

}  // namespace titans::kernels
