// A configuration entry by which the titans runtime describes the session to the custom operators.
#pragma once

namespace titans::plugins {

// Set, to any value, if the session runs on CUDA. An operator with a CPU kernel only then runs as its function body on
// the GPU. With the CPU kernel, ONNX Runtime would copy all its tensors to the CPU and back.
inline constexpr const char* kCudaEntry = "titans.cuda";

}  // namespace titans::plugins
