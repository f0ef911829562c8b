// The memory operators for ONNX Runtime's CPU provider.
#include "plugins/kernels/cpu_kernel.h"
#include "plugins/onnxruntime/memory_op.h"

namespace titans::plugins {
namespace {

using namespace titans::kernels;

std::atomic<std::size_t> kernels_made{0};

// The kernel of one node of a session.
template <class Configuration>
class CpuNodeKernel {
 public:
  CpuNodeKernel(const OrtApi& api, const OrtKernelInfo& info, DType values)
      : api_(api), configuration_(read_configuration<Configuration>(api, info)), values_(values) {
    std::string error;
    kernel_ = CpuKernel::create(configuration_, {}, error);
    check(api, error);
  }

  OrtStatus* compute(OrtKernelContext& context) noexcept {
    return guarded(api_, [&] {
      const Operands operands = read_operands(api_, context, configuration_, values_);
      SessionThreads threads{api_, context};
      check(api_, kernel_->run(operands, threads.parallel()));
    });
  }

  static std::atomic<std::size_t>& made;

 private:
  const OrtApi& api_;
  Configuration configuration_;
  DType values_;
  std::unique_ptr<CpuKernel> kernel_;
};

template <class Configuration>
std::atomic<std::size_t>& CpuNodeKernel<Configuration>::made = kernels_made;

template <class Configuration>
class CpuOp final : public MemoryOp {
 public:
  CpuOp() : MemoryOp(Configuration(), "CPUExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    compute_with<CpuNodeKernel<Configuration>>();
  }
};

}  // namespace

std::vector<const OrtCustomOp*> cpu_ops() {
  static const CpuOp<Configuration> token;
  static const CpuOp<ChunkConfiguration> chunk;
  return {&token, &chunk};
}

std::size_t cpu_kernels_made() { return kernels_made.load(); }

}  // namespace titans::plugins
