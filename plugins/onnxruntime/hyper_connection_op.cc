// ai.titans::HyperConnection for ONNX Runtime's CPU provider.
#include "plugins/onnxruntime/hyper_connection_op.h"

#include <string>

#include "plugins/kernels/hyper_connection_cpu.h"
#include "plugins/onnxruntime/ort_node.h"

namespace titans::plugins {
namespace {

using namespace titans::kernels::hyper_connection;
using kernels::DType;
using kernels::Tensor;

constexpr int kVersion = 1;  // of the operator's domain

Tensor view(const OrtApi& api, OrtValue& value) {
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(api.GetTensorTypeAndShape(&value, &raw));
  const Handle<OrtTensorTypeAndShapeInfo> info(raw, api.ReleaseTensorTypeAndShapeInfo);
  Tensor tensor;
  std::size_t rank = 0;
  check(api.GetDimensionsCount(raw, &rank));
  tensor.rank = static_cast<int>(rank);
  if (rank <= tensor.shape.size()) check(api.GetDimensions(raw, tensor.shape.data(), rank));
  check(api.GetTensorMutableData(&value, &tensor.data));
  return tensor;
}

// The kernel of one node of a session.
class NodeKernel {
 public:
  NodeKernel(const OrtApi& api, const OrtKernelInfo& info) : api_(api) {
    std::string error;
    kernel_ = CpuKernel::create(read_configuration<Configuration>(api, info), {}, error);
    check(api, error);
  }

  OrtStatus* compute(OrtKernelContext& context) noexcept {
    return guarded(api_, [&] {
      Operands operands;
      std::size_t inputs = 0;
      check(api_.KernelContext_GetInputCount(&context, &inputs));
      for (std::size_t i = 0; i < inputs && i < kInputs; ++i) {
        const OrtValue* value = nullptr;
        check(api_.KernelContext_GetInput(&context, i, &value));
        if (value != nullptr) operands[i] = view(api_, const_cast<OrtValue&>(*value));
      }
      add_outputs(context, operands);
      Threads threads{api_, context};
      check(api_, kernel_->run(operands, {&Threads::run, &threads}));
    });
  }

 private:
  // The session's thread pool.
  struct Threads {
    const OrtApi& api;
    OrtKernelContext& context;

    static void run(void* self, std::size_t count, void (*body)(void*, std::size_t), void* argument) {
      const Threads& threads = *static_cast<Threads*>(self);
      check(threads.api.KernelContext_ParallelFor(&threads.context, body, count, 0, argument));
    }
  };

  // The node's outputs. Their shapes follow from the residuals; the kernel's check rejects wrong ones.
  void add_outputs(OrtKernelContext& context, Operands& operands) const {
    const Tensor& residuals = operands[kResiduals];
    if (residuals.rank != 4) return;
    const auto [batch, tokens, streams, width] = residuals.shape;
    operands[kInput] = output(context, kInput, 3, {batch, tokens, width, 0});
    operands[kResidualsOut] = output(context, kResidualsOut, 4, residuals.shape);
    std::size_t outputs = 0;
    check(api_.KernelContext_GetOutputCount(&context, &outputs));
    if (outputs > kBeta - kInputs) operands[kBeta] = output(context, kBeta, 3, {batch, tokens, streams, 0});
  }

  // Absent if the node has no such output.
  Tensor output(OrtKernelContext& context, Operand which, int rank, const std::array<std::int64_t, 4>& shape) const {
    OrtValue* value = nullptr;
    check(
        api_.KernelContext_GetOutput(&context, which - kInputs, shape.data(), static_cast<std::size_t>(rank), &value));
    Tensor tensor;
    if (value == nullptr) return tensor;
    tensor.rank = rank;
    tensor.shape = shape;
    check(api_.GetTensorMutableData(value, &tensor.data));
    return tensor;
  }

  const OrtApi& api_;
  std::unique_ptr<CpuKernel> kernel_;
};

struct Op final : OrtCustomOp {
  Op() : OrtCustomOp{} {
    version = ORT_API_VERSION;
    GetName = [](const OrtCustomOp*) { return kOperator; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    GetInputTypeCount = [](const OrtCustomOp*) -> std::size_t { return kInputs; };
    GetInputType = [](const OrtCustomOp*, std::size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
    GetInputCharacteristic = [](const OrtCustomOp*, std::size_t input) {
      return input < kBranch ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp*) -> std::size_t { return kOperands - kInputs; };
    GetOutputType = [](const OrtCustomOp*, std::size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
    GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t output) {
      return output + kInputs == kBeta ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    };
    GetStartVersion = [](const OrtCustomOp*) { return kVersion; };
    GetEndVersion = [](const OrtCustomOp*) { return kVersion; };
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
      return guarded(*api, [&] { *kernel = new NodeKernel(*api, *info); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return static_cast<NodeKernel*>(kernel)->compute(*context);
    };
    KernelDestroy = [](void* kernel) { delete static_cast<NodeKernel*>(kernel); };
  }
};

}  // namespace

const OrtCustomOp* hyper_connection_op() {
  static const Op op;
  return &op;
}

}  // namespace titans::plugins
