// Checks of a call's operands that all operators share. Operands are an array of tensors, inputs before outputs.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "plugins/kernels/tensor.h"

namespace titans::kernels {

// The checks return a formatted error (failure.h), or an empty string. `where`: the operator's name.

// The required shape, dtype and presence of an operand.
struct Expectation {
  std::size_t which;
  DType dtype;
  std::array<std::int64_t, 4> shape;
  int rank;
  bool required;
};

// An output that may have the buffer of an input.
struct InPlace {
  std::size_t input, output;
};

// The operands of one call, for functions that are not templates.
struct OperandList {
  const Tensor* tensors;
  const char* const* names;
  std::size_t count;

  template <std::size_t kCount>
  OperandList(const std::array<Tensor, kCount>& operands, const std::array<const char*, kCount>& operand_names)
      : tensors(operands.data()), names(operand_names.data()), count(kCount) {}
};

std::string check_expected(const char* where, const OperandList& operands, const Expectation* all, std::size_t count);

// Checks that no output overlaps another operand, except a pair of `in_place` with one address.
std::string check_overlaps(const char* where, const OperandList& operands, std::size_t first_output,
                           const InPlace* in_place, std::size_t pairs);

// Checks that the int64 values of an operand are in [0, end). An absent operand passes. `of`: what has a value, such as
// "stream".
std::string check_range(const char* where, const char* name, const Tensor& values, std::int64_t end, const char* of);

// Checks that the slots of streams are in [0, pool) and distinct. An absent operand passes.
std::string check_slots(const char* where, const char* name, const Tensor& slots, std::int64_t pool);

}  // namespace titans::kernels
