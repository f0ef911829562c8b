// CachedAttention, CausalConvolution and HyperConnection for ONNX Runtime's CUDA provider. Calls are enqueued in the
// provider's stream.
#include <memory>
#include <string>

#include "plugins/kernels/cached_attention_cuda.h"
#include "plugins/kernels/causal_convolution_cuda.h"
#include "plugins/kernels/hyper_connection_cuda.h"
#include "plugins/kernels/node_contracts.h"
#include "plugins/onnxruntime/cuda_device.h"
#include "plugins/onnxruntime/memory_op.h"
#include "plugins/onnxruntime/node_op.h"

namespace titans::plugins {
namespace {

template <class Contract>
class CudaNodeKernel {
 public:
  static constexpr const char* kProvider = "CUDAExecutionProvider";

  CudaNodeKernel(const OrtApi& api, const OrtKernelInfo& info) : api_(api), ordinal_(ordinal_of(api, info)) {
    const DeviceScope scope(ordinal_);
    kernels::CudaDevice device;
    std::string error = kernels::CudaDevice::current(device);
    if (error.empty()) {
      kernel_ = make_cuda_kernel(read_configuration<typename Contract::Configuration>(api, info), device, error);
    }
    check(api, error);
  }

  void run(OrtKernelContext& context, const typename Contract::Operands& operands) {
    const DeviceScope scope(ordinal_);
    // The device reports invalid values when its work is done. This throws the errors of the thread's earlier calls.
    check(api_, take_cuda_error());
    void* stream = nullptr;
    check(api_.KernelContext_GetGPUComputeStream(&context, &stream));
    check(api_, kernel_->run(operands, thread_status(), static_cast<CUstream_st*>(stream)));
  }

 private:
  const OrtApi& api_;
  int ordinal_;
  std::unique_ptr<kernels::CudaNodeKernel<typename Contract::Operands>> kernel_;
};

}  // namespace

std::vector<const OrtCustomOp*> cuda_node_ops() {
  static const NodeOp<kernels::AttentionContract, CudaNodeKernel<kernels::AttentionContract>> attention;
  static const NodeOp<kernels::ConvolutionContract, CudaNodeKernel<kernels::ConvolutionContract>> convolution;
  static const NodeOp<kernels::ConnectionContract, CudaNodeKernel<kernels::ConnectionContract>> connection;
  return {&attention, &convolution, &connection};
}

}  // namespace titans::plugins
