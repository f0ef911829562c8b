// One launch as its kernels see it: operands, memory placement, and the checks of values.
#pragma once

#include "plugins/kernels/cuda_device.cuh"
#include "plugins/kernels/cuda_memory_dtype.cuh"
#include "plugins/kernels/cuda_plan.h"
#include "plugins/kernels/cuda_rows.cuh"
#include "plugins/kernels/cuda_status.h"

namespace titans::kernels::cuda {

// The operands are those of docs/operator.md, in device memory; optional ones may be null.
struct Call {
  Model model;
  Plan plan;
  float* state;
  const void *q, *k, *v;
  const float *step_size, *momentum, *forget_gate;
  const std::int64_t* fill;
  const bool* learn;
  const std::int64_t *valid, *slots;
  const float *update_limit, *norm_scale;
  void* y;
  float* stats;
  std::int32_t* status;
  unsigned* counters;     // one per group
  std::byte* workspaces;  // one part per block
  int streams, heads, tokens, pool;
};

// One head of one stream.
struct Item {
  int stream, head, index;  // index: the head's index among all streams' heads
  __device__ Item(const Call& call, int work) : stream(work / call.heads), head(work % call.heads), index(work) {}
};

__device__ inline Group make_group(const Call& call) {
  const int size = call.plan.blocks, index = block_index() / size;
  return {size, block_index() % size, call.counters + index, 0};
}

// kShared: the compiler may assume shared memory, which has shorter load and store instructions.
template <class T, bool kShared = false>
__device__ T* locate(const Call& call, const Place& place) {
  if constexpr (kShared) return reinterpret_cast<T*>(shared_memory() + place.offset);
  std::byte* base = place.shared
                        ? shared_memory()
                        : call.workspaces + static_cast<std::size_t>(block_index()) * call.plan.workspace_bytes;
  return reinterpret_cast<T*>(base + place.offset);
}

// The sum over the group of one float in each block's exchange area, in rank order. `own` points to this block's float.
__device__ inline float sum_over_group(const Call& call, const Group& group, const float* own) {
  float parts[kMostBlocks] = {};  // all loads are issued before the first is used
  const bool shared = call.plan.exchange.shared;
  const std::ptrdiff_t apart = call.plan.workspace_bytes;
#pragma unroll
  for (int rank = 0; rank < kMostBlocks; ++rank) {
    if (rank >= group.size) break;
    parts[rank] = shared ? *in_rank(own, rank)
                         : load_from_group(reinterpret_cast<const float*>(reinterpret_cast<const std::byte*>(own) +
                                                                          (rank - group.rank) * apart));
  }
  float sum = 0.0F;
#pragma unroll
  for (int rank = 0; rank < kMostBlocks; ++rank) {
    if (rank >= group.size) break;
    sum += parts[rank];
  }
  return sum;
}

// The status of the item's stream, or 0. Two streams with the same slot are an error too.
__device__ inline int wrong_operand(const Call& c, const Item& item) {
  const auto outside = [&](const std::int64_t* values, std::int64_t end) {
    return values != nullptr && (values[item.stream] < 0 || values[item.stream] >= end);
  };
  if (outside(c.fill, c.model.chunk)) return status_word(StatusOf::kNeuralMemory, kFill);
  if (outside(c.valid, c.tokens + 1)) return status_word(StatusOf::kNeuralMemory, kValid);
  if (outside(c.slots, c.pool)) return status_word(StatusOf::kNeuralMemory, kSlots);
  if (c.slots != nullptr) {
    bool twice = false;
    for (int other = thread_index(); other < c.streams; other += kThreads) {
      twice = twice || (other != item.stream && c.slots[other] == c.slots[item.stream]);
    }
    if (any_in_block(twice)) return status_word(StatusOf::kNeuralMemory, kSlots);
  }
  if (!c.model.update) return 0;
  const int valid = c.valid == nullptr ? c.tokens : static_cast<int>(c.valid[item.stream]);
  if (c.model.aligned && valid % c.model.chunk != 0) return status_word(StatusOf::kNeuralMemory, kValid);
  // All heads of the stream are checked, so that its blocks agree.
  const std::int64_t first = static_cast<std::int64_t>(item.stream) * c.heads * c.tokens;
  const float* gates[] = {c.step_size + first, c.momentum + first, c.forget_gate + first};
  bool bad[3] = {};
  for (int at = thread_index(); at < c.heads * c.tokens; at += kThreads) {
    if (valid < c.tokens && at % c.tokens >= valid) continue;
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) bad[gate] |= !is_finite(gates[gate][at]);
  }
  if (!any_in_block(bad[0] || bad[1] || bad[2])) return 0;
  for (int gate = 0; gate < 2; ++gate) {
    if (any_in_block(bad[gate]))
      return status_word(StatusOf::kNeuralMemory, static_cast<std::size_t>(kStepSize + gate));
  }
  return status_word(StatusOf::kNeuralMemory, kForgetGate);
}

