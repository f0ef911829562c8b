// What adapters need of the operators with operands of fixed dtypes: the number and kind of operands, and the shapes of
// outputs.
#pragma once

#include <array>
#include <cstddef>

#include "plugins/kernels/cached_attention.h"
#include "plugins/kernels/causal_convolution.h"
#include "plugins/kernels/hyper_connection.h"

namespace titans::kernels {

struct AttentionContract {
  using Configuration = cached_attention::Configuration;
  using Operands = cached_attention::Operands;

  static constexpr const auto& kNames = cached_attention::kOperandNames;
  static constexpr std::size_t kInputs = cached_attention::kInputs, kOperands = cached_attention::kOperands;
  static constexpr auto kInPlace = cached_attention::kInPlace;
  static bool is_integer(std::size_t input) { return input >= cached_attention::kPosition; }
  static bool is_optional(std::size_t operand) { return operand >= cached_attention::kIncrements && operand < kInputs; }
  static Tensor output(const Operands& operands, std::size_t which) {
    return operands[which == cached_attention::kY         ? cached_attention::kQ
                    : which == cached_attention::kKeysOut ? cached_attention::kKeys
                                                          : cached_attention::kValues];
  }
};

struct ConvolutionContract {
  using Configuration = causal_convolution::Configuration;
  using Operands = causal_convolution::Operands;

  static constexpr const auto& kNames = causal_convolution::kOperandNames;
  static constexpr std::size_t kInputs = causal_convolution::kInputs, kOperands = causal_convolution::kOperands;
  static constexpr auto kInPlace = causal_convolution::kInPlace;
  static bool is_integer(std::size_t input) {
    return input == causal_convolution::kValid || input == causal_convolution::kSlots;
  }
  static bool is_optional(std::size_t operand) { return operand >= causal_convolution::kBias && operand < kInputs; }
  static Tensor output(const Operands& operands, std::size_t which) {
    return operands[which == causal_convolution::kY ? causal_convolution::kX : causal_convolution::kPast];
  }
};

struct ConnectionContract {
  using Configuration = hyper_connection::Configuration;
  using Operands = hyper_connection::Operands;

  static constexpr const auto& kNames = hyper_connection::kOperandNames;
  static constexpr std::size_t kInputs = hyper_connection::kInputs, kOperands = hyper_connection::kOperands;
  static constexpr std::array<InPlace, 0> kInPlace{};
  static bool is_integer(std::size_t /*input*/) { return false; }
  static bool is_optional(std::size_t operand) {
    return operand == hyper_connection::kBranch || operand == hyper_connection::kWeight ||
           operand == hyper_connection::kBeta;
  }
  static Tensor output(const Operands& operands, std::size_t which) {
    Tensor shape = operands[hyper_connection::kResiduals];
    if (shape.rank != 4) return {};
    if (which == hyper_connection::kResidualsOut) return shape;
    shape.rank = 3;
    if (which == hyper_connection::kInput) shape.shape[2] = shape.shape[3];
    return shape;
  }
};

}  // namespace titans::kernels
