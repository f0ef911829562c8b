// Reads, rounds and writes W and S in a packed row. docs/operator.md defines the formats under MemoryDtype.
#pragma once

#include "plugins/kernels/cuda_device.cuh"
#include "plugins/kernels/cuda_numbers.cuh"
#include "plugins/kernels/cuda_plan.h"
#include "plugins/kernels/rounding.h"

namespace titans::kernels::cuda {

static_assert(kScaleBlock == kWarpSize && kPadding % kScaleBlock == 0,
              "a warp has a block, blocks of threads have whole ones");

// ---- reading: the same few instructions for all memory dtypes, because branches would separate the loads ----

// The value of an element's bits, without a scale. Bits above the element are ignored.
__device__ inline float decode(const Decoder& d, std::uint32_t bits) {
  const std::uint32_t placed = (bits & d.magnitude) << d.magnitude_shift | (bits & d.sign) << d.sign_shift;
  const float value = float_of(placed ^ d.flip) * d.factor + d.offset;
  if (absolute(value) < d.beyond) return value;
  return absolute(value) == d.beyond ? value * infinity() : __builtin_nanf("");
}

__device__ inline float load_scale(const float* row, const Field& field, int r, int j) {
  const auto* scales = reinterpret_cast<const std::uint16_t*>(row + field.scales);
  return float_of(static_cast<std::uint32_t>(scales[r * field.blocks + j / kScaleBlock]) << 16);
}

__device__ inline float load_weight(const Codec& m, const float* row, const Field& field, int r, int j) {
  const int index = r * field.columns + j, within = index & (m.decoder.per_word - 1);
  const std::uint32_t word = bits_of(row[field.elements + (index >> m.decoder.word_shift)]);
  const float value = decode(m.decoder, word >> within * m.decoder.element_bits);
  return m.scaled ? value * load_scale(row, field, r, j) : value;
}

// Columns j to j + 3. j and the number of columns are multiples of 4, so they begin at a word of the row.
__device__ inline Four load_four(const Codec& m, const float* row, const Field& field, int r, int j) {
  const float* from = row + field.elements + ((r * field.columns + j) >> m.decoder.word_shift);
  const int per_word = m.decoder.per_word;
  const std::uint32_t first = bits_of(from[0]), second = bits_of(from[per_word < 4 ? 1 : 0]);
  const std::uint32_t third = per_word == 1 ? bits_of(from[2]) : per_word == 2 ? second : first >> 16;
  Four four{{decode(m.decoder, first), decode(m.decoder, per_word == 1 ? second : first >> m.decoder.element_bits),
             decode(m.decoder, third),
             decode(m.decoder, per_word == 1   ? bits_of(from[3])
                               : per_word == 2 ? second >> 16
                                               : first >> 24)}};
  if (!m.scaled) return four;
  const float scale = load_scale(row, field, r, j);
#pragma unroll
  for (float& value : four.v) value *= scale;
  return four;
}

// ---- rounding ----

// Rounds a magnitude to a whole number: to the nearest, or stochastically.
__device__ inline float round_whole(float z, bool stochastic, std::uint32_t noise) {
  if (!stochastic) return nearest_whole(z);
  const float low = whole_below(z), u = static_cast<float>(noise >> 8) * 0x1p-24F;
  return u < z - low ? low + 1.0F : low;
}

// Rounds off the last `count` bits of a float32: to the nearest with ties to even, or stochastically.
__device__ inline std::uint32_t round_bits(std::uint32_t bits, int count, bool stochastic, std::uint32_t noise) {
  const std::uint32_t rest = (1U << count) - 1U;
  const std::uint32_t up = stochastic ? rest - (noise >> (32 - count)) : (rest >> 1) + (bits >> count & 1U);
  return (bits + up) & ~rest;
}

// Encodes a magnitude, clamped to the largest value: to the nearest element, or stochastically to one of its
// neighbours.
__device__ inline std::uint32_t round_element(const Encoder& e, float z, bool stochastic, std::uint32_t noise) {
  if (is_nan(z)) return e.nan;
  // If this rounds up past the largest subnormal, the result is the encoding of the smallest normal number.
  if (z < e.least_normal) return static_cast<std::uint32_t>(round_whole(z * e.per_least, stochastic, noise));
  const std::uint32_t bits = (round_bits(bits_of(z), e.lost_bits, stochastic, noise) >> e.lost_bits) - e.biases;
  return bits < e.most ? bits : e.most;
}

// Writes one scale block of a row of W or S to the packed row. Each lane of the warp has one column; `inside` is false
// beyond the last. Returns the lane's rounded element.
__device__ inline float store_block(const Codec& m, float* row, const Field& field, int r, int j, bool inside,
                                    bool stochastic, const NoiseKeys& keys, float x) {
  const int index = r * field.columns + j;
  float z = absolute(x), scale = 1.0F;
  if (m.scaled) {
    const float largest = max_over_warp(inside ? (is_finite(x) ? z : infinity()) : 0.0F);
    const bool empty = largest < kSmallestBlock, usable = !empty && largest < infinity();
    std::uint32_t bits = empty ? 0U : 0x7FC0U;
    if (usable) bits = (bits_of(largest / m.encoder.largest) + 0xFFFFU) >> 16;
    scale = float_of(bits << 16);
    z = usable ? smaller_of(z * (1.0F / scale), m.encoder.largest) : 0.0F;
    if (!usable) x = 0.0F;
    if (lane_index() == 0) {
      auto* scales = reinterpret_cast<std::uint16_t*>(row + field.scales);
      scales[r * field.blocks + j / kScaleBlock] = static_cast<std::uint16_t>(bits);
    }
  }
  const std::uint32_t drawn = stochastic ? noise(keys, static_cast<std::uint32_t>(index)) : 0U;
  std::uint32_t element = round_element(m.encoder, z, stochastic, drawn);
  if (bits_of(x) >> 31 != 0) element = m.memory_dtype == MemoryDtype::kInt8 ? 0U - element : element | m.decoder.sign;
  if (inside) {
    float* elements = row + field.elements;
    if (m.decoder.element_bits == 16) {
      reinterpret_cast<std::uint16_t*>(elements)[index] = static_cast<std::uint16_t>(element);
    } else {
      reinterpret_cast<std::uint8_t*>(elements)[index] = static_cast<std::uint8_t>(element);
    }
  }
  return decode(m.decoder, element) * scale;
}

}  // namespace titans::kernels::cuda
