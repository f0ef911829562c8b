#include "bundle/field_dtype.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace titans::core {
namespace {

constexpr std::array<std::string_view, 5> kNames{"float32", "bfloat16", "float16", "int8", "fp8"};
constexpr std::size_t kBlock = 32;  // elements of a row that share a scale

bool has_scales(FieldDtype dtype) { return dtype == FieldDtype::kInt8 || dtype == FieldDtype::kFp8; }

std::size_t element_words(FieldDtype dtype, std::size_t elements) {
  if (dtype == FieldDtype::kFloat32) return elements;
  return has_scales(dtype) ? (elements + 3) / 4 : (elements + 1) / 2;
}

std::size_t blocks_of(std::size_t columns) { return (columns + kBlock - 1) / kBlock; }

template <typename Element>
Element element_at(const float* words, std::size_t index) {
  Element element;
  std::memcpy(&element, reinterpret_cast<const unsigned char*>(words) + index * sizeof(element), sizeof(element));
  return element;
}

float from_bfloat16(std::uint16_t bits) {
  const std::uint32_t whole = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &whole, sizeof(value));
  return value;
}

// Decodes a sign, `exponent` bits and `mantissa` bits, without infinities or NaN.
float from_small(unsigned bits, int exponent, int mantissa) {
  const int field = static_cast<int>(bits >> mantissa) & ((1 << exponent) - 1);
  const int fraction = static_cast<int>(bits & ((1U << mantissa) - 1));
  const int least = 2 - (1 << (exponent - 1));  // exponent of subnormals
  const int whole = field == 0 ? fraction : fraction + (1 << mantissa);
  const float value = std::ldexp(static_cast<float>(whole), least + std::max(field, 1) - 1 - mantissa);
  return (bits >> (exponent + mantissa) & 1U) != 0 ? -value : value;
}

float from_float16(std::uint16_t bits) {
  if ((bits & 0x7C00U) != 0x7C00U) return from_small(bits, 5, 10);
  const float value = (bits & 0x3FFU) != 0 ? NAN : INFINITY;
  return (bits & 0x8000U) != 0 ? -value : value;
}

float scaled_at(FieldDtype dtype, const float* words, std::size_t extent, std::size_t columns, std::size_t index) {
  const std::size_t block = index / columns * blocks_of(columns) + index % columns / kBlock;
  const float scale = from_bfloat16(element_at<std::uint16_t>(words + element_words(dtype, extent), block));
  if (dtype == FieldDtype::kInt8) return scale * static_cast<float>(element_at<std::int8_t>(words, index));
  return scale * from_small(element_at<std::uint8_t>(words, index), 4, 3);
}

template <typename Element>
void put(float* words, std::size_t index, Element element) {
  std::memcpy(reinterpret_cast<unsigned char*>(words) + index * sizeof(element), &element, sizeof(element));
}

std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

constexpr std::uint16_t kNaN = 0x7FC0;  // in bfloat16

std::uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return kNaN;
  const std::uint32_t bits = bits_of(value);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}

// Encodes a finite magnitude without sign, in the format of from_small. Larger values give the code after the largest.
// Neighbouring codes differ by powers of two, so only std::nearbyint rounds, to nearest even.
unsigned to_small(float magnitude, int exponent, int mantissa) {
  const int least = 2 - (1 << (exponent - 1));
  int power = least;
  if (magnitude > 0.0F) power = std::max(std::ilogb(magnitude), least);
  const auto steps = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, mantissa - power)));
  // For normal numbers `steps` includes the implicit leading bit, which adds one to the exponent field.
  return (static_cast<unsigned>(power - least) << mantissa) + steps;
}

std::uint16_t to_float16(float value) {
  const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
  if (std::isnan(value)) return static_cast<std::uint16_t>(sign | 0x7E00U);
  const float magnitude = std::min(std::abs(value), 65536.0F);  // infinity is the code after the largest
  return static_cast<std::uint16_t>(sign | to_small(magnitude, 5, 10));
}

