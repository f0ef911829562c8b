// Reads the header of a safetensors file without trusting a number in it.
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "base/mapped_file.h"
#include "base/tensor.h"

namespace titans::core {

using Tensors = std::map<std::string, TensorView, std::less<>>;

// Views into `content`, which must outlive them and be aligned to every element. Tensors of types that the runtime does
// not know are left out.
Tensors read_safetensors(std::string_view content, std::string_view file_name);
inline Tensors read_safetensors(const MappedFile& file, std::string_view file_name) {
  return read_safetensors(file.text(), file_name);
}

// The header of such a file, JSON text, by its checked length.
std::string_view safetensors_header(std::string_view content, std::string_view file_name);

}  // namespace titans::core
