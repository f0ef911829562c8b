#include "plugins/kernels/neural_memory.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

namespace titans::kernels {
namespace {

constexpr std::int64_t kRowAlignment = 16;       // words: a head's row starts on a cache line
constexpr std::int64_t kLargestWidth = 1 << 20;  // keeps every size far from overflow
constexpr std::int64_t kLargestChunk = 1 << 20;
constexpr std::int64_t kLargestBatch = std::int64_t{1} << 40;
constexpr std::int64_t kMostSteps = 100;  // of Newton-Schulz
constexpr std::int64_t kLargestSeed = 0xFFFFFFFF;

std::string wrong(const std::string& expected, const std::string& got, const std::string& advice) {
  return "[NeuralMemory] expected " + expected + " but got " + got + "; do " + advice;
}

// ---- attributes ----

template <typename Enum, std::size_t kCount>
std::string choose(const std::string& name, const std::string& value, const std::array<const char*, kCount>& names,
                   Enum& chosen) {
  for (std::size_t i = 0; i < kCount; ++i) {
    if (value == names[i]) {
      chosen = static_cast<Enum>(i);
      return {};
    }
  }
  std::string all;
  for (const char* each : names) all += (all.empty() ? "\"" : " or \"") + std::string(each) + "\"";
  return wrong("attribute " + name + " to be " + all, "\"" + value + "\"", "export the model again");
}

std::string flag(const std::string& name, std::int64_t value, bool& chosen) {
  chosen = value == 1;
  if (value == 0 || value == 1) return {};
  return wrong("attribute " + name + " to be 0 or 1", std::to_string(value), "export the model again");
}

std::string whole(const std::string& name, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value >= least && value <= most) return {};
  return wrong("attribute " + name + " in [" + std::to_string(least) + ", " + std::to_string(most) + "]",
               std::to_string(value), "export the model again");
}

// `zero`: whether it may be 0.
std::string real(const std::string& name, float value, bool zero) {
  if (std::isfinite(value) && (zero ? value >= 0.0F : value > 0.0F)) return {};
  return wrong("attribute " + name + " to be finite and " + (zero ? "at least" : "above") + " 0", std::to_string(value),
               "export the model again");
}

// What only gates = "chunk" has, for a configuration that has it.
std::string configure_chunk(const Attributes& attributes, Configuration& c) {
  bool order = true;
  for (const std::string& problem :
       {whole("keys_per_token", attributes.keys_per_token, 1, kLargestChunk / c.chunk_size),
        flag("lookahead", attributes.lookahead, c.lookahead), flag("momentum_order", attributes.momentum_order, order),
        whole("orthogonalise", attributes.orthogonalise, 0, kMostSteps),
        real("loss_scale", attributes.loss_scale, false), real("grad_clamp", attributes.grad_clamp, true),
        choose("norm_weight", attributes.norm_weight, std::array{"slow", "fast"}, c.norm_weight)}) {
    if (!problem.empty()) return problem;
  }
  c.batch_size = attributes.batch_size.value_or(c.chunk_size);
  if (c.batch_size < 0 || c.batch_size > kLargestBatch || c.batch_size % c.chunk_size != 0) {
    return wrong("attribute batch_size to be 0 or a multiple of chunk_size, " + std::to_string(c.chunk_size) +
                     ", up to " + std::to_string(kLargestBatch),
                 std::to_string(c.batch_size), "export the model again");
  }
  if (c.fast_norm() && !c.layer_norm) {
    return wrong("attribute layer_norm to be 1 with norm_weight \"fast\"", "0", "export the model again");
  }
  c.keys_per_token = attributes.keys_per_token;
  c.momentum = order;
  c.loss_scale = attributes.loss_scale;
  c.grad_clamp = attributes.grad_clamp;
  c.orthogonalise = attributes.orthogonalise;
  return {};
}

// For a configuration without: an attribute that would be ignored is a mistake.
std::string check_no_chunk(const Attributes& attributes, Configuration& c) {
  const Attributes none;
  c.batch_size = c.chunk_size;
  const std::pair<const char*, bool> given[] = {
      {"batch_size", attributes.batch_size.value_or(c.chunk_size) != c.chunk_size},
      {"loss_scale", attributes.loss_scale != none.loss_scale},
      {"keys_per_token", attributes.keys_per_token != none.keys_per_token},
      {"lookahead", attributes.lookahead != none.lookahead},
      {"norm_weight", attributes.norm_weight != none.norm_weight},
      {"momentum_order", attributes.momentum_order != none.momentum_order},
      {"grad_clamp", attributes.grad_clamp != none.grad_clamp},
      {"orthogonalise", attributes.orthogonalise != none.orthogonalise}};
  for (const auto& [name, is_given] : given) {
    if (!is_given) continue;
    return wrong("attribute " + std::string(name) + " to be left out with gates \"token\"",
                 "another value than its default", "export the model again");
  }
  return {};
}

std::string list(const std::int64_t* values, std::size_t count) {
  std::string out = "(";
  for (std::size_t i = 0; i < count; ++i) out += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  return out + ")";
}

// ---- operands ----

struct Expectation {
  Operand which;
  DType dtype;
  std::array<std::int64_t, 4> shape;
  int rank;
  bool required;
};

constexpr std::array<const char*, 6> kDTypeNames{"float32", "int64", "bool", "float16", "bfloat16", "another type"};
constexpr std::array<std::size_t, 6> kDTypeBytes{4, 8, 1, 2, 2, 1};

const char* name_of(DType dtype) { return kDTypeNames[static_cast<std::size_t>(dtype)]; }
std::size_t bytes_of(DType dtype) { return kDTypeBytes[static_cast<std::size_t>(dtype)]; }

std::string check_one(const Tensor& tensor, const Expectation& expected) {
  const std::string name = kOperandNames[expected.which];
  if (!tensor.present()) {
    if (!expected.required) return {};
    return wrong("operand " + name, "none", "connect it");
  }
  if (tensor.dtype != expected.dtype) {
    return wrong(name + " of " + name_of(expected.dtype), name_of(tensor.dtype), "cast it");
  }
  const auto rank = static_cast<std::size_t>(expected.rank);
  if (tensor.rank != expected.rank) {
    return wrong(name + " of rank " + std::to_string(expected.rank), "rank " + std::to_string(tensor.rank),
                 "reshape it");
  }
  if (!std::equal(expected.shape.begin(), expected.shape.begin() + expected.rank, tensor.shape.begin())) {
    return wrong(name + " of shape " + list(expected.shape.data(), rank), list(tensor.shape.data(), rank),
                 "check the model's widths, heads and chunk size");
  }
  if (tensor.strides != nullptr && tensor.elements() > 0) {
    std::int64_t step = 1;
    for (std::size_t i = rank; i-- > 0;) {
      if (tensor.shape[i] != 1 && tensor.strides[i] != step) {
        return wrong(name + " row-major without gaps", "strides " + list(tensor.strides, rank), "copy it");
      }
      step *= tensor.shape[i];
    }
  }
  if (tensor.elements() > 0 && tensor.data == nullptr) return wrong(name + " in memory", "NULL", "bind a buffer");
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % bytes_of(expected.dtype) != 0) {
    return wrong(name + " aligned to " + std::to_string(bytes_of(expected.dtype)) + " bytes", "an address between",
                 "allocate it as an array of its type");
  }
  return {};
}

