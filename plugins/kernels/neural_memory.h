// The operator ai.titans::NeuralMemory, whose gates are per token: attributes, configuration, packed row and checks.
// docs/operator.md is the contract; names, shapes and equations are from there.
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
  // Of the open chunk: each layer's inputs and the loss's gradient at its output.
  std::array<std::int64_t, kMaxDepth> layer_input{}, output_grad{};
  std::int64_t e = 0, a = 0, m = 0, f = 0, beta = 0;

  explicit RowLayout(const Configuration& configuration);
};

// The checks return an error as failure.h has it, or an empty string.

std::string configure(const Attributes& attributes, Configuration& configuration);
// Ranks, shapes, dtypes, layout, alignment and aliasing of the operands. Reads none of their values. `values` is the
// dtype that q, k, v and y must have.
std::string check_operands(const Configuration& configuration, const Operands& operands,
                           DType values = DType::kFloat32);
// Ranges of fill, valid and slots, and that gates of tokens that count are finite. The operands, checked before, are in
// host memory.
std::string check_values(const Configuration& configuration, const Operands& operands);

}  // namespace titans::kernels
