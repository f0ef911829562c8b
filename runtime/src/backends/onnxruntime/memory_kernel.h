// Our kernel for NeuralMemory nodes: a library of custom operators that ONNX Runtime loads, beside this backend's own.
#pragma once

#include <filesystem>
#include <string>

#include "backend.h"
#include "backends/onnxruntime/library.h"

namespace titans::core {

class MemoryKernel {
 public:
  // Loads the library unless `choice` is off. Throws where it is required and missing, and where it is there and of no
  // use: a slow run would not tell why.
  explicit MemoryKernel(KernelChoice choice);

  bool used() const { return !library_.empty(); }
  // "cpu-avx512", or "standard-operators" where the kernel is not used.
  const std::string& name() const { return name_; }
  // From here on NeuralMemory nodes of a session with these options run on the kernel, if it is used.
  void register_in(OrtSessionOptions& options, const OrtLibrary& library) const;

 private:
  std::filesystem::path library_;  // empty: not used
  std::string name_ = "standard-operators";
};

}  // namespace titans::core
