// Host memory and OrtValues that view it.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "backends/onnxruntime/library.h"
#include "base/tensor.h"

namespace titans::core {

ONNXTensorElementDataType ort_type(DType dtype);
// The name of an ONNX element type, such as float32, for errors.
std::string ort_type_name(std::int64_t type);

// An OrtValue over memory that it does not own.
OrtHandle<OrtValue> view_tensor(const OrtLibrary& library, const OrtMemoryInfo& host, void* data, std::size_t bytes,
                                ONNXTensorElementDataType type, const Shape& shape);
OrtHandle<OrtValue> view_tensor(const OrtLibrary& library, const OrtMemoryInfo& host, void* data, std::size_t bytes,
                                DType dtype, const Shape& shape);

// Memory aligned to cache lines. ONNX Runtime's kernels are fastest there, and streams do not share lines. Zeroed when
// allocated and again when freed.
class HostMemory {
 public:
  explicit HostMemory(std::size_t bytes);
  std::byte* data() const { return data_.get(); }
  std::size_t size() const { return size_; }

 private:
  struct Free {
    std::size_t size;
    void operator()(std::byte* data) const noexcept;
  };
  std::size_t size_;
  std::unique_ptr<std::byte, Free> data_;
};

}  // namespace titans::core
