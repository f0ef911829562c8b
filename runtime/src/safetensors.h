// Reads the header of a safetensors file without trusting a number in it.
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "mapped_file.h"
#include "tensor.h"

namespace titans::core {

using Tensors = std::map<std::string, TensorView, std::less<>>;

// Views into `file`, which must outlive them. Tensors of types that the runtime does not know are left out.
Tensors read_safetensors(const MappedFile& file, std::string_view file_name);

}  // namespace titans::core