// Rounded up to prevent clipping.
std::uint16_t scale_of(const float* values, std::size_t count, float largest) {
  float most = 0.0F;
  for (std::size_t i = 0; i < count; ++i) {
    if (!std::isfinite(values[i])) return kNaN;
    most = std::max(most, std::abs(values[i]));
  }
  if (most < 0x1p-100F) return 0;
  return static_cast<std::uint16_t>((bits_of(most / largest) + 0xFFFFU) >> 16);
}

void pack_scaled(FieldDtype dtype, const float* values, std::size_t extent, std::size_t columns, float* words) {
  const float largest = dtype == FieldDtype::kInt8 ? 127.0F : 448.0F;
  std::size_t block = 0;
  for (std::size_t row = 0; row < extent; row += columns) {
    for (std::size_t start = 0; start < columns; start += kBlock, ++block) {
      const std::size_t count = std::min(kBlock, columns - start);
      const std::uint16_t scale = scale_of(values + row + start, count, largest);
      put(words + element_words(dtype, extent), block, scale);
      if (scale == 0 || scale == kNaN) continue;  // the elements stay zero
      const float reciprocal = 1.0F / from_bfloat16(scale);
      for (std::size_t i = row + start; i < row + start + count; ++i) {
        const float magnitude = std::min(std::abs(values[i]) * reciprocal, largest);
        const bool negative = std::signbit(values[i]);
        if (dtype == FieldDtype::kInt8) {
          const auto whole = static_cast<int>(std::nearbyint(magnitude));
          put(words, i, static_cast<std::int8_t>(negative ? -whole : whole));
        } else {
          put(words, i, static_cast<std::uint8_t>(to_small(magnitude, 4, 3) | (negative ? 0x80U : 0U)));
        }
      }
    }
  }
}

}  // namespace

std::optional<FieldDtype> field_dtype_named(std::string_view name) {
  const auto* found = std::find(kNames.begin(), kNames.end(), name);
  if (found == kNames.end()) return std::nullopt;
  return static_cast<FieldDtype>(found - kNames.begin());
}

std::string_view field_dtype_name(FieldDtype dtype) { return kNames[static_cast<std::size_t>(dtype)]; }

std::string field_dtype_names() {
  std::string names;
  for (const std::string_view name : kNames) names += (names.empty() ? "" : ", ") + std::string(name);
  return names;
}

std::size_t field_words(FieldDtype dtype, const Shape& shape) {
  std::size_t elements = 1;
  for (const std::int64_t dimension : shape) elements *= static_cast<std::size_t>(dimension);
  const std::size_t words = element_words(dtype, elements);
  if (!has_scales(dtype) || elements == 0) return words;
  const std::size_t columns = shape.empty() ? 1 : static_cast<std::size_t>(shape.back());
  return words + (elements / columns * blocks_of(columns) + 1) / 2;
}

void unpack_field(FieldDtype dtype, const float* words, std::size_t extent, std::size_t columns, float* values) {
  for (std::size_t i = 0; i < extent; ++i) {
    switch (dtype) {
      case FieldDtype::kFloat32:
        values[i] = words[i];
        break;
      case FieldDtype::kBFloat16:
        values[i] = from_bfloat16(element_at<std::uint16_t>(words, i));
        break;
      case FieldDtype::kFloat16:
        values[i] = from_float16(element_at<std::uint16_t>(words, i));
        break;
      default:
        values[i] = scaled_at(dtype, words, extent, columns, i);
    }
  }
}

void pack_field(FieldDtype dtype, const float* values, std::size_t extent, std::size_t columns, float* words) {
  if (dtype == FieldDtype::kFloat32) {
    std::copy_n(values, extent, words);
    return;
  }
  const auto rows = static_cast<std::int64_t>(columns == 0 ? 0 : extent / columns);
  std::memset(words, 0, field_words(dtype, {rows, static_cast<std::int64_t>(columns)}) * sizeof(float));
  if (has_scales(dtype)) return pack_scaled(dtype, values, extent, columns, words);
  for (std::size_t i = 0; i < extent; ++i) {
    put(words, i, dtype == FieldDtype::kBFloat16 ? to_bfloat16(values[i]) : to_float16(values[i]));
  }
}

}  // namespace titans::core
