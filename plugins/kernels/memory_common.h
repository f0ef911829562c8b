// The common core of the two memory operators: ai.titans::NeuralMemory (gates per token, neural_memory.h) and
// ai.titans::ChunkNeuralMemory (gates per chunk, chunk_neural_memory.h). It has the common attributes and sizes, the
// weight fields of a packed row, the operands and their checks. docs/operator.md is the specification.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "plugins/kernels/attribute_table.h"
#include "plugins/kernels/operands.h"
#include "plugins/kernels/tensor.h"

namespace titans::kernels {

inline constexpr int kMaxDepth = 3;
inline constexpr int kMaxTensors = kMaxDepth + 1;  // the matrices, and the LayerNorm's scale if it is a fast weight

enum class Schedule : std::uint8_t { kAligned, kAny };
enum class Activation : std::uint8_t { kSilu, kGelu };
// The dtype of weights and surprise in a packed row. Arithmetic is always float32.
enum class MemoryDtype : std::uint8_t { kFloat32, kBFloat16, kFloat16, kInt8, kFp8 };
// The rounding of weights and surprise to the memory dtype at the end of each committed chunk.
enum class Rounding : std::uint8_t { kNearest, kStochastic, kErrorFeedback };

inline constexpr std::array kSchedules{"aligned", "any"};
inline constexpr std::array kActivations{"silu", "gelu"};
inline constexpr std::array kMemoryDtypes{"float32", "bfloat16", "float16", "int8", "fp8"};
inline constexpr std::array kRoundings{"nearest", "stochastic", "error_feedback"};

inline constexpr std::int64_t kLargestWidth = 1 << 20;  // keeps every size far from overflow
inline constexpr std::int64_t kLargestChunk = 1 << 20;
inline constexpr std::int64_t kLargestSeed = 0xFFFFFFFF;

// Consecutive elements of a matrix row that share a scale, with memory dtype "int8" or "fp8".
inline constexpr std::int64_t kScaleBlock = 32;
// The largest value of each dtype. A block's largest element is scaled to it.
inline constexpr float kLargestInt8 = 127.0F, kLargestFp8 = 448.0F;
// A block whose largest magnitude is smaller is stored as zeros, so that no scale is subnormal.
inline constexpr float kSmallestBlock = 0x1p-100F;

constexpr bool has_scales(MemoryDtype memory_dtype) {
  return memory_dtype == MemoryDtype::kInt8 || memory_dtype == MemoryDtype::kFp8;
}
// 32-bit words of a matrix's elements, and of the whole field. The elements come first in the field.
std::int64_t element_words(MemoryDtype memory_dtype, std::int64_t rows, std::int64_t columns);
std::int64_t memory_dtype_words(MemoryDtype memory_dtype, std::int64_t rows, std::int64_t columns);

// ---- attributes ----

// The raw attributes of both operators, as a node has them.
struct MemoryAttributes {
  std::string schedule;
  std::vector<std::int64_t> widths;
  std::string activation;
  std::int64_t residual = 0;
  std::int64_t layer_norm = 0;
  std::int64_t chunk_size = 0;
  std::string memory_dtype = "float32";
  std::string rounding = "nearest";
  std::int64_t seed = 0;
};

// The decoded attributes.
struct MemoryConfiguration {
  Schedule schedule = Schedule::kAny;
  int depth = 1;
  std::array<std::int64_t, kMaxDepth + 1> widths{};  // depth + 1 values
  Activation activation = Activation::kSilu;
  bool residual = false;
  bool layer_norm = false;
  std::int64_t chunk_size = 1;
  MemoryDtype memory_dtype = MemoryDtype::kFloat32;
  Rounding rounding = Rounding::kNearest;
  std::uint32_t seed = 0;

  std::int64_t in(int layer) const { return widths[static_cast<std::size_t>(layer)]; }
  std::int64_t out(int layer) const { return widths[static_cast<std::size_t>(layer) + 1]; }
  std::int64_t weights(int layer) const { return in(layer) * out(layer); }