// Whether the values of the item's stream are valid. If not, its answers become NaN and its state stays unchanged.
template <class V>
__device__ bool check_item(const Call& c, const Group& group, const Item& item) {
  const int wrong = wrong_operand(c, item);
  if (wrong == 0) return true;
  if (group.rank == 0) {
    const float nan = __builtin_nanf("");
    V* y = static_cast<V*>(c.y) + static_cast<std::int64_t>(item.index) * c.tokens * c.model.width;
    for (int i = thread_index(); i < c.tokens * c.model.width; i += kThreads) y[i] = to_value<V>(nan);
    if (c.stats != nullptr && thread_index() < kStatCount) c.stats[item.index * kStatCount + thread_index()] = nan;
    if (thread_index() == 0) report(c.status, wrong);
  }
  return false;
}

__device__ inline float* row_of(const Call& c, const Item& item) {
  const std::int64_t slot = c.slots == nullptr ? item.stream : c.slots[item.stream];
  return c.state + (slot * c.heads + item.head) * c.model.row;
}

// A block's part of layer i's weights: rows [in_begin, in_begin + in), columns [out_begin, out_begin + out).
struct Part {
  int in_begin, in, out_begin, out;
};
__device__ inline Part part_of(const Model& m, int share, int rank, int i) {
  const int begin = rank * share, all = m.widths[m.depth - 1];
  const int count = begin >= all ? 0 : (all - begin < share ? all - begin : share);
  Part part{0, m.widths[i], 0, m.widths[i + 1]};
  if (i == m.depth - 1) {
    part.in_begin = begin;
    part.in = count;
  } else if (i == m.depth - 2) {
    part.out_begin = begin;
    part.out = count;
  }
  return part;
}

// The seeds of a chunk update's noise: the head and its number of earlier chunk updates.
struct NoiseSource {
  std::uint32_t head = 0, chunk_updates = 0;
};
__device__ inline NoiseSource noise_source_of(const Model& m, const float* row, const Item& item) {
  const bool counts = m.rounding == Rounding::kStochastic;
  return {static_cast<std::uint32_t>(item.head), counts ? bits_of(row[m.chunk_updates]) : 0U};
}
// One thread stores the count for all blocks of the group.
__device__ inline void store_chunk_updates(const Model& m, float* row, std::uint32_t chunk_updates) {
  if (m.rounding == Rounding::kStochastic) row[m.chunk_updates] = float_of(chunk_updates);
}

// Rounds one scale block of a row of W or S at the end of a chunk and writes it to the packed row (see store_block).
// Writes the rounding error too if the row keeps it. Returns the lane's rounded element.
__device__ inline float keep_block(const Model& m, const NoiseSource& source, float* row, int i, bool of_s, int r,
                                   int j, bool inside, float x) {
  const bool stochastic = m.rounding == Rounding::kStochastic;
  const NoiseKeys keys = noise_keys(m.seed, source.head, static_cast<std::uint32_t>(i), of_s, source.chunk_updates);
  const int passes = m.rounding == Rounding::kErrorFeedback ? 2 : 1;
  float kept = 0.0F;
#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    const Field& field = pass == 0 ? (of_s ? m.s[i] : m.w[i]) : (of_s ? m.es[i] : m.ew[i]);
    const float stored = store_block(m, row, field, r, j, inside, stochastic, keys, x);
    if (pass == 0) kept = stored;
    x -= stored;
  }
  return kept;
}

// One warp computes one row y = M(x) from f(x), with norm and residual.
template <class V>
__device__ void finish_row(const Model& m, const float* f, const V* x, const float* norm_scale, V* y) {
  const Moments norm = m.layer_norm ? moments(f, m.width) : Moments{0.0F, 1.0F};
  for (int j = lane_index(); j < m.width; j += kWarpSize) {
    float out = f[j];
    if (m.layer_norm) out = (out - norm.mean) * norm.reciprocal * norm_scale[j];
    if (m.residual) out += to_float(x[j]);
    y[j] = to_value<V>(out);
  }
}

