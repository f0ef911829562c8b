// The operator ai.titans::HyperConnection: its operands and the one check of them. docs/hyper-connection.md is the
// contract; names, shapes and equations are its own.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "plugins/kernels/neural_memory.h"

namespace titans::kernels::hyper_connection {

inline constexpr std::int64_t kMaxStreams = 16;
inline constexpr std::int64_t kDefaultIterations = 20;

// The operator's inputs and outputs in their order.
enum Operand : std::size_t {
  kResiduals,
  kProjection,
  kBias,
  kBranch,  // optional, with weight
  kWeight,
  kInputs,  // how many inputs there are
  kInput = kInputs,
  kResidualsOut,
  kBeta,  // where the projection gives it, and somebody wants it
  kOperands
};

inline constexpr std::array<const char*, kOperands> kOperandNames{"residuals", "projection", "bias",          "branch",
                                                                  "weight",    "input",      "residuals_out", "beta"};

using Operands = std::array<Tensor, kOperands>;

// The checks return what is wrong, "[HyperConnection] expected X but got Y; do Z", or nothing where all is well.

std::string check_iterations(std::int64_t iterations);
// Ranks, shapes, dtypes, layout, alignment and aliasing of the operands. Reads none of their values.
std::string check_operands(const Operands& operands);

}  // namespace titans::kernels::hyper_connection
