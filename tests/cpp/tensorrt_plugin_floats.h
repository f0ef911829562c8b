// float16 and bfloat16 in host memory, rounded to nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "plugins/kernels/neural_memory.h"

namespace titans::plugin_host {

inline float widen(kernels::DType type, std::uint16_t bits) {
  if (type == kernels::DType::kBFloat16) {
    const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof(value));
    return value;
  }
  const int exponent = (bits >> 10) & 0x1F, fraction = bits & 0x3FF;
  float size = 0.0F;
  if (exponent == 0x1F) {
    size = fraction == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  } else if (exponent == 0) {
    size = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    size = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  }
  return (bits & 0x8000) != 0 ? -size : size;
}

inline std::uint16_t narrow(kernels::DType type, float value) {
  if (type == kernels::DType::kBFloat16) {
    std::uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    if (std::isnan(value)) return static_cast<std::uint16_t>(word >> 16) | 0x40;
    return static_cast<std::uint16_t>((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
  }
  const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
  const double size = std::fabs(static_cast<double>(value));
  if (std::isnan(value)) return 0x7E00;
  if (size >= 65520.0) return sign | 0x7C00;
  if (size < std::ldexp(1.0, -14)) return sign | static_cast<std::uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  const int exponent = std::ilogb(size);
  // A mantissa that rounds up to 2048 carries into the exponent, as intended.
  const auto rounded = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return sign | static_cast<std::uint16_t>(((exponent + 15) << 10) + rounded - 1024);
}

}  // namespace titans::plugin_host
