#include "plugins/kernels/causal_convolution.h"

#include <iterator>

namespace titans::kernels::causal_convolution {

std::string configure(const Attributes& attributes, Configuration& configuration) {
  return decode_all(kAttributes, attributes, configuration);
}

std::string check_operands(const Operands& operands) {
  const Tensor &past = operands[kPast], &x = operands[kX], &weight = operands[kWeight];
  std::string problem = check_rank(kOperator, "past", past, 3, "give (slots, rows, channels)");
  if (problem.empty()) problem = check_rank(kOperator, "x", x, 3, "give (streams, tokens, channels)");
  if (problem.empty()) problem = check_rank(kOperator, "weight", weight, 2, "give (rows, channels)");
  if (!problem.empty()) return problem;
  const std::int64_t streams = x.shape[0], channels = x.shape[2], rows = weight.shape[0];
  if (rows < 2) {
    return failure(kOperator, "E0706", "wrong shape of weight: " + expected("at least 2 rows", std::to_string(rows)),
                   "check the model's sizes");
  }
  const std::array<std::int64_t, 4> pool{operands[kSlots].present() ? past.shape[0] : streams, rows - 1, channels, 0},
      per_stream{streams, 0, 0, 0};
  constexpr DType kFloat = DType::kFloat32, kInteger = DType::kInt64;
  const Expectation expectations[] = {{kPast, kFloat, pool, 3, true},
                                      {kX, kFloat, x.shape, 3, true},
                                      {kWeight, kFloat, {rows, channels, 0, 0}, 2, true},
                                      {kBias, kFloat, {channels, 0, 0, 0}, 1, false},
                                      {kValid, kInteger, per_stream, 1, false},
                                      {kSlots, kInteger, per_stream, 1, false},
                                      {kY, kFloat, x.shape, 3, true},
                                      {kPastOut, kFloat, pool, 3, true}};
  const OperandList list(operands, kOperandNames);
  problem = check_expected(kOperator, list, expectations, std::size(expectations));
  return problem.empty() ? check_overlaps(kOperator, list, kInputs, kInPlace.data(), kInPlace.size()) : problem;
}

std::string check_values(const Operands& operands) {
  std::string problem = check_range(kOperator, "valid", operands[kValid], operands[kX].shape[1] + 1, "stream");
  return problem.empty() ? check_slots(kOperator, "slots", operands[kSlots], operands[kPast].shape[0]) : problem;
}

}  // namespace titans::kernels::causal_convolution
