#include "plugins/kernels/chunk_neural_memory.h"

#include <algorithm>

namespace titans::kernels {
namespace {

constexpr const char* kWhere = ChunkConfiguration::kOperator;

}  // namespace

std::int64_t ChunkConfiguration::all_elements() const {
  std::int64_t count = 0;
  for (int i = 0; i < tensors(); ++i) count += elements(i);
  return count;
}

ChunkRowLayout::ChunkRowLayout(const ChunkConfiguration& c) {
  place_tensors(c, c.tensors(), w);
  if (c.keeps_point()) place_tensors(c, c.tensors(), g);
  if (c.momentum) place_tensors(c, c.tensors(), s);
  if (c.rounding == Rounding::kErrorFeedback) {
    place_tensors(c, c.tensors(), ew);
    if (c.momentum) place_tensors(c, c.tensors(), es);
  }
  for (std::int64_t* rows : {&k, &v}) place(*rows, c.keys() * c.widths[0]);
  place(theta, c.keys());
  finish(c);
}

std::string configure(const ChunkAttributes& attributes, ChunkConfiguration& c) {
  std::string problem = decode_all(kChunkAttributes, attributes, c);
  if (problem.empty()) problem = finish_memory(kWhere, attributes, c);
  if (!problem.empty()) return problem;
  const auto contradiction = [](const std::string& detail) {
    return failure(kWhere, "E0702", "contradicting attributes: " + detail, kExportAgain);
  };
  c.batch_size = attributes.batch_size.value_or(c.chunk_size);
  if (c.batch_size % c.chunk_size != 0) {
    return contradiction("batch_size must be 0 or a multiple of chunk_size " + std::to_string(c.chunk_size) + ", got " +
                         std::to_string(c.batch_size));
  }
  if (c.keys_per_token > kLargestChunk / c.chunk_size) {
    return contradiction("chunk_size times keys_per_token must be at most " + std::to_string(kLargestChunk) + ", got " +
                         std::to_string(c.chunk_size) + " times " + std::to_string(c.keys_per_token));
  }
  if (c.fast_norm() && !c.layer_norm) return contradiction("norm_weight \"fast\" needs layer_norm 1, got 0");
  return {};
}

std::string check_operands(const ChunkConfiguration& c, const Operands& operands, DType values) {
  std::string problem = check_ranks(kWhere, operands);
  if (!problem.empty()) return problem;
  const bool fill = c.schedule == Schedule::kAny || c.counts_batch(), previous = operands[kPrevious].present();
  OperandNeeds needs;
  needs.row = ChunkRowLayout(c).size;
  needs.keys_per_token = c.keys_per_token;
  needs.momentum = c.momentum;
  needs.fill = fill;
  needs.norm_scale = c.layer_norm && !c.fast_norm();
  const auto common = common_expectations(c, operands, values, needs);
  const auto& [streams, heads, tokens, width] = operands[kQ].shape;
  const std::array<std::int64_t, 4> weights{streams, heads, c.chunks(tokens), c.all_elements()};
  const Expectation own[] = {{kModulation, DType::kFloat32, {streams, heads, tokens, c.tensors()}, 4, false},
                             {kPrevious, DType::kFloat32, weights, 4, false},
                             {kPreviousGate, DType::kFloat32, {streams, heads, tokens, 0}, 3, previous},
                             {kInitialWeights, DType::kFloat32, weights, 4, false}};
  problem = check_expected(kWhere, operands, common.data(), common.size());
  if (problem.empty()) problem = check_expected(kWhere, operands, own, std::size(own));
  if (!problem.empty()) return problem;
  const Refusal refusals[] = {{kMomentum, !c.momentum, "momentum_order 0"},
                              {kNormScale, c.fast_norm(), "norm_weight \"fast\""},
                              {kPreviousGate, !previous, "no previous"},
                              {kFill, !fill, "schedule \"aligned\""}};
  problem = check_refused(kWhere, operands, refusals, std::size(refusals));
  if (problem.empty()) problem = check_whole_chunks(kWhere, c, operands);
  return problem.empty() ? check_aliasing(kWhere, operands) : problem;
}

std::string check_values(const ChunkConfiguration& c, const Operands& operands) {
  std::string problem = check_indices(kWhere, operands, c.period());
  if (problem.empty()) problem = check_aligned_values(kWhere, c, operands);
  const Gate gates[] = {
      {kStepSize, c.keys_per_token}, {kMomentum, 1}, {kForgetGate, 1}, {kModulation, c.tensors()}, {kPreviousGate, 1}};
  return problem.empty() ? check_gates(kWhere, operands, gates, std::size(gates)) : problem;
}

}  // namespace titans::kernels
