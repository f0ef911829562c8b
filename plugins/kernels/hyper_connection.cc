#include "plugins/kernels/hyper_connection.h"

#include <iterator>

namespace titans::kernels::hyper_connection {
namespace {

std::string wrong_size(const std::string& what, const std::string& wanted, std::int64_t got, const char* fix) {
  return failure(kOperator, "E0706", "wrong shape of " + what + ": " + expected(wanted, std::to_string(got)), fix);
}

}  // namespace

std::string configure(const Attributes& attributes, Configuration& configuration) {
  return decode_all(kAttributes, attributes, configuration);
}

std::string check_operands(const Operands& operands) {
  const Tensor& residuals = operands[kResiduals];
  const Tensor& projection = operands[kProjection];
  std::string rank = check_rank(kOperator, "residuals", residuals, 4, "give (batch, tokens, streams, width)");
  if (rank.empty()) rank = check_rank(kOperator, "projection", projection, 2, "give (width, columns)");
  if (!rank.empty()) return rank;
  const std::int64_t batch = residuals.shape[0], tokens = residuals.shape[1], streams = residuals.shape[2],
                     width = residuals.shape[3];
  if (streams < 1 || streams > kMaxStreams) {
    return wrong_size("residuals", "1 to " + std::to_string(kMaxStreams) + " streams", streams,
                      "run the model with memory_kernel=\"off\"");
  }
  if (width < 1) return wrong_size("residuals", "a width of at least 1", width, "check the model's width");
  const std::int64_t columns = projection.shape[1];
  if (columns != streams + 1 && columns != streams + 2) {
    return wrong_size("projection",
                      std::to_string(streams + 1) + " columns, or " + std::to_string(streams + 2) + " with beta",
                      columns, kExportAgain);
  }
  if (operands[kBranch].present() != operands[kWeight].present()) {
    const bool has_branch = operands[kBranch].present();
    return failure(kOperator, "E0703", std::string("missing operand: ") + (has_branch ? "weight" : "branch"),
                   "connect branch and weight, or neither");
  }
  if (operands[kBeta].present() && columns == streams + 1) {
    return wrong_size("projection", std::to_string(streams + 2) + " columns for output beta", columns,
                      "leave out beta");
  }
  const std::array<std::int64_t, 4> all{batch, tokens, streams, width}, rows{batch, tokens, width, 0},
      weights{batch, tokens, streams, 0};
  constexpr DType kFloat = DType::kFloat32;
  const Expectation expectations[] = {{kResiduals, kFloat, all, 4, true},
                                      {kProjection, kFloat, {width, columns, 0, 0}, 2, true},
                                      {kBias, kFloat, {streams, columns, 0, 0}, 2, true},
                                      {kBranch, kFloat, rows, 3, false},
                                      {kWeight, kFloat, weights, 3, false},
                                      {kInput, kFloat, rows, 3, true},
                                      {kResidualsOut, kFloat, all, 4, true},
                                      {kBeta, kFloat, weights, 3, false}};
  const OperandList list(operands, kOperandNames);
  std::string problem = check_expected(kOperator, list, expectations, std::size(expectations));
  return problem.empty() ? check_overlaps(kOperator, list, kInputs, nullptr, 0) : problem;
}

}  // namespace titans::kernels::hyper_connection
