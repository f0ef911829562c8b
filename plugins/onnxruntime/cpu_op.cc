// The operator for ONNX Runtime's CPU provider.
#include "plugins/kernels/neural_memory_cpu.h"
#include "plugins/onnxruntime/neural_memory_op.h"

namespace titans::plugins {
namespace {

using namespace titans::kernels;

// The session's own threads, as many as it has been given.
struct Threads {
  const OrtApi& api;
  OrtKernelContext& context;

  static void run(void* self, std::size_t count, void (*body)(void*, std::size_t), void* argument) {
    const Threads& threads = *static_cast<Threads*>(self);
    check(threads.api.KernelContext_ParallelFor(&threads.context, body, count, 0, argument));
  }
};

// One node of a session.
class CpuNode {
 public:
  CpuNode(const OrtApi& api, const OrtKernelInfo& info, DType values)
      : api_(api), configuration_(read_configuration(api, info)), values_(values) {
    std::string error;
    kernel_ = CpuKernel::create(configuration_, {}, error);
    check(api, error);
  }

  OrtStatus* compute(OrtKernelContext& context) noexcept {
    return guarded(api_, [&] {
      const Operands operands = read_operands(api_, context, configuration_, values_);
      Threads threads{api_, context};
      check(api_, kernel_->run(operands, {&Threads::run, &threads}));
    });
  }

  static std::atomic<std::size_t> made;

 private:
  const OrtApi& api_;
  Configuration configuration_;
  DType values_;
  std::unique_ptr<CpuKernel> kernel_;
};

std::atomic<std::size_t> CpuNode::made{0};

class CpuOp final : public NeuralMemoryOp {
 public:
  CpuOp() : NeuralMemoryOp("CPUExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) { compute_with<CpuNode>(); }
};

}  // namespace

std::vector<const OrtCustomOp*> cpu_ops() {
  static const CpuOp op;
  return {&op};
}

std::size_t cpu_nodes_made() { return CpuNode::made.load(); }

}  // namespace titans::plugins
