#include "plugins/onnxruntime/memory_op.h"

namespace titans::plugins {
namespace {

using namespace titans::kernels;

constexpr int kVersion = 1;  // of the operator's domain
// The output that may share the buffer of input kState.
constexpr int kStateOutput = kStateOut - kY;

bool holds_values(std::size_t input) { return input == kQ || input == kK || input == kV; }

}  // namespace

MemoryOp::MemoryOp(const char* name, std::size_t inputs, std::size_t outputs, const char* provider,
                   ONNXTensorElementDataType values)
    : OrtCustomOp{}, name_(name), provider_(provider), inputs_(inputs), outputs_(outputs), values_(values) {
  version = ORT_API_VERSION;
  GetName = [](const OrtCustomOp* op) { return static_cast<const MemoryOp*>(op)->name_; };
  GetExecutionProviderType = [](const OrtCustomOp* op) { return static_cast<const MemoryOp*>(op)->provider_; };
  GetInputTypeCount = [](const OrtCustomOp* op) -> std::size_t { return static_cast<const MemoryOp*>(op)->inputs_; };
  GetInputType = [](const OrtCustomOp* op, std::size_t input) {
    switch (input) {
      case kFill:
      case kValid:
      case kSlots:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
      case kLearn:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
      default:
        return holds_values(input) ? static_cast<const MemoryOp*>(op)->values_ : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
  };
  GetInputCharacteristic = [](const OrtCustomOp*, std::size_t input) {
    return input <= kQ ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  // All inputs are in device memory, because kernels read even the small ones there.
  GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
  GetOutputTypeCount = [](const OrtCustomOp* op) -> std::size_t { return static_cast<const MemoryOp*>(op)->outputs_; };
  GetOutputType = [](const OrtCustomOp* op, std::size_t output) {
    return output == 0 ? static_cast<const MemoryOp*>(op)->values_ : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  };
  GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t output) {
    return output == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  GetStartVersion = [](const OrtCustomOp*) { return kVersion; };
  GetEndVersion = [](const OrtCustomOp*) { return kVersion; };
  GetMayInplace = [](int** inputs, int** outputs) -> std::size_t {
    static int input = kState, output = kStateOutput;
    *inputs = &input;
    *outputs = &output;
    return 1;
  };
  ReleaseMayInplace = [](int*, int*) {};
}

DType MemoryOp::values() const {
  switch (values_) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return DType::kFloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

}  // namespace titans::plugins
