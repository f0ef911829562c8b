// The operator ai.titans::NeuralMemory as every kernel and adapter sees it: configuration, packed row, operands and the
// one check of them all. docs/operator.md is the contract; names, shapes and equations are its own.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace titans::kernels {

inline constexpr int kMaxDepth = 3;
inline constexpr int kMaxTensors = kMaxDepth + 1;  // the matrices, and the LayerNorm's scale where it is a fast weight

enum class Mode : std::uint8_t { kUpdate, kRead };
enum class Schedule : std::uint8_t { kAligned, kAny };
enum class Activation : std::uint8_t { kSilu, kGelu };
// How a packed row holds the weights and the surprise. Arithmetic is float32 in any case.
enum class MemoryDtype : std::uint8_t { kFloat32, kBFloat16, kFloat16, kInt8, kFp8 };
// How they are rounded to what the row can hold, at the end of each committed chunk.
enum class Rounding : std::uint8_t { kNearest, kStochastic, kErrorFeedback };
// Whether W moves with every token, or with every chunk and by the gates of the token that completes it.
enum class Gates : std::uint8_t { kToken, kChunk };
// Whether the LayerNorm's scale is given to each call, or part of W.
enum class NormWeight : std::uint8_t { kSlow, kFast };

// Elements along a matrix's last dimension that share a scale, with memory_dtype "int8" and "fp8".
inline constexpr std::int64_t kScaleBlock = 32;
// The largest value of each: what a block's largest is scaled to.
inline constexpr float kLargestInt8 = 127.0F, kLargestFp8 = 448.0F;
// A block whose largest value is below this is stored as zeros, so that no scale is subnormal.
inline constexpr float kSmallestBlock = 0x1p-100F;

constexpr bool has_scales(MemoryDtype memory_dtype) {
  return memory_dtype == MemoryDtype::kInt8 || memory_dtype == MemoryDtype::kFp8;
}
// 32-bit words of a matrix's elements, which come first, and of the whole field.
std::int64_t element_words(MemoryDtype memory_dtype, std::int64_t rows, std::int64_t columns);
std::int64_t memory_dtype_words(MemoryDtype memory_dtype, std::int64_t rows, std::int64_t columns);

// The node's attributes as they are written. `memory_dtype` and what follows it may be left out.
struct Attributes {
  std::string mode;
  std::string schedule;
  std::vector<std::int64_t> widths;
  std::string activation;
  std::int64_t residual = 0;
  std::int64_t layer_norm = 0;
  std::int64_t chunk_size = 0;
  std::string memory_dtype = "float32";
  std::string gates = "token";
  std::string rounding = "nearest";
  std::int64_t seed = 0;
  // Only with gates = "chunk".
  std::optional<std::int64_t> batch_size;  // left out: chunk_size
  float loss_scale = 1.0F;
  std::int64_t keys_per_token = 1;
  std::int64_t lookahead = 0;
  std::string norm_weight = "slow";
  std::int64_t momentum_order = 1;
  float grad_clamp = 0.0F;
  std::int64_t orthogonalise = 0;
};

inline constexpr std::array<std::string_view, 19> kAttributeNames{
    "mode",         "schedule",    "widths",         "activation", "residual",     "layer_norm", "chunk_size",
    "memory_dtype", "gates",       "rounding",       "seed",       "batch_size",   "loss_scale", "keys_per_token",
    "lookahead",    "norm_weight", "momentum_order", "grad_clamp", "orthogonalise"};

// The first of them, which have a meaning with any gates.
inline constexpr std::size_t kCommonAttributes = 11;

struct Configuration {
  Mode mode = Mode::kUpdate;
  Schedule schedule = Schedule::kAny;
  int depth = 1;
  std::array<std::int64_t, kMaxDepth + 1> widths{};  // depth + 1 of them
  Activation activation = Activation::kSilu;
  bool residual = false;
  bool layer_norm = false;
  std::int64_t chunk_size = 1;
  MemoryDtype memory_dtype = MemoryDtype::kFloat32;
  Gates gates = Gates::kToken;
  Rounding rounding = Rounding::kNearest;
  std::uint32_t seed = 0;
  std::int64_t batch_size = 1;  // 0: the gradient point never moves
  float loss_scale = 1.0F;
  std::int64_t keys_per_token = 1;
  bool lookahead = false;
  NormWeight norm_weight = NormWeight::kSlow;
  bool momentum = true;
  float grad_clamp = 0.0F;  // 0: off
  std::int64_t orthogonalise = 0;

