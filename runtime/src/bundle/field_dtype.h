// Encodes and decodes fields of packed memory rows (docs/operator.md, "Storage").
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/tensor.h"

namespace titans::core {

enum class FieldDtype : std::uint8_t { kFloat32, kBFloat16, kFloat16, kInt8, kFp8 };

std::optional<FieldDtype> field_dtype_named(std::string_view name);
std::string_view field_dtype_name(FieldDtype dtype);
// All names, for messages.
std::string field_dtype_names();

// 32-bit words of a field of that shape: a matrix, a vector or a scalar.
std::size_t field_words(FieldDtype dtype, const Shape& shape);

// Decodes a field of `extent` elements in rows of `columns`.
void unpack_field(FieldDtype dtype, const float* words, std::size_t extent, std::size_t columns, float* values);

// Encodes such a field, rounding to nearest. Writes all its words and pads the last with zeros.
void pack_field(FieldDtype dtype, const float* values, std::size_t extent, std::size_t columns, float* words);

}  // namespace titans::core
