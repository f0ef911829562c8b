// ai.titans::NeuralMemory as a custom operator of ONNX Runtime on the CPU: reads attributes and tensors, calls the
// kernel.
#pragma once

#include <onnxruntime_c_api.h>

namespace titans::plugins {

inline constexpr const char* kDomain = "ai.titans";

// Lives as long as the process.
const OrtCustomOp& neural_memory_op();

}  // namespace titans::plugins