// Whether two tensors share a byte.
bool overlap(const Tensor& a, const Tensor& b) {
  const auto begin = [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.data); };
  const auto bytes = [](const Tensor& t) { return static_cast<std::uintptr_t>(t.elements()) * bytes_of(t.dtype); };
  if (!a.present() || !b.present() || bytes(a) == 0 || bytes(b) == 0) return false;
  return begin(a) < begin(b) + bytes(b) && begin(b) < begin(a) + bytes(a);
}

std::string check_aliasing(const Operands& operands) {
  for (std::size_t out = kY; out < kOperands; ++out) {
    for (std::size_t other = 0; other < out; ++other) {
      if (out == kStateOut && other == kState && operands[kState].data == operands[kStateOut].data) continue;
      if (!overlap(operands[out], operands[other])) continue;
      return wrong(std::string(kOperandNames[out]) + " in memory of its own" +
                       (out == kStateOut ? ", or exactly that of state" : ""),
                   std::string("memory that ") + kOperandNames[other] + " uses too", "bind another buffer");
    }
  }
  return {};
}

}  // namespace

std::int64_t Tensor::elements() const {
  std::int64_t count = 1;
  for (int i = 0; i < rank; ++i) count *= shape[static_cast<std::size_t>(i)];
  return count;
}

