// ai.titans::HyperConnection as a custom operator of ONNX Runtime.
#pragma once

#include <onnxruntime_c_api.h>

namespace titans::plugins {

// The definition, for the CPU provider only. It lives as long as the process.
const OrtCustomOp* hyper_connection_op();

}  // namespace titans::plugins
