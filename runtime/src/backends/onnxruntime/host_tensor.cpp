#include "backends/onnxruntime/host_tensor.h"

#include <array>
#include <cstring>
#include <new>

#include "base/error.h"
#include "base/wipe.h"

namespace titans::core {
namespace {

constexpr std::align_val_t kCacheLine{64};

// In the order of DType.
constexpr std::array<ONNXTensorElementDataType, kDTypes.size()> kOrtTypes{
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,     ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16,    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL,     ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN};

}  // namespace

ONNXTensorElementDataType ort_type(DType dtype) { return kOrtTypes[static_cast<std::size_t>(dtype)]; }

std::string ort_type_name(std::int64_t type) {
  for (std::size_t i = 0; i < kOrtTypes.size(); ++i) {
    if (kOrtTypes[i] == type) return std::string(kDTypes[i].name);
  }
  return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4 ? "int4" : text("ONNX element type ", type);
}

OrtHandle<OrtValue> view_tensor(const OrtLibrary& library, const OrtMemoryInfo& host, void* data, std::size_t bytes,
                                ONNXTensorElementDataType type, const Shape& shape) {
  OrtValue* value = nullptr;
  library.check(
      library.api().CreateTensorWithDataAsOrtValue(&host, data, bytes, shape.data(), shape.size(), type, &value),
      "cannot create a tensor", kReport);
  return {value, library.api().ReleaseValue};
}

OrtHandle<OrtValue> view_tensor(const OrtLibrary& library, const OrtMemoryInfo& host, void* data, std::size_t bytes,
                                DType dtype, const Shape& shape) {
  return view_tensor(library, host, data, bytes, ort_type(dtype), shape);
}

HostMemory::HostMemory(std::size_t bytes)
    : size_(bytes), data_(static_cast<std::byte*>(::operator new(bytes, kCacheLine)), Free{bytes}) {
  std::memset(data_.get(), 0, bytes);
}

void HostMemory::Free::operator()(std::byte* data) const noexcept {
  wipe(data, size);
  ::operator delete(data, kCacheLine);
}

}  // namespace titans::core
