// What a graph file says of its initialisers. ONNX Runtime takes any tensor in an initialiser's stead and computes with
// it as if it were of the declared type, so somebody has to look.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "base/tensor.h"

namespace titans::core {

struct Initializer {
  std::int64_t type = 0;  // a TensorProto.DataType, whose numbers are those of ONNXTensorElementDataType
  Shape shape;
};

// The initialisers of the main graph by name, names and shapes only. Throws an Error that names `file_name` where
// `model` is no ONNX model or declares one name twice.
std::map<std::string, Initializer> read_initializers(std::string_view model, std::string_view file_name);

}  // namespace titans::core
