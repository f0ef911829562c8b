#include "plugins/tensorrt/tensors.h"

namespace titans::plugins {

using namespace titans::kernels;
using nvinfer1::DataType;

DType dtype_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return DType::kFloat32;
    case DataType::kHALF:
      return DType::kFloat16;
    case DataType::kBF16:
      return DType::kBFloat16;
    case DataType::kINT64:
      return DType::kInt64;
    case DataType::kBOOL:
      return DType::kBool;
    default:
      return DType::kOther;
  }
}

bool type_fits(Operand operand, DataType type, DataType q) {
  switch (operand) {
    case kQ:
      return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
    case kK:
    case kV:
    case kY:
      return type == q;
    case kFill:
    case kValid:
    case kSlots:
      return type == DataType::kINT64;
    case kLearn:
      return type == DataType::kBOOL || type == DataType::kINT32 || type == DataType::kINT64;
    default:
      return type == DataType::kFLOAT;
  }
}

Tensor tensor_of(const nvinfer1::PluginTensorDesc& description, void* data) {
  Tensor tensor;
  tensor.data = data;
  tensor.dtype = dtype_of(description.type);
  tensor.rank = description.dims.nbDims;
  for (std::size_t i = 0; i < tensor.shape.size() && static_cast<int>(i) < tensor.rank; ++i) {
    tensor.shape[i] = description.dims.d[i];
  }
  return tensor;
}

std::size_t learn_pitch(DataType type) {
  switch (type) {
    case DataType::kINT32:
      return sizeof(std::int32_t);
    case DataType::kINT64:
      return sizeof(std::int64_t);
    default:
      return sizeof(bool);
  }
}

std::size_t learn_bytes(DataType type, std::int64_t streams) {
  return learn_pitch(type) == sizeof(bool) || streams < 2 ? 0 : align_up(static_cast<std::size_t>(streams));
}

}  // namespace titans::plugins
