// Reads safetensors headers and checks every number in them.
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "base/mapped_file.h"
#include "base/tensor.h"

namespace titans::core {

using Tensors = std::map<std::string, TensorView, std::less<>>;

// Views into `content`, which must outlive them and be aligned for every element type. The data of the
// tensors must follow each other without gaps and fill the file.
Tensors read_safetensors(std::string_view content, std::string_view file_name);
inline Tensors read_safetensors(const MappedFile& file, std::string_view file_name) {
  return read_safetensors(file.text(), file_name);
}

// The JSON header of a safetensors file, after checking its length.
std::string_view safetensors_header(std::string_view content, std::string_view file_name);

}  // namespace titans::core
