#include "plugins/kernels/hyper_connection.h"

#include <algorithm>

namespace titans::kernels::hyper_connection {
namespace {

constexpr std::int64_t kLargestIterations = 1000;

struct Expectation {
  Operand which;
  std::array<std::int64_t, 4> shape;
  int rank;
  bool required;
};

std::string wrong(const std::string& expected, const std::string& got, const std::string& advice) {
  return "[HyperConnection] expected " + expected + " but got " + got + "; do " + advice;
}

std::string list(const std::int64_t* values, std::size_t count) {
  std::string out = "(";
  for (std::size_t i = 0; i < count; ++i) out += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  return out + ")";
}

std::string check_one(const Tensor& tensor, const Expectation& expected) {
  const std::string name = kOperandNames[expected.which];
  if (!tensor.present()) return expected.required ? wrong("operand " + name, "none", "connect it") : std::string();
  if (tensor.dtype != DType::kFloat32) return wrong(name + " of float32", "another type", "cast it");
  const auto rank = static_cast<std::size_t>(expected.rank);
  if (tensor.rank != expected.rank) {
    return wrong(name + " of rank " + std::to_string(rank), "rank " + std::to_string(tensor.rank), "reshape it");
  }
  if (!std::equal(expected.shape.begin(), expected.shape.begin() + expected.rank, tensor.shape.begin())) {
    return wrong(name + " of shape " + list(expected.shape.data(), rank), list(tensor.shape.data(), rank),
                 "check the model's streams and width");
  }
  if (tensor.strides != nullptr && tensor.elements() > 0) {
    std::int64_t step = 1;
    for (std::size_t i = rank; i-- > 0;) {
      if (tensor.shape[i] != 1 && tensor.strides[i] != step) {
        return wrong(name + " row-major without gaps", "strides " + list(tensor.strides, rank), "copy it");
      }
      step *= tensor.shape[i];
    }
  }
  if (tensor.elements() > 0 && tensor.data == nullptr) return wrong(name + " in memory", "NULL", "bind a buffer");
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % sizeof(float) != 0) {
    return wrong(name + " aligned to 4 bytes", "an address between", "allocate it as an array of its type");
  }
  return {};
}

// Whether two tensors share a byte.
bool overlap(const Tensor& a, const Tensor& b) {
  const auto begin = [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.data); };
  const auto bytes = [](const Tensor& t) { return static_cast<std::uintptr_t>(t.elements()) * sizeof(float); };
  if (!a.present() || !b.present() || bytes(a) == 0 || bytes(b) == 0) return false;
  return begin(a) < begin(b) + bytes(b) && begin(b) < begin(a) + bytes(a);
}

}  // namespace

std::string check_iterations(std::int64_t iterations) {
  if (iterations >= 1 && iterations <= kLargestIterations) return {};
  return wrong("attribute iterations in [1, " + std::to_string(kLargestIterations) + "]", std::to_string(iterations),
               "export the model again");
}

std::string check_operands(const Operands& operands) {
  const Tensor& residuals = operands[kResiduals];
  const Tensor& projection = operands[kProjection];
  if (residuals.rank != 4) {
    return wrong("residuals of rank 4", "rank " + std::to_string(residuals.rank),
                 "give (batch, tokens, streams, width)");
  }
  const std::int64_t batch = residuals.shape[0], tokens = residuals.shape[1], streams = residuals.shape[2],
                     width = residuals.shape[3];
  if (streams < 1 || streams > kMaxStreams) {
    return wrong("1 to " + std::to_string(kMaxStreams) + " streams", std::to_string(streams),
                 "run the model with memory_kernel=\"off\"");
  }
  if (width < 1) return wrong("residuals of a width of at least 1", std::to_string(width), "check the model's width");
  if (projection.rank != 2) {
    return wrong("projection of rank 2", "rank " + std::to_string(projection.rank), "give (width, columns)");
  }
  const std::int64_t columns = projection.shape[1];
  if (columns != streams + 1 && columns != streams + 2) {
    return wrong(
        "projection of " + std::to_string(streams + 1) + " columns, or " + std::to_string(streams + 2) + " with beta",
        std::to_string(columns), "export the model again");
  }
  if (operands[kBranch].present() != operands[kWeight].present()) {
    const bool has_branch = operands[kBranch].present();
    return wrong(has_branch ? "weight with branch" : "branch with weight", "none", "give both or neither");
  }
  if (operands[kBeta].present() && columns == streams + 1) {
    return wrong("projection of " + std::to_string(streams + 2) + " columns for output beta", std::to_string(columns),
                 "leave out beta");
  }
  const std::array<std::int64_t, 4> all{batch, tokens, streams, width}, rows{batch, tokens, width, 0},
      weights{batch, tokens, streams, 0};
  const Expectation expectations[] = {{kResiduals, all, 4, true},
                                      {kProjection, {width, columns, 0, 0}, 2, true},
                                      {kBias, {streams, columns, 0, 0}, 2, true},
                                      {kBranch, rows, 3, false},
                                      {kWeight, weights, 3, false},
                                      {kInput, rows, 3, true},
                                      {kResidualsOut, all, 4, true},
                                      {kBeta, weights, 3, false}};
  for (const Expectation& expectation : expectations) {
    std::string problem = check_one(operands[expectation.which], expectation);
    if (!problem.empty()) return problem;
  }
  for (std::size_t out = kInputs; out < kOperands; ++out) {
    for (std::size_t other = 0; other < out; ++other) {
      if (!overlap(operands[out], operands[other])) continue;
      return wrong(std::string(kOperandNames[out]) + " in memory of its own",
                   std::string("memory that ") + kOperandNames[other] + " uses too", "bind another buffer");
    }
  }
  return {};
}

}  // namespace titans::kernels::hyper_connection
