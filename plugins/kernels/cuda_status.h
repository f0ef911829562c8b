// The status word in which a CUDA kernel reports an invalid value of an operand. All operators share one encoding, so
// the calls of a graph can share one word.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "plugins/kernels/rounding.h"

namespace titans::kernels {

enum class StatusOf : std::int32_t { kNeuralMemory, kChunkNeuralMemory, kCachedAttention, kCausalConvolution };

inline constexpr std::int32_t kStatusOperands = 64;  // codes per operator

// The status of an invalid operand. 0 is the status of a call without one.
TITANS_BOTH constexpr std::int32_t status_word(StatusOf op, std::size_t operand) {
  return static_cast<std::int32_t>(op) * kStatusOperands + 1 + static_cast<std::int32_t>(operand);
}

// The error of a status word, or an empty string for 0.
std::string status_message(std::int32_t status);

}  // namespace titans::kernels
