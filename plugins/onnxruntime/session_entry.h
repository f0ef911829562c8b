// What the titans runtime tells the library of custom operators about a session, as an entry of its configuration.
#pragma once

namespace titans::plugins {

// There, with any value: the session runs on CUDA. An operator that has a kernel for the CPU alone then runs as its
// function body, on the GPU, where ONNX Runtime would copy all of its tensors to the CPU and back.
inline constexpr const char* kCudaEntry = "titans.cuda";

}  // namespace titans::plugins
