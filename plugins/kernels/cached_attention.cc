#include "plugins/kernels/cached_attention.h"

#include <algorithm>
#include <iterator>
#include <limits>

namespace titans::kernels::cached_attention {
namespace {

constexpr std::int64_t kTurn = std::int64_t{1} << 32;  // increments are fractions of it

std::string wrong_size(const std::string& what, const std::string& wanted, std::int64_t got) {
  return failure(kOperator, "E0706", "wrong shape of " + what + ": " + expected(wanted, std::to_string(got)),
                 "check the model's sizes");
}

std::string contradiction(const std::string& detail) {
  return failure(kOperator, "E0702", "contradicting attributes: " + detail, kExportAgain);
}

// The rows of the cache must be the persistent ones and rings of equal length, which hold all visible rows.
std::string check_rows(const Configuration& c, std::int64_t rows) {
  const std::int64_t in_rings = rows - c.persistent;
  if (in_rings >= c.groups * c.most_visible() && in_rings % c.groups == 0) return {};
  const std::string rings = c.groups == 1 ? "" : std::to_string(c.groups) + " times ";
  return wrong_size("keys",
                    std::to_string(c.persistent) + " persistent rows and " + rings + "at least " +
                        std::to_string(c.most_visible()) + " rows",
                    rows);
}

}  // namespace

std::string configure(const Attributes& attributes, Configuration& c) {
  std::string problem = decode_all(kAttributes, attributes, c);
  if (!problem.empty()) return problem;
  if (c.window == 0 && c.segment == 0) return contradiction("window or segment must be positive, got 0 and 0");
  if (c.origin == Origin::kSegment && c.segment == 0) {
    return contradiction("origin \"segment\" needs a positive segment, got 0");
  }
  return {};
}

std::string check_operands(const Configuration& c, const Operands& operands) {
  const Tensor &keys = operands[kKeys], &q = operands[kQ];
  std::string problem = check_rank(kOperator, "keys", keys, 4, "give (slots, heads, rows, width)");
  if (problem.empty()) problem = check_rank(kOperator, "q", q, 3, "give (streams, tokens, heads times width)");
  if (!problem.empty()) return problem;
  const auto& [pool, heads, rows, width] = keys.shape;
  const std::int64_t streams = q.shape[0], tokens = q.shape[1];
  const bool rotates = c.rotary != Rotary::kNone;
  if (heads != c.heads) return wrong_size("keys", std::to_string(c.heads) + " heads", heads);
  if (width < 1) return wrong_size("keys", "a width of at least 1", width);
  if (rotates && width % 2 != 0) return wrong_size("keys", "an even width for rotation", width);
  problem = check_rows(c, rows);
  if (!problem.empty()) return problem;
  if (!rotates && operands[kIncrements].present()) {
    return failure(kOperator, "E0704", "unexpected operand: increments with rotary \"none\"", "leave it out");
  }
  const std::array<std::int64_t, 4> cache{operands[kSlots].present() ? pool : streams, heads, rows, width},
      queries{streams, tokens, heads * width, 0}, new_rows{streams, c.groups * tokens, heads * width, 0},
      per_stream{streams, 0, 0, 0};
  constexpr DType kFloat = DType::kFloat32, kInteger = DType::kInt64;
  const Expectation expectations[] = {{kKeys, kFloat, cache, 4, true},
                                      {kValues, kFloat, cache, 4, true},
                                      {kQ, kFloat, queries, 3, true},
                                      {kK, kFloat, new_rows, 3, true},
                                      {kV, kFloat, new_rows, 3, true},
                                      {kPosition, kInteger, per_stream, 1, true},
                                      {kIncrements, kInteger, {width / 2, 0, 0, 0}, 1, rotates},
                                      {kValid, kInteger, per_stream, 1, false},
                                      {kSlots, kInteger, per_stream, 1, false},
                                      {kY, kFloat, queries, 3, true},
                                      {kKeysOut, kFloat, cache, 4, true},
                                      {kValuesOut, kFloat, cache, 4, true}};
  const OperandList list(operands, kOperandNames);
  problem = check_expected(kOperator, list, expectations, std::size(expectations));
  return problem.empty() ? check_overlaps(kOperator, list, kInputs, kInPlace.data(), kInPlace.size()) : problem;
}

std::string check_values(const Operands& operands) {
  const std::int64_t tokens = operands[kQ].shape[1];
  // The number of the row after the last one must not overflow.
  const std::int64_t positions = std::numeric_limits<std::int64_t>::max() - std::max<std::int64_t>(tokens, 1) + 1;
  std::string problem = check_range(kOperator, "position", operands[kPosition], positions, "stream");
  if (problem.empty()) problem = check_range(kOperator, "increments", operands[kIncrements], kTurn, "dimension");
  if (problem.empty()) problem = check_range(kOperator, "valid", operands[kValid], tokens + 1, "stream");
  return problem.empty() ? check_slots(kOperator, "slots", operands[kSlots], operands[kKeys].shape[0]) : problem;
}

}  // namespace titans::kernels::cached_attention
