#include "plugins/kernels/neural_memory.h"

namespace titans::kernels {
namespace {

constexpr const char* kWhere = Configuration::kOperator;

}  // namespace

RowLayout::RowLayout(const Configuration& c) {
  place_tensors(c, c.depth, w);
  place_tensors(c, c.depth, s);
  if (c.rounding == Rounding::kErrorFeedback) {
    place_tensors(c, c.depth, ew);
    place_tensors(c, c.depth, es);
  }
  for (int i = 0; i < c.depth; ++i) {
    place(layer_input[static_cast<std::size_t>(i)], c.chunk_size * c.in(i));
    place(output_grad[static_cast<std::size_t>(i)], c.chunk_size * c.out(i));
  }
  place(e, c.chunk_size);
  place(a, c.chunk_size);
  for (std::int64_t* coefficient : {&m, &f, &beta}) place(*coefficient, 1);
  finish(c);
}

std::string configure(const Attributes& attributes, Configuration& c) {
  std::string problem = decode_all(kAttributes, attributes, c);
  if (problem.empty()) problem = finish_memory(kWhere, attributes, c);
  return problem;
}

std::string check_operands(const Configuration& c, const Operands& operands, DType values) {
  std::string problem = check_ranks(kWhere, operands);
  if (!problem.empty()) return problem;
  const bool update = c.mode == Mode::kUpdate, any = c.schedule == Schedule::kAny;
  OperandNeeds needs;
  needs.row = RowLayout(c).size;
  needs.update = update;
  needs.fill = update && any;
  needs.norm_scale = c.layer_norm;
  const auto expectations = common_expectations(c, operands, values, needs);
  problem = check_expected(kWhere, operands, expectations.data(), expectations.size());
  if (!problem.empty()) return problem;
  constexpr const char* kPerToken = "gates per token";
  const Refusal refusals[] = {{kFill, update && !any, "schedule \"aligned\""},
                              {kModulation, true, kPerToken},
                              {kPrevious, true, kPerToken},
                              {kPreviousGate, true, kPerToken},
                              {kInitialWeights, true, kPerToken}};
  problem = check_refused(kWhere, operands, refusals, std::size(refusals));
  if (problem.empty() && update) problem = check_whole_chunks(kWhere, c, operands);
  return problem.empty() ? check_aliasing(kWhere, operands) : problem;
}

std::string check_values(const Configuration& c, const Operands& operands) {
  std::string problem = check_indices(kWhere, operands, c.chunk_size);
  if (!problem.empty() || c.mode == Mode::kRead) return problem;
  problem = check_aligned_values(kWhere, c, operands);
  constexpr Gate kGates[] = {{kStepSize, 1}, {kMomentum, 1}, {kForgetGate, 1}};
  return problem.empty() ? check_gates(kWhere, operands, kGates, std::size(kGates)) : problem;
}

}  // namespace titans::kernels