  std::int64_t in(int layer) const { return widths[static_cast<std::size_t>(layer)]; }
  std::int64_t out(int layer) const { return widths[static_cast<std::size_t>(layer) + 1]; }
  std::int64_t weights(int layer) const { return in(layer) * out(layer); }

  bool fast_norm() const { return norm_weight == NormWeight::kFast; }
  // The weight tensors in their order: the matrices, then gamma. Elements of one, and of all.
  int tensors() const { return depth + (fast_norm() ? 1 : 0); }
  std::int64_t elements(int tensor) const { return tensor < depth ? weights(tensor) : widths[0]; }
  // Of its rows, which scales follow; gamma is one row.
  std::int64_t columns(int tensor) const { return tensor < depth ? out(tensor) : widths[0]; }
  std::int64_t rows(int tensor) const { return tensor < depth ? in(tensor) : 1; }
  std::int64_t all_elements() const;
  // 32-bit words of a tensor's field.
  std::int64_t words(int tensor) const { return memory_dtype_words(memory_dtype, rows(tensor), columns(tensor)); }

  // With gates = "chunk": keys of a chunk; whether the gradient point is another than W; what `fill` counts up to; the
  // most chunks that a call completes.
  std::int64_t keys() const { return chunk_size * keys_per_token; }
  bool keeps_point() const { return gates == Gates::kChunk && batch_size != chunk_size; }
  bool counts_batch() const { return keeps_point() && batch_size != 0; }
  std::int64_t period() const { return counts_batch() ? batch_size : chunk_size; }
  std::int64_t chunks(std::int64_t tokens) const { return (tokens + chunk_size - 1) / chunk_size; }
};

// Where the fields of a packed row lie, in 32-bit words from its start. Those of W, one after the other without gaps,
// and those of G, S and the rounding errors likewise.
struct RowLayout {
  std::array<std::int64_t, kMaxTensors> w{}, s{};
  std::array<std::int64_t, kMaxTensors> ew{}, es{};  // rounding = "error_feedback"
  std::int64_t chunk_updates = 0;                    // rounding = "stochastic"
  // gates = "token"
  std::array<std::int64_t, kMaxDepth> left{}, right{};
  std::int64_t e = 0, a = 0, m = 0, f = 0, beta = 0;
  // gates = "chunk"
  std::array<std::int64_t, kMaxTensors> g{};
  std::int64_t k = 0, v = 0, theta = 0;
  std::int64_t size = 0;

  explicit RowLayout(const Configuration& configuration);
};

enum class DType : std::uint8_t { kFloat32, kInt64, kBool, kFloat16, kBFloat16, kOther };

// A tensor that somebody else owns. An absent optional one has no data and rank -1.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int rank = -1;
  std::array<std::int64_t, 4> shape{};
  const std::int64_t* strides = nullptr;  // in elements; null: row-major without gaps

  bool present() const { return rank >= 0; }
  std::int64_t elements() const;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// The operator's inputs and outputs in their order. Mode "read" has state, q, y and perhaps slots and norm_scale;
// modulation, previous, previous_gate and before come with gates = "chunk".
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
  kInputs,  // how many inputs there are
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

// The checks return what is wrong, "[NeuralMemory] expected X but got Y; do Z", or nothing where all is well.

// The configuration that the attributes describe.
std::string configure(const Attributes& attributes, Configuration& configuration);
// Ranks, shapes, dtypes, layout, alignment and aliasing of the operands. Reads none of their values. `values` is the
// type that q, k, v and y shall have.
std::string check_operands(const Configuration& configuration, const Operands& operands,
                           DType values = DType::kFloat32);
// Ranges of fill, valid and slots, and that gates of tokens that count are finite. The operands, checked before, are in
// host memory.
std::string check_values(const Configuration& configuration, const Operands& operands);

}  // namespace titans::kernels
