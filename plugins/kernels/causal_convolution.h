// The operator ai.titans::CausalConvolution: operands and checks. docs/convolution-operator.md is the specification;
// names, shapes and equations are from there.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "plugins/kernels/attribute_table.h"
#include "plugins/kernels/operands.h"

namespace titans::kernels::causal_convolution {

inline constexpr const char* kOperator = "CausalConvolution";

enum class Activation : std::uint8_t { kNone, kSilu };
inline constexpr std::array kActivations{"none", "silu"};

struct Attributes {
  std::string activation = "none";
};

struct Configuration {
  static constexpr const char* kOperator = causal_convolution::kOperator;
  using Attributes = causal_convolution::Attributes;

  Activation activation = Activation::kNone;  // of y
};

inline constexpr std::array kAttributes{
    Attribute<Attributes, Configuration>::row<&Attributes::activation, &Configuration::activation>(
        "activation", Presence::kOptional, one_of(kActivations))};
constexpr const auto& attribute_table(const Attributes& /*of*/) { return kAttributes; }

// The operator's inputs and outputs in order.
enum Operand : std::size_t {
  kPast,
  kX,
  kWeight,
  kBias,    // optional
  kValid,   // optional
  kSlots,   // optional
  kInputs,  // number of inputs
  kY = kInputs,
  kPastOut,
  kOperands
};

inline constexpr std::array<const char*, kOperands> kOperandNames{"past",  "x",     "weight", "bias",
                                                                  "valid", "slots", "y",      "past_out"};

inline constexpr std::array<InPlace, 1> kInPlace{InPlace{kPast, kPastOut}};

using Operands = std::array<Tensor, kOperands>;

// The checks return a formatted error (failure.h), or an empty string.

std::string configure(const Attributes& attributes, Configuration& configuration);
// Checks ranks, shapes, dtypes, layout, alignment and aliasing of the operands, without reading their values.
std::string check_operands(const Operands& operands);
// Checks the ranges of valid and slots. The operands have passed check_operands and are in host memory.
std::string check_values(const Operands& operands);

}  // namespace titans::kernels::causal_convolution
