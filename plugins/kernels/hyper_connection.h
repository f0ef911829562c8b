// The operator ai.titans::HyperConnection: operands and checks. docs/hyper-connection.md is the specification; names,
// shapes and equations are from there.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "plugins/kernels/memory_common.h"

namespace titans::kernels::hyper_connection {

inline constexpr const char* kOperator = "HyperConnection";
inline constexpr std::int64_t kMaxStreams = 16;
inline constexpr std::int64_t kDefaultIterations = 20;

// The operator's inputs and outputs in order.
enum Operand : std::size_t {
  kResiduals,
  kProjection,
  kBias,
  kBranch,  // optional, together with weight
  kWeight,
  kInputs,  // number of inputs
  kInput = kInputs,
  kResidualsOut,
  kBeta,  // optional, if the projection has its column
  kOperands
};

inline constexpr std::array<const char*, kOperands> kOperandNames{"residuals", "projection", "bias",          "branch",
                                                                  "weight",    "input",      "residuals_out", "beta"};

using Operands = std::array<Tensor, kOperands>;

// The checks return a formatted error (failure.h), or an empty string.

std::string check_iterations(std::int64_t iterations);
// Checks ranks, shapes, dtypes, layout, alignment and aliasing of the operands, without reading their values.
std::string check_operands(const Operands& operands);

}  // namespace titans::kernels::hyper_connection
