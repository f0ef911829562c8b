#include "plugins/onnxruntime/ort_node.h"

namespace titans::plugins {
namespace {

using namespace titans::kernels;

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

Tensor output(const OrtApi& api, OrtKernelContext& context, Operand which, Tensor like, DType dtype) {
  like.dtype = dtype;
  return make_output(api, context, which - kY, like);
}

// Outputs have the shapes of inputs. The kernel's check rejects wrong ones.
void add_update_outputs(const OrtApi& api, OrtKernelContext& context, std::size_t outputs, Operands& operands) {
  operands[kStateOut] = output(api, context, kStateOut, operands[kState], DType::kFloat32);
  if (outputs <= kStats - kY) return;
  Tensor stats = operands[kQ];
  stats.rank = 3;
  stats.shape[2] = kStatCount;
  operands[kStats] = output(api, context, kStats, stats, DType::kFloat32);
}

}  // namespace

int ordinal_of(const OrtApi& api, const OrtKernelInfo& info) {
  OrtAllocator* raw = nullptr;
  check(api.KernelInfoGetAllocator(&info, OrtMemTypeDefault, &raw));
  const Handle<OrtAllocator> allocator(raw, api.ReleaseAllocator);
  const OrtMemoryInfo* memory = nullptr;  // owned by the allocator
  check(api.AllocatorGetInfo(raw, &memory));
  int ordinal = 0;
  check(api.MemoryInfoGetId(memory, &ordinal));
  return ordinal;
}

void read_inputs(const OrtApi& api, OrtKernelContext& context, Tensor* inputs, std::size_t count) {
  std::size_t given = 0;
  check(api.KernelContext_GetInputCount(&context, &given));
  for (std::size_t i = 0; i < given && i < count; ++i) {
    const OrtValue* value = nullptr;
    check(api.KernelContext_GetInput(&context, i, &value));
    if (value != nullptr) inputs[i] = view(api, const_cast<OrtValue&>(*value));
  }
}

Tensor make_output(const OrtApi& api, OrtKernelContext& context, std::size_t index, const Tensor& like) {
  if (like.rank < 0 || like.rank > static_cast<int>(like.shape.size())) return {};
  OrtValue* value = nullptr;
  check(api.KernelContext_GetOutput(&context, index, like.shape.data(), static_cast<std::size_t>(like.rank), &value));
  if (value == nullptr) return {};
  Tensor tensor = like;
  check(api.GetTensorMutableData(value, &tensor.data));
  return tensor;
}

std::size_t output_count(const OrtApi& api, OrtKernelContext& context) {
  std::size_t outputs = 0;
  check(api.KernelContext_GetOutputCount(&context, &outputs));
  return outputs;
}

bool NodeAttributes::found(OrtStatus* status) const {
  if (status != nullptr) api_.ReleaseStatus(status);
  return status == nullptr;
}

// Throws if the attribute has another type; a missing attribute is allowed.
bool NodeAttributes::refuse_another_type(const char* name) const {
  float real = 0;
  std::int64_t number = 0;
  std::size_t size = 0;
  if (found(api_.KernelInfoGetAttribute_float(&info_, name, &real)) ||
      found(api_.KernelInfoGetAttribute_int64(&info_, name, &number)) ||
      (found(api_.KernelInfoGetAttribute_string(&info_, name, nullptr, &size)) && size != 0)) {
    check(api_, failure(where_, "E0701", std::string("invalid attribute ") + name + ": wrong type", kExportAgain));
  }
  return false;
}

bool NodeAttributes::read(const char* name, std::string& value) const {
  std::size_t size = 0;  // including the final NUL
  if (!found(api_.KernelInfoGetAttribute_string(&info_, name, nullptr, &size)) || size == 0) {
    return refuse_another_type(name);
  }
  std::string text(size, '\0');
  check(api_.KernelInfoGetAttribute_string(&info_, name, text.data(), &size));
  text.resize(size - 1);
  value = text;
  return true;
}

bool NodeAttributes::read(const char* name, std::int64_t& value) const {
  std::int64_t number = 0;
  if (!found(api_.KernelInfoGetAttribute_int64(&info_, name, &number))) return refuse_another_type(name);
  value = number;
  return true;
}

bool NodeAttributes::read(const char* name, std::optional<std::int64_t>& value) const {
  std::int64_t number = 0;
  if (!read(name, number)) return false;
  value = number;
  return true;
}

bool NodeAttributes::read(const char* name, float& value) const {
  float real = 0;
  if (!found(api_.KernelInfoGetAttribute_float(&info_, name, &real))) return refuse_another_type(name);
  value = real;
  return true;
}

bool NodeAttributes::read(const char* name, std::vector<std::int64_t>& value) const {
  std::size_t count = 0;
  if (!found(api_.KernelInfoGetAttributeArray_int64(&info_, name, nullptr, &count))) return refuse_another_type(name);
  value.resize(count);
  check(api_.KernelInfoGetAttributeArray_int64(&info_, name, value.data(), &count));
  return true;
}

Operands read_operands(const OrtApi& api, OrtKernelContext& context, const Configuration& configuration, DType values) {
  Operands operands;
  read_inputs(api, context, operands.data(), kInputs);
  operands[kY] = output(api, context, kY, operands[kQ], values);
  if (configuration.mode == Mode::kUpdate) {
    add_update_outputs(api, context, output_count(api, context), operands);
  }
  return operands;
}

Operands read_operands(const OrtApi& api, OrtKernelContext& context, const ChunkConfiguration& configuration,
                       DType values) {
  Operands operands;
  read_inputs(api, context, operands.data(), kInputs);
  const std::size_t outputs = output_count(api, context);
  operands[kY] = output(api, context, kY, operands[kQ], values);
  add_update_outputs(api, context, outputs, operands);
  if (outputs > kInitialWeights - kY) {
    Tensor weights = operands[kQ];
    weights.shape[2] = configuration.chunks(weights.shape[2]);
    weights.shape[3] = configuration.all_elements();
    operands[kInitialWeights] = output(api, context, kInitialWeights, weights, DType::kFloat32);
  }
  return operands;
}

}  // namespace titans::plugins
