// Our kernel for NeuralMemory nodes: a library of custom operators that ONNX Runtime loads, beside this backend's own.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <string_view>

#include "backends/backend.h"
#include "backends/onnxruntime/graph_nodes.h"
#include "backends/onnxruntime/library.h"

namespace titans::core {

class MemoryKernel {
 public:
  // Loads the library unless `choice` is off. Throws where it is required and missing, and where it is there and of no
  // use on the CUDA device of that number (-1: on the CPU): a slow run would not tell why.
  MemoryKernel(KernelChoice choice, int cuda_ordinal);

  static constexpr std::string_view kNone = "standard-operators";

  bool used() const { return !library_.empty(); }
  // "cpu-avx512", "cuda-sm90", or "standard-operators" where the kernel is not used.
  const std::string& name() const { return name_; }
  // From here on NeuralMemory nodes of a session with these options run on the kernel, if it is used.
  void register_in(OrtSessionOptions& options, const OrtLibrary& library) const;

  // Runs `open`, which opens a session on `graph`. Throws unless every NeuralMemory node of it is on the GPU: for one
  // on the CPU, ONNX Runtime would copy the whole state there and back in each call, without a word.
  void open_on_gpu(const GraphNodes& graph, std::string_view file_name, const std::function<void()>& open) const;
  // What the GPU found wrong in the calls of this thread, whose work is done, or an empty string.
  std::string take_gpu_error() const;

 private:
  void load_gpu(int ordinal);

  std::filesystem::path library_;  // empty: not used
  void* handle_ = nullptr;
  std::string name_{kNone};
  void (*count_made_)(std::size_t* cpu, std::size_t* cuda) = nullptr;
  int (*gpu_error_)(char* text, std::size_t size) = nullptr;  // null on the CPU
};

}  // namespace titans::core
