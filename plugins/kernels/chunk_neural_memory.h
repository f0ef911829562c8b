// The operator ai.titans::ChunkNeuralMemory, with gates per chunk: attributes, configuration, packed row and checks.
// docs/chunk-operator.md is the specification; names, shapes and equations are from there.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "plugins/kernels/memory_common.h"

namespace titans::kernels {

// Whether the LayerNorm's scale is an input, or a part of W.
enum class NormWeight : std::uint8_t { kSlow, kFast };
inline constexpr std::array kNormWeights{"slow", "fast"};

struct ChunkAttributes : MemoryAttributes {
  std::optional<std::int64_t> batch_size;  // default: chunk_size
  float loss_scale = 1.0F;
  std::int64_t keys_per_token = 1;
  std::int64_t lookahead = 0;
  std::string norm_weight = "slow";
  std::int64_t momentum_order = 1;
  float grad_clamp = 0.0F;
  std::int64_t orthogonalise = 0;
};

struct ChunkConfiguration : MemoryConfiguration {
  static constexpr const char* kOperator = "ChunkNeuralMemory";
  static constexpr std::size_t kInputCount = kInputs, kOutputCount = kOperands - kY;
  using Attributes = ChunkAttributes;

  std::int64_t batch_size = 1;  // 0: the gradient point never moves
  float loss_scale = 1.0F;
  std::int64_t keys_per_token = 1;
  bool lookahead = false;
  NormWeight norm_weight = NormWeight::kSlow;
  bool momentum = true;
  float grad_clamp = 0.0F;         // 0: off
  std::int64_t orthogonalise = 0;  // Newton-Schulz steps

  bool fast_norm() const { return norm_weight == NormWeight::kFast; }
  int tensors() const { return depth + (fast_norm() ? 1 : 0); }
  // The number of elements of all weight tensors.
  std::int64_t all_elements() const;
  std::int64_t keys() const { return chunk_size * keys_per_token; }  // per chunk
  // Whether the gradient point differs from W.
  bool keeps_point() const { return batch_size != chunk_size; }
  bool counts_batch() const { return keeps_point() && batch_size != 0; }
  // `fill` counts up to this.
  std::int64_t period() const { return counts_batch() ? batch_size : chunk_size; }
  // The maximum number of chunks that a call of `tokens` completes.
  std::int64_t chunks(std::int64_t tokens) const { return (tokens + chunk_size - 1) / chunk_size; }
};

constexpr auto chunk_attribute_rows() {
  using Row = Attribute<ChunkAttributes, ChunkConfiguration>;
  using A = ChunkAttributes;
  using C = ChunkConfiguration;
  constexpr Presence kOptional = Presence::kOptional;
  constexpr std::int64_t kLargestBatch = std::int64_t{1} << 40, kMostSteps = 100;
  return std::array{
      Row::row<&A::batch_size, &C::batch_size>("batch_size", kOptional, between(0, kLargestBatch)),
      Row::row<&A::loss_scale, &C::loss_scale>("loss_scale", kOptional, above_zero()),
      Row::row<&A::keys_per_token, &C::keys_per_token>("keys_per_token", kOptional, between(1, kLargestChunk)),
      Row::row<&A::lookahead, &C::lookahead>("lookahead", kOptional, flag()),
      Row::row<&A::norm_weight, &C::norm_weight>("norm_weight", kOptional, one_of(kNormWeights)),
      Row::row<&A::momentum_order, &C::momentum>("momentum_order", kOptional, flag()),
      Row::row<&A::grad_clamp, &C::grad_clamp>("grad_clamp", kOptional, at_least_zero()),
      Row::row<&A::orthogonalise, &C::orthogonalise>("orthogonalise", kOptional, between(0, kMostSteps))};
}
inline constexpr auto kChunkAttributes =
    join(memory_attribute_rows<ChunkAttributes, ChunkConfiguration>(), chunk_attribute_rows());
constexpr const auto& attribute_table(const ChunkAttributes& /*of*/) { return kChunkAttributes; }

struct ChunkRowLayout : WeightLayout {
  std::array<std::int64_t, kMaxTensors> g{};  // the gradient point, if it differs from W
  std::int64_t k = 0, v = 0, theta = 0;       // of the open chunk

  explicit ChunkRowLayout(const ChunkConfiguration& configuration);
};

// The checks return a formatted error (failure.h), or an empty string. neural_memory.h describes them.
std::string configure(const ChunkAttributes& attributes, ChunkConfiguration& configuration);
std::string check_operands(const ChunkConfiguration& configuration, const Operands& operands,
                           DType values = DType::kFloat32);
std::string check_values(const ChunkConfiguration& configuration, const Operands& operands);

}  // namespace titans::kernels
