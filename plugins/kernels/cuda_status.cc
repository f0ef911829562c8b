#include "plugins/kernels/cuda_status.h"

#include "plugins/kernels/cached_attention.h"
#include "plugins/kernels/causal_convolution.h"
#include "plugins/kernels/chunk_neural_memory.h"
#include "plugins/kernels/neural_memory.h"

namespace titans::kernels {
namespace {

struct Operator {
  const char* name;
  const char* const* operands;
  std::size_t count;
};

template <std::size_t kCount>
constexpr Operator of(const char* name, const std::array<const char*, kCount>& operands, std::size_t inputs) {
  return {name, operands.data(), inputs};
}

// In the order of StatusOf.
constexpr std::array kOperators{
    of(Configuration::kOperator, kOperandNames, kInputs), of(ChunkConfiguration::kOperator, kOperandNames, kInputs),
    of(cached_attention::kOperator, cached_attention::kOperandNames, cached_attention::kInputs),
    of(causal_convolution::kOperator, causal_convolution::kOperandNames, causal_convolution::kInputs)};

bool is_gate(StatusOf op, std::size_t operand) {
  if (op != StatusOf::kNeuralMemory && op != StatusOf::kChunkNeuralMemory) return false;
  return (operand >= kStepSize && operand <= kForgetGate) || operand == kModulation || operand == kPreviousGate;
}

}  // namespace

std::string status_message(std::int32_t status) {
  if (status == 0) return {};
  const auto index = static_cast<std::size_t>((status - 1) / kStatusOperands);
  const auto operand = static_cast<std::size_t>((status - 1) % kStatusOperands);
  const Operator& op = kOperators[index < kOperators.size() && status > 0 ? index : 0];
  const bool known = status > 0 && index < kOperators.size() && operand < op.count;
  const std::string name = known ? op.operands[operand] : "status " + std::to_string(status);
  const std::string detail = name + " of a stream, whose state is unchanged";
  if (known && is_gate(static_cast<StatusOf>(index), operand)) {
    return failure(op.name, "E0710", "gate not finite: " + detail,
                   "look for an overflow in the model before the memory");
  }
  return failure(op.name, "E0709", "value out of range: " + detail, "correct it");
}

}  // namespace titans::kernels