// One warp computes one row's loss || M(k) - v ||^2 from f = f(k), and replaces f by the loss's gradient at f's output.
// The gradient is also written to `gradient`. Every lane receives the loss.
template <class V, class G>
__device__ float error_row(const Model& m, float* f, const V* k, const V* v, const float* norm_scale, G* gradient) {
  const Moments norm = m.layer_norm ? moments(f, m.width) : Moments{0.0F, 1.0F};
  float loss = 0.0F, sum = 0.0F, sum_unit = 0.0F;
  for (int j = lane_index(); j < m.width; j += kWarpSize) {
    const float unit = (f[j] - norm.mean) * norm.reciprocal;
    const float scale = m.layer_norm ? norm_scale[j] : 1.0F;
    float out = m.layer_norm ? unit * scale : f[j];
    if (m.residual) out += to_float(k[j]);
    const float error = out - to_float(v[j]);
    const float slope = 2.0F * error * scale;
    loss += error * error;
    sum += slope;
    sum_unit += slope * unit;
    if (!m.layer_norm) {
      f[j] = slope;
      gradient[j] = to_value<G>(slope);
    }
  }
  loss = sum_over_warp(loss);
  if (!m.layer_norm) return loss;
  sum = sum_over_warp(sum) / static_cast<float>(m.width);
  sum_unit = sum_over_warp(sum_unit) / static_cast<float>(m.width);
  for (int j = lane_index(); j < m.width; j += kWarpSize) {
    // Recomputes `slope` instead of storing it.
    const float unit = (f[j] - norm.mean) * norm.reciprocal;
    float out = unit * norm_scale[j];
    if (m.residual) out += to_float(k[j]);
    const float slope = 2.0F * (out - to_float(v[j])) * norm_scale[j];
    f[j] = norm.reciprocal * (slope - sum - unit * sum_unit);
    gradient[j] = to_value<G>(f[j]);
  }
  return loss;
}

// A head's statistics of one call, the same in every thread.
struct Counts {
  float loss = 0.0F, update_norm = 0.0F, committed = 0.0F, rejected = 0.0F;
  __device__ void close(float norm, bool commit) {
    if (!(norm <= update_norm) && !is_nan(update_norm)) update_norm = norm;  // keeps a NaN
    (commit ? committed : rejected) += 1.0F;
  }
  __device__ void store(float* stats) const {
    stats[0] = loss;
    stats[1] = update_norm;
    stats[2] = committed;
    stats[3] = rejected;
  }
};

// Coefficients of the open chunk at its last token. e and a have one value per token, in the block's memory; every
// thread has a copy of the others.
struct Coefficients {
  float *e = nullptr, *a = nullptr;
  float m = 1.0F, f = 0.0F, beta = 1.0F;
};

// Ends a chunk: commits it unless its update is too large, and starts the next one. chunk_update(write) computes the
// new W and S, writes them if `write`, and returns this thread's part of the squared change of W. `words`: kWarps
// floats of the block's memory. `exchanged`: one float of its exchange area. Returns whether W and S have changed.
template <class Update>
__device__ bool close_chunk(const Call& c, Group& group, Coefficients& chunk, const float* limit, float* words,
                            float* exchanged, Counts& counts, const Update& chunk_update) {
  // The Frobenius norm over all layers and blocks.
  const auto norm_of = [&](float squares) {
    float sum = sum_over_block(squares, words);
    if (group.size > 1) {
      if (thread_index() == 0) *exchanged = sum;
      sync_group(group);
      sum = sum_over_group(c, group, exchanged);
    }
    return square_root(sum);
  };
  bool touched = chunk.beta != 1.0F || chunk.f != 0.0F || chunk.m != 1.0F;
  for (int at = thread_index(); at < c.model.chunk; at += kThreads) {
    touched = touched || chunk.e[at] != 0.0F || chunk.a[at] != 0.0F;
  }
  touched = any_in_block(touched);
  float norm = 0.0F;
  bool commit = true;
  if (limit == nullptr) {
    if (touched) norm = norm_of(chunk_update(true));
  } else {
    // A rejected update must never be written, so a first pass only computes its norm.
    if (touched) norm = norm_of(chunk_update(false));
    commit = norm <= *limit;  // false for NaN
    if (touched && commit) chunk_update(true);
  }
  sync_block();  // the coefficients are read until here
  for (int at = thread_index(); at < c.model.chunk; at += kThreads) chunk.e[at] = chunk.a[at] = 0.0F;
  chunk.m = chunk.beta = 1.0F;
  chunk.f = 0.0F;
  counts.close(norm, commit);
  sync_block();
  return touched && commit;
}

// The launch's groups loop over the heads of all streams.
template <class In, class Run>
__device__ void run_items(const Call& call) {
  Group group = make_group(call);
  Run run(call, group);
  const int work = call.streams * call.heads, groups = block_count() / call.plan.blocks;
  for (int each = block_index() / call.plan.blocks; each < work; each += groups) {
    const Item item(call, each);
    if (check_item<In>(call, group, item)) run.run(item);
  }
}

}  // namespace titans::kernels::cuda