  // The weight tensors in order: the matrices, then gamma if it is a fast weight. Gamma is one row.
  std::int64_t elements(int tensor) const { return tensor < depth ? weights(tensor) : widths[0]; }
  std::int64_t columns(int tensor) const { return tensor < depth ? out(tensor) : widths[0]; }
  std::int64_t rows(int tensor) const { return tensor < depth ? in(tensor) : 1; }
  // 32-bit words of a tensor's field.
  std::int64_t words(int tensor) const { return memory_dtype_words(memory_dtype, rows(tensor), columns(tensor)); }
};

// The rows that both operators' tables share.
template <class Attributes, class Configuration>
constexpr auto memory_attribute_rows() {
  using Row = Attribute<Attributes, Configuration>;
  using A = MemoryAttributes;
  using C = MemoryConfiguration;
  constexpr Presence kRequired = Presence::kRequired, kOptional = Presence::kOptional;
  return std::array{
      Row::template row<&A::schedule, &C::schedule>("schedule", kRequired, one_of(kSchedules)),
      Row::template row<&A::widths, &C::widths>("widths", kRequired, up_to(kMaxDepth + 1, 1, kLargestWidth)),
      Row::template row<&A::activation, &C::activation>("activation", kRequired, one_of(kActivations)),
      Row::template row<&A::residual, &C::residual>("residual", kOptional, flag()),
      Row::template row<&A::layer_norm, &C::layer_norm>("layer_norm", kOptional, flag()),
      Row::template row<&A::chunk_size, &C::chunk_size>("chunk_size", kRequired, between(1, kLargestChunk)),
      Row::template row<&A::memory_dtype, &C::memory_dtype>("memory_dtype", kOptional, one_of(kMemoryDtypes)),
      Row::template row<&A::rounding, &C::rounding>("rounding", kOptional, one_of(kRoundings)),
      Row::template row<&A::seed, &C::seed>("seed", kOptional, between(0, kLargestSeed))};
}

// Checks common attributes that depend on each other. Call it after decode_all(). Sets `depth`.
std::string finish_memory(const char* where, const MemoryAttributes& attributes, MemoryConfiguration& configuration);

// ---- the packed row ----

// Offsets of the fields of a packed row, in 32-bit words from its start. The fields of W are contiguous, and so are
// those of S and of their rounding errors.
struct WeightLayout {
  std::array<std::int64_t, kMaxTensors> w{}, s{};
  std::array<std::int64_t, kMaxTensors> ew{}, es{};  // rounding "error_feedback"
  std::int64_t chunk_updates = 0;                    // rounding "stochastic"
  std::int64_t size = 0;

 protected:
  using Tensors = std::array<std::int64_t, kMaxTensors>;
  void place(std::int64_t& offset, std::int64_t words) {
    offset = size;
    size += words;
  }
  void place_tensors(const MemoryConfiguration& c, int tensors, Tensors& field);
  // Adds the last field, and padding to a multiple of 16 words.
  void finish(const MemoryConfiguration& c);
};

// ---- operands ----

// The inputs and outputs of both operators in order. NeuralMemory has the first 13 inputs and the first 3 outputs,
// ChunkNeuralMemory has all.
enum Operand : std::size_t {
  kState,
  kQ,
  kK,
  kV,
  kStepSize,
  kMomentum,
  kForgetGate,
  kFill,
  kLearn,
  kValid,
  kSlots,
  kUpdateLimit,
  kNormScale,
  kModulation,
  kPrevious,
  kPreviousGate,
  kInputs,  // number of inputs
  kY = kInputs,
  kStateOut,
  kStats,           // optional
  kInitialWeights,  // optional
  kOperands
};

inline constexpr std::array<const char*, kOperands> kOperandNames{
    "state",      "q",          "k",           "v",
    "step_size",  "momentum",   "forget_gate", "fill",
    "learn",      "valid",      "slots",       "update_limit",
    "norm_scale", "modulation", "previous",    "previous_gate",
    "y",          "state_out",  "stats",       "initial_weights"};

using Operands = std::array<Tensor, kOperands>;

// The number of stats: surprise, update_norm, committed, rejected.
inline constexpr std::int64_t kStatCount = 4;

// The checks return a formatted error (failure.h), or an empty string.

// An operand that must be absent if `refused`.
struct Refusal {
  Operand which;
  bool refused;
  const char* reason;
};

// Inputs of the common expectations beside the sizes of q and state.
struct OperandNeeds {
  std::int64_t row;  // words of a packed row
  std::int64_t keys_per_token = 1;
  bool update = true, momentum = true, fill = false, norm_scale = false;
};
inline constexpr std::size_t kCommonOperands = 16;

std::string check_ranks(const char* where, const Operands& operands);
std::array<Expectation, kCommonOperands> common_expectations(const MemoryConfiguration& c, const Operands& operands,
                                                             DType values, const OperandNeeds& needs);
inline std::string check_expected(const char* where, const Operands& operands, const Expectation* all,
                                  std::size_t count) {
  return check_expected(where, OperandList(operands, kOperandNames), all, count);
}
std::string check_refused(const char* where, const Operands& operands, const Refusal* all, std::size_t count);
// With schedule "aligned", a call has whole chunks.
std::string check_whole_chunks(const char* where, const MemoryConfiguration& c, const Operands& operands);
std::string check_aliasing(const char* where, const Operands& operands);

// Checks the ranges of fill (below `period`), valid and slots, which are in host memory.
std::string check_indices(const char* where, const Operands& operands, std::int64_t period);
// With schedule "aligned", checks that fill and valid are whole chunks.
std::string check_aligned_values(const char* where, const MemoryConfiguration& c, const Operands& operands);
// Checks that a gate's values are finite for valid tokens. Each token has `per_token` values.
struct Gate {
  Operand which;
  std::int64_t per_token;
};
std::string check_gates(const char* where, const Operands& operands, const Gate* gates, std::size_t count);

}  // namespace titans::kernels
