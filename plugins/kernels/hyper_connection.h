// The operator ai.titans::HyperConnection: attributes, operands and checks. docs/hyper-connection.md is the
// specification; names, shapes and equations are from there.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "plugins/kernels/attribute_table.h"
#include "plugins/kernels/operands.h"

namespace titans::kernels::hyper_connection {

inline constexpr const char* kOperator = "HyperConnection";
inline constexpr std::int64_t kMaxStreams = 16;
inline constexpr std::int64_t kMostIterations = 1000;

struct Attributes {
  std::int64_t iterations = 20;
};

struct Configuration {
  static constexpr const char* kOperator = hyper_connection::kOperator;
  using Attributes = hyper_connection::Attributes;

  std::int64_t iterations = 20;  // of Sinkhorn's algorithm
};

inline constexpr std::array kAttributes{
    Attribute<Attributes, Configuration>::row<&Attributes::iterations, &Configuration::iterations>(
        "iterations", Presence::kOptional, between(1, kMostIterations))};
constexpr const auto& attribute_table(const Attributes& /*of*/) { return kAttributes; }

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

std::string configure(const Attributes& attributes, Configuration& configuration);
// Checks ranks, shapes, dtypes, layout, alignment and aliasing of the operands, without reading their values.
std::string check_operands(const Operands& operands);

}  // namespace titans::kernels::hyper_connection
