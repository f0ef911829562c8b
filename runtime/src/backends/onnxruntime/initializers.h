// The initialisers that a graph file declares. ONNX Runtime accepts any tensor as an initialiser and treats it as the
// declared type, so the caller must check the types.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "base/tensor.h"

namespace titans::core {

struct Initializer {
  std::int64_t type = 0;  // a TensorProto.DataType; same values as ONNXTensorElementDataType
  Shape shape;
};

// The main graph's initialisers by name: types and shapes, no data. Throws an Error, naming `file_name`, if `model` is
// not an ONNX model or declares a name twice.
std::map<std::string, Initializer> read_initializers(std::string_view model, std::string_view file_name);

}  // namespace titans::core
