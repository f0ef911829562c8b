// Our kernel for NeuralMemory nodes: a custom operator library beside this backend.
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
  // Loads the library unless `choice` is off. Throws if it is required but missing, or if it is installed but unusable
  // on that CUDA device (-1: the CPU). Otherwise a slow run would give no reason.
  MemoryKernel(KernelChoice choice, int cuda_ordinal);

  static constexpr std::string_view kNone = "standard-operators";

  bool used() const { return !library_.empty(); }
  // "cpu-avx512", "cuda-sm90", or "standard-operators" without the kernel.
  const std::string& name() const { return name_; }
  // Makes sessions with these options run NeuralMemory nodes on the kernel, if it is used.
  void register_in(OrtSessionOptions& options, const OrtLibrary& library) const;

  // Runs `open`, which opens a session on `graph`. Throws unless all its NeuralMemory nodes are on the GPU. For a node
  // on the CPU, ONNX Runtime would silently copy the whole state to the host and back in each call.
  void open_on_gpu(const GraphNodes& graph, std::string_view file_name, const std::function<void()>& open) const;
  // The error that the GPU reported for finished calls of this thread, or an empty string.
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
