// CachedAttention, CausalConvolution and HyperConnection for ONNX Runtime's CPU provider.
#include <memory>
#include <string>

#include "plugins/kernels/cached_attention_cpu.h"
#include "plugins/kernels/causal_convolution_cpu.h"
#include "plugins/kernels/hyper_connection_cpu.h"
#include "plugins/kernels/node_contracts.h"
#include "plugins/onnxruntime/node_op.h"

namespace titans::plugins {
namespace {

template <class Contract, class Kernel>
class CpuNodeKernel {
 public:
  static constexpr const char* kProvider = "CPUExecutionProvider";

  CpuNodeKernel(const OrtApi& api, const OrtKernelInfo& info) : api_(api) {
    std::string error;
    kernel_ = Kernel::create(read_configuration<typename Contract::Configuration>(api, info), {}, error);
    check(api, error);
  }

  void run(OrtKernelContext& context, const typename Contract::Operands& operands) {
    SessionThreads threads{api_, context};
    check(api_, kernel_->run(operands, threads.parallel()));
  }

 private:
  const OrtApi& api_;
  std::unique_ptr<Kernel> kernel_;
};

template <class Contract, class Kernel>
using CpuNodeOp = NodeOp<Contract, CpuNodeKernel<Contract, Kernel>>;

}  // namespace

std::vector<const OrtCustomOp*> cpu_node_ops() {
  static const CpuNodeOp<kernels::AttentionContract, kernels::cached_attention::CpuKernel> attention;
  static const CpuNodeOp<kernels::ConvolutionContract, kernels::causal_convolution::CpuKernel> convolution;
  static const CpuNodeOp<kernels::ConnectionContract, kernels::hyper_connection::CpuKernel> connection;
  return {&attention, &convolution, &connection};
}

}  // namespace titans::plugins
