// ai.titans::NeuralMemory and ai.titans::ChunkNeuralMemory as custom operators of ONNX Runtime: their inputs and
// outputs, the same on every device.
#pragma once

#include <onnxruntime_c_api.h>

#include <atomic>
#include <cstddef>
#include <string>
#include <vector>

#include "plugins/onnxruntime/ort_node.h"

namespace titans::plugins {

inline constexpr const char* kDomain = "ai.titans";

// One of several definitions of an operator: ONNX Runtime chooses by execution provider and dtypes.
class MemoryOp : public OrtCustomOp {
 protected:
  // Name and operands are those of a Configuration or a ChunkConfiguration.
  template <class Configuration>
  MemoryOp(const Configuration& /*of*/, const char* provider, ONNXTensorElementDataType values)
      : MemoryOp(Configuration::kOperator, Configuration::kInputCount, Configuration::kOutputCount, provider, values) {}
  ~MemoryOp() = default;

  // Sets CreateKernelV2, KernelComputeV2 and KernelDestroy from a class with a constructor of API, information and
  // dtype of values, and with compute(context).
  template <typename NodeKernel>
  void compute_with() {
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
      return guarded(*api, [&] {
        *kernel = new NodeKernel(*api, *info, static_cast<const MemoryOp*>(op)->values());
        NodeKernel::made.fetch_add(1, std::memory_order_relaxed);
      });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return static_cast<NodeKernel*>(kernel)->compute(*context);
    };
    KernelDestroy = [](void* kernel) { delete static_cast<NodeKernel*>(kernel); };
  }

 private:
  MemoryOp(const char* name, std::size_t inputs, std::size_t outputs, const char* provider,
           ONNXTensorElementDataType values);
  kernels::DType values() const;

  const char *name_, *provider_;
  std::size_t inputs_, outputs_;
  ONNXTensorElementDataType values_;  // of q, k, v and y
};

// The definitions, which live as long as the process, and how many kernels the process has made of them.
std::vector<const OrtCustomOp*> cpu_ops();
std::size_t cpu_kernels_made();

#ifdef TITANS_WITH_CUDA
std::vector<const OrtCustomOp*> cuda_ops();
std::size_t cuda_kernels_made();
// The target of kernels on that device, such as "cuda-sm90", or an empty text and an error.
std::string cuda_target(int ordinal, std::string& error);
// The error that the device found in calls of this thread since the last call of this function, or an empty text. The
// device must have finished those calls.
std::string take_cuda_error();
#endif

}  // namespace titans::plugins
