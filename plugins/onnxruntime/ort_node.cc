#include "plugins/onnxruntime/ort_node.h"

#include <string>

namespace titans::plugins {
namespace {

using namespace titans::kernels;

// What a node lacks stays as it is; what must be there, configure() says.
Attributes read_attributes(const OrtApi& api, const OrtKernelInfo& info) {
  Attributes attributes;
  const auto found = [&](OrtStatus* status) {
    if (status != nullptr) api.ReleaseStatus(status);
    return status == nullptr;
  };
  const auto is_text = [&](const char* name, std::size_t& size) {
    return found(api.KernelInfoGetAttribute_string(&info, name, nullptr, &size)) && size != 0;
  };
  const auto is_number = [&](const char* name, std::int64_t& number) {
    return found(api.KernelInfoGetAttribute_int64(&info, name, &number));
  };
  // One that is there and of another type is not one that is left out.
  const auto refuse_another_type = [&](const char* name) {
    float real = 0;
    std::int64_t number = 0;
    std::size_t size = 0;
    if (!found(api.KernelInfoGetAttribute_float(&info, name, &real)) && !is_number(name, number) &&
        !is_text(name, size)) {
      return;
    }
    check(api, std::string("[NeuralMemory] expected attribute ") + name +
                   " of the type that docs/operator.md gives it but got another; do export the model again");
  };
  const auto read_text = [&](const char* name, std::string& value) {
    std::size_t size = 0;  // with the final NUL
    if (!is_text(name, size)) return refuse_another_type(name);
    std::string text(size, '\0');
    check(api.KernelInfoGetAttribute_string(&info, name, text.data(), &size));
    text.resize(size - 1);
    value = text;
  };
  const auto read_number = [&](const char* name, std::int64_t& value) {
    std::int64_t number = 0;
    if (!is_number(name, number)) return refuse_another_type(name);
    value = number;
  };
  const auto read_real = [&](const char* name, float& value) {
    float real = 0;
    if (!found(api.KernelInfoGetAttribute_float(&info, name, &real))) return refuse_another_type(name);
    value = real;
  };
  read_text("mode", attributes.mode);
  read_text("schedule", attributes.schedule);
  read_text("activation", attributes.activation);
  read_text("memory_dtype", attributes.memory_dtype);
  read_number("residual", attributes.residual);
  read_number("layer_norm", attributes.layer_norm);
  read_number("chunk_size", attributes.chunk_size);
  read_text("gates", attributes.gates);
  read_text("rounding", attributes.rounding);
  read_number("seed", attributes.seed);
  if (std::int64_t size = 0; is_number("batch_size", size)) {
    attributes.batch_size = size;
  } else {
    refuse_another_type("batch_size");
  }
  read_real("loss_scale", attributes.loss_scale);
  read_number("keys_per_token", attributes.keys_per_token);
  read_number("lookahead", attributes.lookahead);
  read_text("norm_weight", attributes.norm_weight);
  read_number("momentum_order", attributes.momentum_order);
  read_real("grad_clamp", attributes.grad_clamp);
  read_number("orthogonalise", attributes.orthogonalise);
  std::size_t count = 0;
  if (found(api.KernelInfoGetAttributeArray_int64(&info, "widths", nullptr, &count))) {
    attributes.widths.resize(count);
    check(api.KernelInfoGetAttributeArray_int64(&info, "widths", attributes.widths.data(), &count));
  }
  return attributes;
}

DType dtype_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return DType::kFloat32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return DType::kFloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return DType::kBFloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return DType::kInt64;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
      return DType::kBool;
    default:
      return DType::kOther;
  }
}

Tensor view(const OrtApi& api, OrtValue& value) {
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(api.GetTensorTypeAndShape(&value, &raw));
  const Handle<OrtTensorTypeAndShapeInfo> info(raw, api.ReleaseTensorTypeAndShapeInfo);
  Tensor tensor;
  ONNXTensorElementDataType type;
  std::size_t rank = 0;
  check(api.GetTensorElementType(raw, &type));
  check(api.GetDimensionsCount(raw, &rank));
  tensor.dtype = dtype_of(type);
  tensor.rank = static_cast<int>(rank);
  if (rank <= tensor.shape.size()) check(api.GetDimensions(raw, tensor.shape.data(), rank));
  check(api.GetTensorMutableData(&value, &tensor.data));
  return tensor;
}

// Absent where the node does not want it.
Tensor output(const OrtApi& api, OrtKernelContext& context, Operand which, const Tensor& like, DType dtype) {
  if (like.rank < 0 || like.rank > static_cast<int>(like.shape.size())) return {};
  OrtValue* value = nullptr;
  check(api.KernelContext_GetOutput(&context, which - kY, like.shape.data(), static_cast<std::size_t>(like.rank),
                                    &value));
  if (value == nullptr) return {};
  Tensor tensor = like;
  tensor.dtype = dtype;
  check(api.GetTensorMutableData(value, &tensor.data));
  return tensor;
}

}  // namespace

Configuration read_configuration(const OrtApi& api, const OrtKernelInfo& info) {
  Configuration configuration;
  check(api, configure(read_attributes(api, info), configuration));
  return configuration;
}

Operands read_operands(const OrtApi& api, OrtKernelContext& context, const Configuration& configuration, DType values) {
  Operands operands;
  std::size_t inputs = 0, outputs = 0;
  check(api.KernelContext_GetInputCount(&context, &inputs));
  check(api.KernelContext_GetOutputCount(&context, &outputs));
  for (std::size_t i = 0; i < inputs && i < kInputs; ++i) {
    const OrtValue* value = nullptr;
    check(api.KernelContext_GetInput(&context, i, &value));
    if (value != nullptr) operands[i] = view(api, const_cast<OrtValue&>(*value));
  }
  // Outputs have the shapes of inputs; should those be wrong, the kernel's check says so.
  operands[kY] = output(api, context, kY, operands[kQ], values);
  if (configuration.mode == Mode::kUpdate) {
    operands[kStateOut] = output(api, context, kStateOut, operands[kState], DType::kFloat32);
    if (outputs > kStats - kY) {
      Tensor stats = operands[kQ];
      stats.rank = 3;
      stats.shape[2] = kStatCount;
      operands[kStats] = output(api, context, kStats, stats, DType::kFloat32);
    }
    if (outputs > kInitialWeights - kY) {
      Tensor before = operands[kQ];
      before.shape[2] = configuration.chunks(before.shape[2]);
      before.shape[3] = configuration.all_elements();
      operands[kInitialWeights] = output(api, context, kInitialWeights, before, DType::kFloat32);
    }
  }
  return operands;
}

}  // namespace titans::plugins