std::int64_t Configuration::all_elements() const {
  std::int64_t count = 0;
  for (int i = 0; i < tensors(); ++i) count += elements(i);
  return count;
}

std::int64_t element_words(MemoryDtype memory_dtype, std::int64_t rows, std::int64_t columns) {
  switch (memory_dtype) {
    case MemoryDtype::kFloat32:
      return rows * columns;
    case MemoryDtype::kBFloat16:
    case MemoryDtype::kFloat16:
      return (rows * columns + 1) / 2;
    default:
      return (rows * columns + 3) / 4;
  }
}

std::int64_t memory_dtype_words(MemoryDtype memory_dtype, std::int64_t rows, std::int64_t columns) {
  const std::int64_t blocks = (columns + kScaleBlock - 1) / kScaleBlock;
  return element_words(memory_dtype, rows, columns) + (has_scales(memory_dtype) ? (rows * blocks + 1) / 2 : 0);
}

RowLayout::RowLayout(const Configuration& c) {
  const auto place = [this](std::int64_t& offset, std::int64_t words) {
    offset = size;
    size += words;
  };
  const auto place_tensors = [&](std::array<std::int64_t, kMaxTensors>& field) {
    for (int i = 0; i < c.tensors(); ++i) place(field[static_cast<std::size_t>(i)], c.words(i));
  };
  const bool chunk = c.gates == Gates::kChunk;
  place_tensors(w);
  if (c.keeps_point()) place_tensors(g);
  if (c.momentum) place_tensors(s);
  if (c.rounding == Rounding::kErrorFeedback) {
    place_tensors(ew);
    if (c.momentum) place_tensors(es);
  }
  if (chunk) {
    for (std::int64_t* rows : {&k, &v}) place(*rows, c.keys() * c.widths[0]);
    place(theta, c.keys());
  } else {
    for (int i = 0; i < c.depth; ++i) {
      place(left[static_cast<std::size_t>(i)], c.chunk_size * c.in(i));
      place(right[static_cast<std::size_t>(i)], c.chunk_size * c.out(i));
    }
    place(e, c.chunk_size);
    place(a, c.chunk_size);
    for (std::int64_t* coefficient : {&m, &f, &beta}) place(*coefficient, 1);
  }
  if (c.rounding == Rounding::kStochastic) place(chunk_updates, 1);
  size = (size + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}

std::string configure(const Attributes& attributes, Configuration& c) {
  const std::size_t layers = attributes.widths.size();
  if (layers < 2 || layers > kMaxDepth + 1) {
    return wrong("2 to " + std::to_string(kMaxDepth + 1) + " widths", std::to_string(layers), "export the model again");
  }
  for (const std::int64_t width : attributes.widths) {
    if (width >= 1 && width <= kLargestWidth) continue;
    return wrong("widths in [1, " + std::to_string(kLargestWidth) + "]", list(attributes.widths.data(), layers),
                 "export the model again");
  }
  if (attributes.widths.front() != attributes.widths.back()) {
    return wrong("the first of widths to equal the last", list(attributes.widths.data(), layers),
                 "export the model again");
  }
  if (attributes.chunk_size < 1 || attributes.chunk_size > kLargestChunk) {
    return wrong("chunk_size in [1, " + std::to_string(kLargestChunk) + "]", std::to_string(attributes.chunk_size),
                 "export the model again");
  }
  c.depth = static_cast<int>(layers) - 1;
  std::copy(attributes.widths.begin(), attributes.widths.end(), c.widths.begin());
  c.chunk_size = attributes.chunk_size;
  for (const std::string& problem :
       {choose("mode", attributes.mode, std::array{"update", "read"}, c.mode),
        choose("schedule", attributes.schedule, std::array{"aligned", "any"}, c.schedule),
        choose("activation", attributes.activation, std::array{"silu", "gelu"}, c.activation),
        choose("memory_dtype", attributes.memory_dtype, std::array{"float32", "bfloat16", "float16", "int8", "fp8"},
               c.memory_dtype),
        choose("gates", attributes.gates, std::array{"token", "chunk"}, c.gates),
        choose("rounding", attributes.rounding, std::array{"nearest", "stochastic", "error_feedback"}, c.rounding),
        whole("seed", attributes.seed, 0, kLargestSeed), flag("residual", attributes.residual, c.residual),
        flag("layer_norm", attributes.layer_norm, c.layer_norm)}) {
    if (!problem.empty()) return problem;
  }
  c.seed = static_cast<std::uint32_t>(attributes.seed);
  if (c.memory_dtype == MemoryDtype::kFloat32 && c.rounding != Rounding::kNearest) {
    return wrong("attribute rounding to be \"nearest\" with memory_dtype \"float32\"",
                 "\"" + attributes.rounding + "\"", "export the model again");
  }
  if (c.seed != 0 && c.rounding != Rounding::kStochastic) {
    return wrong("attribute seed to be left out with rounding \"" + attributes.rounding + "\"",
                 std::to_string(attributes.seed), "export the model again");
  }
  return c.gates == Gates::kChunk ? configure_chunk(attributes, c) : check_no_chunk(attributes, c);
}

std::string check_operands(const Configuration& c, const Operands& operands, DType values) {
  const Tensor& q = operands[kQ];
  const Tensor& state = operands[kState];
  if (q.rank != 4)
    return wrong("q of rank 4", "rank " + std::to_string(q.rank), "give (streams, heads, tokens, width)");
  if (state.rank != 3) {
    return wrong("state of rank 3", "rank " + std::to_string(state.rank), "give (slots, heads, row)");
  }
  const std::int64_t streams = q.shape[0], heads = q.shape[1], tokens = q.shape[2], width = c.widths[0];
  const std::int64_t slots = operands[kSlots].present() ? state.shape[0] : streams;
  const bool update = c.mode == Mode::kUpdate, chunk = c.gates == Gates::kChunk;
  const bool any = update && c.schedule == Schedule::kAny;
  const std::int64_t keys = tokens * c.keys_per_token;
  const std::array<std::int64_t, 4> rows{streams, heads, tokens, width}, key_rows{streams, heads, keys, width},
      gates{streams, heads, tokens, 0}, steps{streams, heads, keys, 0}, per_stream{streams, 0, 0, 0},
      pool{slots, heads, RowLayout(c).size, 0}, modulation{streams, heads, tokens, c.tensors()},
      weights{streams, heads, c.chunks(tokens), c.all_elements()};
  const Expectation expectations[] = {
      {kState, DType::kFloat32, pool, 3, true},
      {kQ, values, rows, 4, true},
      {kK, values, key_rows, 4, update},
      {kV, values, key_rows, 4, update},
      {kStepSize, DType::kFloat32, steps, 3, update},
      {kMomentum, DType::kFloat32, gates, 3, update && c.momentum},
      {kForgetGate, DType::kFloat32, gates, 3, update},
      {kFill, DType::kInt64, per_stream, 1, any || (update && c.counts_batch())},
      {kLearn, DType::kBool, per_stream, 1, false},
      {kValid, DType::kInt64, per_stream, 1, false},
      {kSlots, DType::kInt64, per_stream, 1, false},
      {kUpdateLimit, DType::kFloat32, per_stream, 1, false},
      {kNormScale, DType::kFloat32, {heads, width, 0, 0}, 2, c.layer_norm && !c.fast_norm()},
      {kModulation, DType::kFloat32, modulation, 4, false},
      {kPrevious, DType::kFloat32, weights, 4, false},
      {kPreviousGate, DType::kFloat32, gates, 3, operands[kPrevious].present()},
      {kY, values, rows, 4, true},
      {kStateOut, DType::kFloat32, pool, 3, update},
      {kStats, DType::kFloat32, {streams, heads, kStatCount, 0}, 3, false},
      {kInitialWeights, DType::kFloat32, weights, 4, false}};
  for (const Expectation& expectation : expectations) {
    std::string problem = check_one(operands[expectation.which], expectation);
    if (!problem.empty()) return problem;
  }
  const std::tuple<Operand, bool, const char*> refused[] = {
      {kMomentum, !c.momentum, "momentum_order 0"},
      {kNormScale, c.fast_norm(), "norm_weight \"fast\""},
      {kModulation, !chunk, "gates \"token\""},
      {kPrevious, !chunk, "gates \"token\""},
      {kPreviousGate, !operands[kPrevious].present(), "no previous"},
      {kInitialWeights, !chunk, "gates \"token\""},
      {kFill, update && !any && !c.counts_batch(), "schedule \"aligned\""}};
  for (const auto& [which, is_refused, where] : refused) {
    if (!is_refused || !operands[which].present()) continue;
    return wrong("no " + std::string(kOperandNames[which]) + " with " + where, "one", "leave it out");
  }
  if (update && !any) {
    if (tokens % c.chunk_size != 0) {
      return wrong("whole chunks of " + std::to_string(c.chunk_size) + " tokens with schedule \"aligned\"",
                   std::to_string(tokens) + " tokens", "use schedule \"any\"");
    }
  }
  return check_aliasing(operands);
}

std::string check_values(const Configuration& c, const Operands& operands) {
  const std::int64_t streams = operands[kQ].shape[0], heads = operands[kQ].shape[1], tokens = operands[kQ].shape[2];
  const auto check_range = [&](Operand which, std::int64_t end) -> std::string {
    if (!operands[which].present()) return {};
    for (std::int64_t b = 0; b < streams; ++b) {
      const std::int64_t value = operands[which].as<std::int64_t>()[b];
      if (value >= 0 && value < end) continue;
      return wrong(std::string(kOperandNames[which]) + " in [0, " + std::to_string(end) + ")",
                   std::to_string(value) + " for stream " + std::to_string(b), "correct it");
    }
    return {};
  };
  for (const auto& [which, end] :
       {std::pair{kFill, c.period()}, std::pair{kValid, tokens + 1}, std::pair{kSlots, operands[kState].shape[0]}}) {
    std::string problem = check_range(which, end);
    if (!problem.empty()) return problem;
  }
  if (operands[kSlots].present()) {
    const std::int64_t* slots = operands[kSlots].as<std::int64_t>();
    for (std::int64_t b = 0; b < streams; ++b) {
      if (std::find(slots, slots + b, slots[b]) == slots + b) continue;
      return wrong("slots that are all different", std::to_string(slots[b]) + " twice", "give each stream its own");
    }
  }
  if (c.mode == Mode::kRead) return {};
  for (std::int64_t b = 0; b < streams; ++b) {
    const std::int64_t valid = operands[kValid].present() ? operands[kValid].as<std::int64_t>()[b] : tokens;
    if (c.schedule == Schedule::kAligned && valid % c.chunk_size != 0) {
      return wrong("valid to be a multiple of " + std::to_string(c.chunk_size) + " with schedule \"aligned\"",
                   std::to_string(valid) + " for stream " + std::to_string(b), "use schedule \"any\"");
    }
    const std::int64_t fill = operands[kFill].present() ? operands[kFill].as<std::int64_t>()[b] : 0;
    if (c.schedule == Schedule::kAligned && fill % c.chunk_size != 0) {
      return wrong("fill to be a multiple of " + std::to_string(c.chunk_size) + " with schedule \"aligned\"",
                   std::to_string(fill) + " for stream " + std::to_string(b), "use schedule \"any\"");
    }
    const std::pair<Operand, std::int64_t> gates[] = {{kStepSize, c.keys_per_token},
                                                      {kMomentum, 1},
                                                      {kForgetGate, 1},
                                                      {kModulation, c.tensors()},
                                                      {kPreviousGate, 1}};
    for (const auto& [gate, per_token] : gates) {
      if (!operands[gate].present()) continue;
      for (std::int64_t h = 0; h < heads; ++h) {
        const float* values = operands[gate].as<float>() + (b * heads + h) * tokens * per_token;
        for (std::int64_t i = 0; i < valid * per_token; ++i) {
          if (std::isfinite(values[i])) continue;
          return wrong(std::string(kOperandNames[gate]) + " to be finite",
                       std::to_string(values[i]) + " at stream " + std::to_string(b) + ", head " + std::to_string(h) +
                           ", token " + std::to_string(i / per_token),
                       "look for what overflows in the model before it");
        }
      }
    }
  }
  return {};
}

}  // namespace titans::kernels
