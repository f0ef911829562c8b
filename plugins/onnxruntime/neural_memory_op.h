// ai.titans::NeuralMemory as ONNX Runtime asks about custom operators: its inputs and outputs, the same on every
// device.
#pragma once

#include <onnxruntime_c_api.h>

#include <atomic>
#include <cstddef>
#include <string>
#include <vector>

#include "plugins/kernels/neural_memory.h"
#include "plugins/onnxruntime/ort_node.h"

namespace titans::plugins {

inline constexpr const char* kDomain = "ai.titans";

// One of several definitions of the operator: ONNX Runtime chooses by its execution provider and its types.
class NeuralMemoryOp : public OrtCustomOp {
 protected:
  NeuralMemoryOp(const char* provider, ONNXTensorElementDataType values);
  ~NeuralMemoryOp() = default;

  // CreateKernelV2, KernelComputeV2 and KernelDestroy by a class with a constructor of API, information and type of
  // values, and with compute(context).
  template <typename Node>
  void compute_with() {
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
      return guarded(*api, [&] {
        *kernel = new Node(*api, *info, static_cast<const NeuralMemoryOp*>(op)->values());
        Node::made.fetch_add(1, std::memory_order_relaxed);
      });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return static_cast<Node*>(kernel)->compute(*context);
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
  }

 private:
  kernels::DType values() const;

  const char* provider_;
  ONNXTensorElementDataType values_;  // of q, k, v and y
};

// The definitions, which live as long as the process, and how many nodes the process has made of them.
std::vector<const OrtCustomOp*> cpu_ops();
std::size_t cpu_nodes_made();

#ifdef TITANS_WITH_CUDA
std::vector<const OrtCustomOp*> cuda_ops();
std::size_t cuda_nodes_made();
// What nodes on that device run on, "cuda-sm90", or an empty text with what is wrong in `error`.
std::string cuda_target(int ordinal, std::string& error);
// What the device found wrong in the calls of this thread since this was last asked. Their work has to be done by now.
std::string take_cuda_error();
#endif

}  // namespace titans::plugins
