// The operator ai.titans::NeuralMemory, with gates per token: attributes, configuration, packed row and checks.
// docs/operator.md is the specification; names, shapes and equations are from there.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "plugins/kernels/memory_common.h"

namespace titans::kernels {

enum class Mode : std::uint8_t { kUpdate, kRead };
inline constexpr std::array kModes{"update", "read"};

struct Attributes : MemoryAttributes {
  std::string mode;
};

struct Configuration : MemoryConfiguration {
  static constexpr const char* kOperator = "NeuralMemory";
  static constexpr std::size_t kInputCount = kModulation, kOutputCount = kInitialWeights - kY;
  using Attributes = kernels::Attributes;

  Mode mode = Mode::kUpdate;
};

inline constexpr auto kAttributes =
    join(std::array{Attribute<Attributes, Configuration>::row<&Attributes::mode, &Configuration::mode>(
             "mode", Presence::kRequired, one_of(kModes))},
         memory_attribute_rows<Attributes, Configuration>());
constexpr const auto& attribute_table(const Attributes& /*of*/) { return kAttributes; }

struct RowLayout : WeightLayout {
  // The open chunk: each layer's inputs and the loss's gradients at its outputs.
  std::array<std::int64_t, kMaxDepth> layer_input{}, output_grad{};
  std::int64_t e = 0, a = 0, m = 0, f = 0, beta = 0;

  explicit RowLayout(const Configuration& configuration);
};

// The checks return a formatted error (failure.h), or an empty string.

std::string configure(const Attributes& attributes, Configuration& configuration);
// Checks ranks, shapes, dtypes, layout, alignment and aliasing of the operands, without reading their values. `values`:
// the dtype that q, k, v and y must have.
std::string check_operands(const Configuration& configuration, const Operands& operands,
                           DType values = DType::kFloat32);
// Checks the ranges of fill, valid and slots, and that the gates of valid tokens are finite. The operands have passed
// check_operands and are in host memory.
std::string check_values(const Configuration& configuration, const Operands& operands);

}  // namespace titans::kernels
