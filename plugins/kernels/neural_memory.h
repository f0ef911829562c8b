// The operator ai.titans::NeuralMemory as every kernel and adapter sees it: configuration, packed row, operands and the
// one check of them all. docs/operator.md is the contract; names, shapes and equations are its own.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace titans::kernels {

inline constexpr int kMaxDepth = 3;

enum class Mode : std::uint8_t { kUpdate, kRead };
enum class Schedule : std::uint8_t { kAligned, kAny };
enum class Activation : std::uint8_t { kSilu, kGelu };
// How a packed row holds W and S. Arithmetic is float32 in any case.
enum class Storage : std::uint8_t { kFloat32, kBFloat16 };

// The node's attributes as they are written. `storage` may be left out.
struct Attributes {
  std::string mode;
  std::string schedule;
  std::vector<std::int64_t> widths;
  std::string activation;
  std::int64_t residual = 0;
  std::int64_t layer_norm = 0;
  std::int64_t chunk_size = 0;
  std::string storage = "float32";
};

inline constexpr std::array<std::string_view, 8> kAttributeNames{"mode",     "schedule",   "widths",     "activation",
                                                                 "residual", "layer_norm", "chunk_size", "storage"};

struct Configuration {
  Mode mode = Mode::kUpdate;
  Schedule schedule = Schedule::kAny;
  int depth = 1;
  std::array<std::int64_t, kMaxDepth + 1> widths{};  // depth + 1 of them
  Activation activation = Activation::kSilu;
  bool residual = false;
  bool layer_norm = false;
  std::int64_t chunk_size = 1;
  Storage storage = Storage::kFloat32;

  std::int64_t in(int layer) const { return widths[static_cast<std::size_t>(layer)]; }
  std::int64_t out(int layer) const { return widths[static_cast<std::size_t>(layer) + 1]; }
  std::int64_t weights(int layer) const { return in(layer) * out(layer); }
};

// Where the fields of a packed row lie, in 32-bit words from its start.
struct RowLayout {
  std::array<std::int64_t, kMaxDepth> w{}, s{}, left{}, right{};
  std::int64_t e = 0, a = 0, m = 0, f = 0, beta = 0;
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

// The operator's inputs and outputs in their order. Mode "read" has state, q, y and perhaps slots and norm_scale.
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
  kInputs,  // how many inputs there are
  kY = kInputs,
  kStateOut,
  kStats,  // optional
  kOperands
};

inline constexpr std::array<const char*, kOperands> kOperandNames{
    "state",       "q",    "k",         "v",     "step_size", "momentum",
    "forget_gate", "fill", "learn",     "valid", "slots",     "update_limit",
    "norm_scale",  "y",    "state_out", "stats"};

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
