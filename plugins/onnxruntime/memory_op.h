// ai.titans::NeuralMemory and ai.titans::ChunkNeuralMemory as custom operators of ONNX Runtime. Inputs and outputs are
// the same on every device.
#pragma once

#include <onnxruntime_c_api.h>

#include <atomic>
#include <cstddef>
#include <string>
#include <vector>

#include "plugins/onnxruntime/ort_node.h"

namespace titans::plugins {

inline constexpr const char* kDomain = "ai.titans";

// One definition of an operator. ONNX Runtime chooses among several by execution provider and dtypes.
class MemoryOp : public OrtCustomOp {
 protected:
  // Takes the operator's name and operands from a Configuration or a ChunkConfiguration.
  template <class Configuration>
  MemoryOp(const Configuration& /*of*/, const char* provider, ONNXTensorElementDataType values)
      : MemoryOp(Configuration::kOperator, Configuration::kInputCount, Configuration::kOutputCount, provider, values) {}
  ~MemoryOp() = default;

  // Sets CreateKernelV2, KernelComputeV2 and KernelDestroy. NodeKernel is constructed from the API, the kernel's
  // information and the dtype of values, and has compute(context).
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

// The definitions, which live as long as the process, and the number of kernels made from them.
std::vector<const OrtCustomOp*> cpu_ops();
std::size_t cpu_kernels_made();

#ifdef TITANS_WITH_CUDA
std::vector<const OrtCustomOp*> cuda_ops();
std::size_t cuda_kernels_made();
// The target of kernels on the device, such as "cuda-sm90". On failure, empty with `error` set.
std::string cuda_target(int ordinal, std::string& error);
// The error that the device has reported for this thread since the last call, or an empty string. The device must have
// finished the thread's work.
std::string take_cuda_error();
#endif

}  // namespace titans::plugins
