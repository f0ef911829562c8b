#include "plugins/kernels/memory_common.h"

#include <cmath>

namespace titans::kernels {
namespace {

constexpr std::int64_t kRowAlignment = 16;  // words: a head's row starts on a cache line

struct Expected {
  Operand which;
  int rank;
  const char* fix;
};

}  // namespace

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

void WeightLayout::place_tensors(const MemoryConfiguration& c, int tensors, Tensors& field) {
  for (int i = 0; i < tensors; ++i) place(field[static_cast<std::size_t>(i)], c.words(i));
}

void WeightLayout::finish(const MemoryConfiguration& c) {
  if (c.rounding == Rounding::kStochastic) place(chunk_updates, 1);
  size = (size + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}

std::string finish_memory(const char* where, const MemoryAttributes& attributes, MemoryConfiguration& c) {
  c.depth = static_cast<int>(attributes.widths.size()) - 1;
  const auto contradiction = [&](const std::string& detail) {
    return failure(where, "E0702", "contradicting attributes: " + detail, kExportAgain);
  };
  if (attributes.widths.front() != attributes.widths.back()) {
    return contradiction("widths must begin and end with the same value, got " +
                         shape_text(attributes.widths.data(), attributes.widths.size()));
  }
  if (c.memory_dtype == MemoryDtype::kFloat32 && c.rounding != Rounding::kNearest) {
    return contradiction("memory_dtype \"float32\" needs rounding \"nearest\", got \"" + attributes.rounding + "\"");
  }
  if (c.seed != 0 && c.rounding != Rounding::kStochastic) {
    return contradiction("seed needs rounding \"stochastic\", got \"" + attributes.rounding + "\"");
  }
  return {};
}

std::string check_ranks(const char* where, const Operands& operands) {
  for (const auto& [which, rank, fix] :
       {Expected{kQ, 4, "give (streams, heads, tokens, width)"}, Expected{kState, 3, "give (slots, heads, row)"}}) {
    std::string problem = check_rank(where, kOperandNames[which], operands[which], rank, fix);
    if (!problem.empty()) return problem;
  }
  return {};
}

std::array<Expectation, kCommonOperands> common_expectations(const MemoryConfiguration& c, const Operands& operands,
                                                             DType values, const OperandNeeds& needs) {
  const Tensor &q = operands[kQ], &state = operands[kState];
  const std::int64_t streams = q.shape[0], heads = q.shape[1], tokens = q.shape[2], width = c.widths[0];
  const std::int64_t slots = operands[kSlots].present() ? state.shape[0] : streams;
  const std::int64_t keys = tokens * needs.keys_per_token;
  const std::array<std::int64_t, 4> rows{streams, heads, tokens, width}, key_rows{streams, heads, keys, width},
      gates{streams, heads, tokens, 0}, steps{streams, heads, keys, 0}, per_stream{streams, 0, 0, 0},
      pool{slots, heads, needs.row, 0};
  const bool update = needs.update;
  return {{{kState, DType::kFloat32, pool, 3, true},
           {kQ, values, rows, 4, true},
           {kK, values, key_rows, 4, update},
           {kV, values, key_rows, 4, update},
           {kStepSize, DType::kFloat32, steps, 3, update},
           {kMomentum, DType::kFloat32, gates, 3, update && needs.momentum},
           {kForgetGate, DType::kFloat32, gates, 3, update},
           {kFill, DType::kInt64, per_stream, 1, needs.fill},
           {kLearn, DType::kBool, per_stream, 1, false},
           {kValid, DType::kInt64, per_stream, 1, false},
           {kSlots, DType::kInt64, per_stream, 1, false},
           {kUpdateLimit, DType::kFloat32, per_stream, 1, false},
           {kNormScale, DType::kFloat32, {heads, width, 0, 0}, 2, needs.norm_scale},
           {kY, values, rows, 4, true},
           {kStateOut, DType::kFloat32, pool, 3, update},
           {kStats, DType::kFloat32, {streams, heads, kStatCount, 0}, 3, false}}};
}

std::string check_refused(const char* where, const Operands& operands, const Refusal* all, std::size_t count) {
  for (const Refusal* each = all; each != all + count; ++each) {
    if (!each->refused || !operands[each->which].present()) continue;
    return failure(where, "E0704",
                   "unexpected operand: " + std::string(kOperandNames[each->which]) + " with " + each->reason,
                   "leave it out");
  }
  return {};
}

std::string check_whole_chunks(const char* where, const MemoryConfiguration& c, const Operands& operands) {
  const std::int64_t tokens = operands[kQ].shape[2];
  if (c.schedule == Schedule::kAny || tokens % c.chunk_size == 0) return {};
  return failure(where, "E0711",
                 "incomplete chunk: schedule \"aligned\" needs a multiple of " + std::to_string(c.chunk_size) +
                     " tokens, got " + std::to_string(tokens),
                 "use schedule \"any\"");
}

std::string check_aliasing(const char* where, const Operands& operands) {
  constexpr InPlace kInPlace{kState, kStateOut};
  return check_overlaps(where, OperandList(operands, kOperandNames), kY, &kInPlace, 1);
}

std::string check_indices(const char* where, const Operands& operands, std::int64_t period) {
  std::string problem = check_range(where, kOperandNames[kFill], operands[kFill], period, "stream");
  if (problem.empty()) {
    problem = check_range(where, kOperandNames[kValid], operands[kValid], operands[kQ].shape[2] + 1, "stream");
  }
  return problem.empty() ? check_slots(where, kOperandNames[kSlots], operands[kSlots], operands[kState].shape[0])
                         : problem;
}

std::string check_aligned_values(const char* where, const MemoryConfiguration& c, const Operands& operands) {
  if (c.schedule == Schedule::kAny) return {};
  for (const Operand which : {kValid, kFill}) {
    if (!operands[which].present()) continue;
    for (std::int64_t b = 0; b < operands[kQ].shape[0]; ++b) {
      const std::int64_t value = operands[which].as<std::int64_t>()[b];
      if (value % c.chunk_size == 0) continue;
      return failure(where, "E0711",
                     "incomplete chunk: schedule \"aligned\" needs " + std::string(kOperandNames[which]) +
                         " as a multiple of " + std::to_string(c.chunk_size) + ", got " + std::to_string(value) +
                         " for stream " + std::to_string(b),
                     "use schedule \"any\"");
    }
  }
  return {};
}

std::string check_gates(const char* where, const Operands& operands, const Gate* gates, std::size_t count) {
  const std::int64_t streams = operands[kQ].shape[0], heads = operands[kQ].shape[1], tokens = operands[kQ].shape[2];
  for (std::int64_t b = 0; b < streams; ++b) {
    const std::int64_t valid = operands[kValid].present() ? operands[kValid].as<std::int64_t>()[b] : tokens;
    for (const Gate* gate = gates; gate != gates + count; ++gate) {
      if (!operands[gate->which].present()) continue;
      for (std::int64_t h = 0; h < heads; ++h) {
        const float* values = operands[gate->which].as<float>() + (b * heads + h) * tokens * gate->per_token;
        for (std::int64_t i = 0; i < valid * gate->per_token; ++i) {
          if (std::isfinite(values[i])) continue;
          return failure(where, "E0710",
                         "gate not finite: " + std::string(kOperandNames[gate->which]) + " is " +
                             std::to_string(values[i]) + " at stream " + std::to_string(b) + ", head " +
                             std::to_string(h) + ", token " + std::to_string(i / gate->per_token),
                         "look for an overflow in the model before the memory");
        }
      }
    }
  }
  return {};
}

}  // namespace titans::kernels
