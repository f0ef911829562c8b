// Element types, shapes, and non-owning tensor views.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace titans::core {

enum class DType {
  kFloat32,
  kFloat16,
  kBFloat16,
  kFloat64,
  kInt8,
  kUInt8,
  kInt16,
  kUInt16,
  kInt32,
  kUInt32,
  kInt64,
  kUInt64,
  kBool,
  kFloat8E4M3
};

struct DTypeInfo {
  DType dtype;
  std::string_view name;         // in the manifest
  std::string_view safetensors;  // in a safetensors header
  std::size_t bytes;
};

inline constexpr std::array<DTypeInfo, 14> kDTypes{{{DType::kFloat32, "float32", "F32", 4},
                                                    {DType::kFloat16, "float16", "F16", 2},
                                                    {DType::kBFloat16, "bfloat16", "BF16", 2},
                                                    {DType::kFloat64, "float64", "F64", 8},
                                                    {DType::kInt8, "int8", "I8", 1},
                                                    {DType::kUInt8, "uint8", "U8", 1},
                                                    {DType::kInt16, "int16", "I16", 2},
                                                    {DType::kUInt16, "uint16", "U16", 2},
                                                    {DType::kInt32, "int32", "I32", 4},
                                                    {DType::kUInt32, "uint32", "U32", 4},
                                                    {DType::kInt64, "int64", "I64", 8},
                                                    {DType::kUInt64, "uint64", "U64", 8},
                                                    {DType::kBool, "bool", "BOOL", 1},
                                                    {DType::kFloat8E4M3, "float8_e4m3fn", "F8_E4M3", 1}}};

// The table is in the enumeration's order.
constexpr const DTypeInfo& dtype_info(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)]; }

inline std::optional<DType> dtype_named(std::string_view name, std::string_view DTypeInfo::* column) {
  for (const DTypeInfo& info : kDTypes) {
    if (info.*column == name) return info.dtype;
  }
  return std::nullopt;
}

using Shape = std::vector<std::int64_t>;

inline std::string shape_text(const Shape& shape) {
  std::string out = "[";
  for (const std::int64_t dimension : shape) {
    if (out.size() > 1) out += ", ";
    out += std::to_string(dimension);
  }
  return out + "]";
}

// Bytes of a tensor of that shape; no value if a dimension is negative or the size overflows.
inline std::optional<std::size_t> tensor_bytes(const Shape& shape, DType dtype) {
  std::size_t bytes = dtype_info(dtype).bytes;
  for (const std::int64_t dimension : shape) {
    if (dimension < 0) return std::nullopt;
    const auto extent = static_cast<std::size_t>(dimension);
    if (extent != 0 && bytes > std::numeric_limits<std::size_t>::max() / extent) return std::nullopt;
    bytes *= extent;
  }
  return bytes;
}

struct TensorView {
  const std::byte* data;
  DType dtype;
  Shape shape;
  std::size_t bytes;
};

}  // namespace titans::core
