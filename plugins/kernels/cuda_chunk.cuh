// One head with gates per chunk on a thread block. Equations and names are those of docs/chunk-operator.md.
//
// W is constant between two chunk updates, so the queries of up to a chunk of tokens are answered together, as matmuls.
// Keys, values and step sizes wait in the packed row, or are read from the operands if the call has the whole chunk. A
// chunk update is a forward and a backward pass over the chunk's keys. Then each tensor's gradient is a matmul whose
// epilogue updates S and W. A single token is answered by matrix-vector products.
#pragma once

#include "plugins/kernels/cuda_chunk_plan.h"
#include "plugins/kernels/cuda_device.cuh"
#include "plugins/kernels/cuda_memory_dtype.cuh"
#include "plugins/kernels/cuda_newton_schulz.cuh"
#include "plugins/kernels/cuda_node.cuh"
#include "plugins/kernels/cuda_product.cuh"
#include "plugins/kernels/cuda_rows.cuh"

namespace titans::kernels::cuda {

// The operands are those of docs/chunk-operator.md, in device memory; optional ones may be null.
struct ChunkCall {
  ChunkModel model;
  ChunkPlan plan;
  float* state;
  const float *q, *k, *v;
  const float *step_size, *momentum, *forget_gate, *modulation, *previous, *previous_gate;
  const std::int64_t* fill;
  const bool* learn;
  const float *update_limit, *norm_scale;
  float *y, *stats, *initial_weights;
  StreamIndices indices;
  std::int32_t* status;
  std::byte* workspaces;  // one part per block
  int heads, most_chunks;
};

__device__ inline float* locate(const ChunkCall& call, const Place& place) {
  std::byte* base = place.shared
                        ? shared_memory()
                        : call.workspaces + static_cast<std::size_t>(block_index()) * call.plan.workspace_bytes;
  return reinterpret_cast<float*>(base + place.offset);
}

// An operand of a matmul with element (i, k) at data[i * across + k * along], and 0 outside of rows x depth.
struct Bounded {
  const float* data;
  int across, along, rows, depth;
  __device__ float operator()(int i, int k) const {
    return i < rows && k < depth ? data[static_cast<std::int64_t>(i) * across + static_cast<std::int64_t>(k) * along]
                                 : 0.0F;
  }
  template <class V>
  __device__ Word<V> word(int i, int k) const {
    return make_word<V>(*this, i, k);
  }
};

// The status of a stream: 0, or that of an operand with an invalid value. All heads of the stream are checked, so that
// its blocks agree.
__device__ inline int wrong_operand(const ChunkCall& c, int stream) {
  constexpr StatusOf kOp = StatusOf::kChunkNeuralMemory;
  const ChunkModel& m = c.model;
  if (c.fill != nullptr) {
    const std::int64_t fill = c.fill[stream];
    if (fill < 0 || fill >= m.period || (m.aligned && fill % m.chunk != 0)) return status_word(kOp, kFill);
  }
  const int wrong = wrong_index(c.indices, stream);
  if (wrong != 0) return wrong;
  const int tokens = c.indices.tokens, valid = c.indices.valid_tokens(stream);
  if (m.aligned && valid % m.chunk != 0) return status_word(kOp, kValid);
  const auto finite = [&](const float* gate, int per_token) {
    if (gate == nullptr) return true;
    const int of_head = tokens * per_token, checked = valid * per_token;
    const float* values = gate + static_cast<std::int64_t>(stream) * c.heads * of_head;
    bool bad = false;
    for (int head = 0; head < c.heads; ++head) {
      for (int i = thread_index(); i < checked; i += kThreads) {
        bad = bad || !is_finite(values[static_cast<std::int64_t>(head) * of_head + i]);
      }
    }
    return !any_in_block(bad);
  };
  if (!finite(c.step_size, m.keys_per_token)) return status_word(kOp, kStepSize);
  if (!finite(c.momentum, 1)) return status_word(kOp, kMomentum);
  if (!finite(c.forget_gate, 1)) return status_word(kOp, kForgetGate);
  if (!finite(c.modulation, m.tensors)) return status_word(kOp, kModulation);
  return finite(c.previous_gate, 1) ? 0 : status_word(kOp, kPreviousGate);
}

// V: the operands of Newton-Schulz's matmuls. All others are float32.
template <class V>
class ChunkRun {
 public:
  __device__ explicit ChunkRun(const ChunkCall& call)
      : c_(call),
        m_(call.model),
        sums_(locate(call, call.plan.sums)),
        scale_(locate(call, call.plan.scale)),
        gamma_(locate(call, call.plan.gamma)) {}

  // Head `head` of stream `stream`, whose values are valid.
  __device__ void run(int stream, int head) {
    begin(stream, head);
    const int tokens = c_.indices.valid_tokens(stream);
    int fill = static_cast<int>(fill_ % m_.chunk), done = 0, answered = 0;
    while (done < tokens) {
      const int count = tokens - done < m_.chunk - fill ? tokens - done : m_.chunk - fill;
      const bool whole = count == m_.chunk;
      if (!whole) keep(done, fill, count);
      done += count;
      fill += count;
      if (fill < m_.chunk) break;
      // The token that completes a chunk is answered with the updated weights.
      retrieve(answered, done - 1 - answered);
      answered = done - 1;
      complete(done, whole);
      fill = 0;
    }
    retrieve(answered, tokens - answered);
    for (int i = tokens * m_.width + thread_index(); i < c_.indices.tokens * m_.width; i += kThreads) y_[i] = 0.0F;
    if (c_.stats != nullptr && thread_index() == 0) {
      float* stats = c_.stats + static_cast<std::int64_t>(index_) * kStatCount;
      stats[0] = loss_;
      stats[1] = update_norm_;
      stats[2] = committed_;
      stats[3] = rejected_;
    }
    sync_block();
  }

 private:
  __device__ int in(int layer) const { return m_.widths[layer]; }
  __device__ int out(int layer) const { return m_.widths[layer + 1]; }
  __device__ static int stride(int columns) { return stride_of(columns, sizeof(float)); }
  __device__ int elements() const { return m_.offsets[m_.tensors]; }
  // The chunk's rows: inputs of a layer, and the loss's gradient at its outputs.
  __device__ const float* layer_input(int layer) const {
    return layer == 0 ? keys_ : locate(c_, c_.plan.layer_input[layer]);
  }
  __device__ int input_stride(int layer) const { return layer == 0 ? m_.width : stride(in(layer)); }
  __device__ float* output_grad(int layer) const { return locate(c_, c_.plan.output_grad[layer]); }
  // The part of an operand with `size` elements per head.
  __device__ const float* part(const float* operand, std::int64_t size) const {
    return operand == nullptr ? nullptr : operand + index_ * size;
  }

  __device__ void begin(int stream, int head) {
    const std::int64_t tokens = c_.indices.tokens;
    stream_ = stream;
    head_ = head;
    index_ = stream * c_.heads + head;
    row_ = c_.state + (c_.indices.slot(stream) * c_.heads + head) * m_.row;
    q_ = part(c_.q, tokens * m_.width);
    y_ = c_.y + index_ * tokens * m_.width;
    k_ = part(c_.k, tokens * m_.keys_per_token * m_.width);
    v_ = part(c_.v, tokens * m_.keys_per_token * m_.width);
    step_size_ = part(c_.step_size, tokens * m_.keys_per_token);
    fill_ = c_.fill == nullptr ? 0 : c_.fill[stream];
    learn_ = c_.learn == nullptr || c_.learn[stream];
    // In float32 the fields of W are contiguous, and so are those of S.
    w_ = m_.direct ? row_ + m_.w[0].elements : locate(c_, c_.plan.weights);
    s_ = m_.direct ? row_ + m_.s[0].elements : locate(c_, c_.plan.surprise);
    unpacked_ = m_.direct;
    chunks_ = 0;
    loss_ = update_norm_ = committed_ = rejected_ = 0.0F;
  }

  // ---- the packed row ----

  // Copies a field to float32. A barrier follows in the callers.
  __device__ void unpack(const Field& field, int rows, float* to) const {
    for (int at = thread_index(); at < rows * field.columns; at += kThreads) {
      to[at] = load_weight(m_, row_, field, at / field.columns, at % field.columns);
    }
  }
  // Makes float32 copies of W and S if the row has another memory dtype.
  __device__ void unpack_weights() {
    if (unpacked_) return;
    unpacked_ = true;
    for (int p = 0; p < m_.tensors; ++p) {
      unpack(m_.w[p], m_.rows[p], w_ + m_.offsets[p]);
      if (m_.momentum) unpack(m_.s[p], m_.rows[p], s_ + m_.offsets[p]);
    }
    sync_block();
  }
  __device__ float weight(int p, int i, int j) const {
    return unpacked_ ? w_[m_.offsets[p] + i * m_.w[p].columns + j] : load_weight(m_, row_, m_.w[p], i, j);
  }

  // Copies `count` tokens of the call, from token `at`, into the open chunk.
  __device__ void keep(int at, int fill, int count) {
    const std::int64_t from = static_cast<std::int64_t>(at) * m_.keys_per_token;
    const int to = fill * m_.keys_per_token, rows = count * m_.keys_per_token;
    for (int i = thread_index(); i < rows * m_.width; i += kThreads) {
      row_[m_.k + to * m_.width + i] = k_[from * m_.width + i];
      row_[m_.v + to * m_.width + i] = v_[from * m_.width + i];
    }
    for (int i = thread_index(); i < rows; i += kThreads) {
      row_[m_.theta + to + i] = learn_ ? step_size_[from + i] : 0.0F;
    }
    sync_block();
  }

  // ---- retrieval ----

  // The scale of the LayerNorm: the operand's, or gamma + 1. A barrier follows.
  template <class Gamma>
  __device__ void load_scale_of_norm(const Gamma& gamma) {
    if (!m_.layer_norm) return;
    for (int j = thread_index(); j < m_.width; j += kThreads) {
      scale_[j] = m_.fast_norm ? gamma(j) + 1.0F : c_.norm_scale[head_ * m_.width + j];
    }
    sync_block();
  }

  // One warp computes one row y = M(x) from f(x).
  __device__ void finish_row(const float* f, const float* x, float* y) const {
    const Moments norm = m_.layer_norm ? moments(f, m_.width) : Moments{0.0F, 1.0F};
    for (int j = lane_index(); j < m_.width; j += kWarpSize) {
      float value = f[j];
      if (m_.layer_norm) value = (value - norm.mean) * norm.reciprocal * scale_[j];
      y[j] = m_.residual ? value + x[j] : value;
    }
  }

  // y = M_W(q) for tokens [at, at + count).
  __device__ void retrieve(int at, int count) {
    if (count == 0) return;
    if (count > 1) unpack_weights();
    load_scale_of_norm([&](int j) { return weight(m_.depth, 0, j); });
    if (count == 1) {
      retrieve_row(q_ + static_cast<std::int64_t>(at) * m_.width, y_ + static_cast<std::int64_t>(at) * m_.width);
      return;
    }
    for (int first = 0; first < count; first += kMostRows) {
      const int rows = count - first < kMostRows ? count - first : kMostRows;
      const std::int64_t begin = static_cast<std::int64_t>(at + first) * m_.width;
      retrieve_rows(q_ + begin, rows, y_ + begin);
    }
  }

  __device__ void retrieve_rows(const float* q, int rows, float* y) {
    const float* x = q;
    int stride_x = m_.width;
    for (int i = 0; i < m_.depth; ++i) {
      float* next = locate(c_, c_.plan.x[i & 1]);
      const int to = stride(out(i));
      multiply<float>(rows, out(i), in(i), Bounded{x, stride_x, 1, rows, in(i)},
                      Bounded{w_ + m_.offsets[i], 1, out(i), out(i), in(i)}, [&](int row, int column, float sum) {
                        next[row * to + column] = i + 1 < m_.depth ? activate(m_.gelu, sum).value : sum;
                      });
      sync_block();
      x = next;
      stride_x = to;
    }
    for (int row = warp_index(); row < rows; row += kWarps) {
      finish_row(x + row * stride_x, q + row * m_.width, y + row * m_.width);
    }
    sync_block();
  }

  // A thread sums a share of the inputs for one column; the shares are added in order.
  __device__ void retrieve_row(const float* q, float* y) {
    const float* x = q;
    for (int i = 0; i < m_.depth; ++i) {
      float* next = locate(c_, c_.plan.vectors[i & 1]);
      int lanes = kWarpSize;
      while (lanes < kThreads && lanes < out(i)) lanes *= 2;
      const int lane = thread_index() % lanes, share = thread_index() / lanes, shares = kThreads / lanes;
      for (int begin = 0; begin < out(i); begin += lanes) {
        const int column = begin + lane;
        float sum = 0.0F;
        if (column < out(i)) {
#pragma unroll 4
          for (int k = share; k < in(i); k += shares) sum += x[k] * weight(i, k, column);
        }
        sums_[thread_index()] = sum;
        sync_block();
        if (share == 0 && column < out(i)) {
          for (int other = 1; other < shares; ++other) sum += sums_[other * lanes + lane];
          next[column] = i + 1 < m_.depth ? activate(m_.gelu, sum).value : sum;
        }
        sync_block();
      }
      x = next;
    }
    if (warp_index() == 0) finish_row(x, q, y);
    sync_block();
  }

  // ---- the end of a chunk; its last token is `done` - 1 ----

  __device__ void complete(int done, bool whole) {
    unpack_weights();
    const int chunk = chunks_++;
    const std::int64_t of_chunk = (static_cast<std::int64_t>(index_) * c_.most_chunks + chunk) * elements();
    if (c_.initial_weights != nullptr) {
      for (int i = thread_index(); i < elements(); i += kThreads) c_.initial_weights[of_chunk + i] = w_[i];
    }
    if (!learn_) return;
    const std::int64_t first = static_cast<std::int64_t>(done - m_.chunk) * m_.keys_per_token;
    const float* k = whole ? k_ + first * m_.width : row_ + m_.k;
    const float* v = whole ? v_ + first * m_.width : row_ + m_.v;
    const float* theta = whole ? step_size_ + first : row_ + m_.theta;
    const int rows = m_.chunk * m_.keys_per_token - (m_.lookahead ? 1 : 0);
    differentiate(point(done - 1, of_chunk), k, m_.lookahead ? v + m_.width : v, theta, rows);

    const bool guarded = c_.update_limit != nullptr, staged = guarded || !m_.direct;
    w_next_ = staged ? locate(c_, c_.plan.weights_next) : w_;
    s_next_ = staged ? locate(c_, c_.plan.surprise_next) : s_;
    float squares = 0.0F;
    for (int p = 0; p < m_.tensors; ++p) squares += update_tensor(p, done - 1, rows);
    const float norm = square_root(squares);
    const bool commit = !guarded || norm <= c_.update_limit[stream_];  // false for NaN
    if (commit) {
      if (staged) commit_weights();
      if (m_.batch_size > 0 && (fill_ + done) % m_.batch_size == 0) move_point();
    }
    if (!(norm <= update_norm_) && !is_nan(update_norm_)) update_norm_ = norm;  // keeps a NaN
    (commit ? committed_ : rejected_) += 1.0F;
    sync_block();
  }

  // Writes the staged update to the state.
  __device__ void commit_weights() {
    sync_block();
    if (m_.direct) {
      for (int i = thread_index(); i < elements(); i += kThreads) {
        w_[i] = w_next_[i];
        if (m_.momentum) s_[i] = s_next_[i];
      }
    } else {
      const bool counts = m_.rounding == Rounding::kStochastic;
      const std::uint32_t updates = counts ? bits_of(row_[m_.chunk_updates]) : 0U;
      for (int p = 0; p < m_.tensors; ++p) {
        store_tensor(p, false, updates);
        if (m_.momentum) store_tensor(p, true, updates);
      }
      sync_block();
      if (counts && thread_index() == 0) row_[m_.chunk_updates] = float_of(updates + 1U);
    }
    sync_block();
  }

  // Rounds a tensor of the staged W or S to the packed row, and its float32 copy. A warp has a scale block.
  __device__ void store_tensor(int p, bool of_s, std::uint32_t updates) {
    const Field &field = of_s ? m_.s[p] : m_.w[p], &error = of_s ? m_.es[p] : m_.ew[p];
    const float* from = (of_s ? s_next_ : w_next_) + m_.offsets[p];
    float* to = (of_s ? s_ : w_) + m_.offsets[p];
    const bool stochastic = m_.rounding == Rounding::kStochastic;
    const NoiseKeys keys =
        noise_keys(m_.seed, static_cast<std::uint32_t>(head_), static_cast<std::uint32_t>(p), of_s, updates);
    for (int block = warp_index(); block < m_.rows[p] * field.blocks; block += kWarps) {
      const int i = block / field.blocks, j = block % field.blocks * kWarpSize + lane_index();
      const bool inside = j < field.columns;
      float x = inside ? from[i * field.columns + j] : 0.0F;
      const float stored = store_block(m_, row_, field, i, j, inside, stochastic, keys, x);
      if (inside) to[i * field.columns + j] = stored;
      if (m_.rounding == Rounding::kErrorFeedback) {
        store_block(m_, row_, error, i, j, inside, stochastic, keys, x - stored);
      }
    }
  }

  // The gradient point takes the elements and scales of W unchanged.
  __device__ void move_point() {
    sync_block();
    for (int i = thread_index(); i < m_.weight_words; i += kThreads) {
      row_[m_.g[0].elements + i] = row_[m_.w[0].elements + i];
    }
    sync_block();
  }

  // The weights at which the gradient is taken.
  __device__ const float* point(int token, std::int64_t of_chunk) {
    const bool shifted = c_.previous != nullptr;
    const float* own = m_.keeps_point && m_.direct ? row_ + m_.g[0].elements : w_;
    if (!shifted && (m_.direct || !m_.keeps_point)) return own;
    float* made = locate(c_, c_.plan.point);
    const float rho = shifted ? c_.previous_gate[static_cast<std::int64_t>(index_) * c_.indices.tokens + token] : 0.0F;
    for (int p = 0; p < m_.tensors; ++p) {
      const int columns = m_.w[p].columns;
      for (int at = thread_index(); at < m_.rows[p] * columns; at += kThreads) {
        const int i = m_.offsets[p] + at;
        float value =
            m_.keeps_point && !m_.direct ? load_weight(m_, row_, m_.g[p], at / columns, at % columns) : own[i];
        if (shifted) value += rho * c_.previous[of_chunk + i];
        made[i] = value;
      }
    }
    sync_block();
    return made;
  }

  // The gradient of the loss, in factors: matrix i has the gradient layer_input_i^T output_grad_i.
  __device__ void differentiate(const float* weights, const float* k, const float* v, const float* theta, int rows) {
    const int last = m_.depth - 1;
    keys_ = k;
    load_scale_of_norm([&](int j) { return weights[m_.offsets[m_.depth] + j]; });
    for (int i = 0; i < m_.depth; ++i) {
      float* values = i < last ? locate(c_, c_.plan.layer_input[i + 1]) : output_grad(i);
      float* derivatives = i < last ? locate(c_, c_.plan.derivative[i]) : nullptr;
      const int to = stride(out(i));
      multiply<float>(rows, out(i), in(i), Bounded{layer_input(i), input_stride(i), 1, rows, in(i)},
                      Bounded{weights + m_.offsets[i], 1, out(i), out(i), in(i)}, [&](int row, int column, float sum) {
                        if (i < last) {
                          const Activated act = activate(m_.gelu, sum);
                          derivatives[row * to + column] = act.derivative;
                          sum = act.value;
                        }
                        values[row * to + column] = sum;
                      });
      sync_block();
    }
    compute_errors(k, v, theta, rows);
    for (int i = last; i > 0; --i) {
      const float* derivatives = locate(c_, c_.plan.derivative[i - 1]);
      float* to = output_grad(i - 1);
      const int across = stride(in(i));
      multiply<float>(rows, in(i), out(i), Bounded{output_grad(i), stride(out(i)), 1, rows, out(i)},
                      Bounded{weights + m_.offsets[i], out(i), 1, in(i), out(i)}, [&](int row, int column, float sum) {
                        to[row * across + column] = sum * derivatives[row * across + column];
                      });
      sync_block();
    }
  }

  // Replaces the rows f(k) by the gradients of the loss there. A warp has a row, and its own sum of gamma's gradient.
  __device__ void compute_errors(const float* k, const float* v, const float* theta, int rows) {
    const int last = m_.depth - 1, across = stride(m_.width);
    float* gamma = m_.fast_norm ? gamma_ + warp_index() * m_.width : nullptr;
    for (int j = lane_index(); j < m_.width && gamma != nullptr; j += kWarpSize) gamma[j] = 0.0F;
    float loss = 0.0F;
    for (int row = warp_index(); row < rows; row += kWarps) {
      float* f = output_grad(last) + row * across;
      loss += m_.loss_scale * error_row(f, k + row * m_.width, v + row * m_.width, m_.loss_scale * theta[row], gamma);
    }
    sync_block();
    if (lane_index() == 0) sums_[warp_index()] = loss;
    sync_block();
    for (int warp = 0; warp < kWarps; ++warp) loss_ += sums_[warp];
    sync_block();
  }

  // One warp replaces f = f(k) by the gradient of weight || M(k) - v ||^2 at f's output, and adds that of gamma. Every
  // lane receives || M(k) - v ||^2.
  __device__ float error_row(float* f, const float* k, const float* v, float weight, float* gamma) const {
    const Moments norm = m_.layer_norm ? moments(f, m_.width) : Moments{0.0F, 1.0F};
    float loss = 0.0F, sum = 0.0F, sum_unit = 0.0F;
    for (int j = lane_index(); j < m_.width; j += kWarpSize) {
      const float unit = (f[j] - norm.mean) * norm.reciprocal, scale = m_.layer_norm ? scale_[j] : 1.0F;
      float made = m_.layer_norm ? unit * scale : f[j];
      if (m_.residual) made += k[j];
      const float error = made - v[j], at_output = weight * 2.0F * error, gradient = at_output * scale;
      loss += error * error;
      sum += gradient;
      sum_unit += gradient * unit;
      if (gamma != nullptr) gamma[j] += at_output * unit;
      if (!m_.layer_norm) f[j] = gradient;
    }
    loss = sum_over_warp(loss);
    if (!m_.layer_norm) return loss;
    sum = sum_over_warp(sum) / static_cast<float>(m_.width);
    sum_unit = sum_over_warp(sum_unit) / static_cast<float>(m_.width);
    for (int j = lane_index(); j < m_.width; j += kWarpSize) {
      // Recomputes the gradient instead of storing it.
      const float unit = (f[j] - norm.mean) * norm.reciprocal;
      float made = unit * scale_[j];
      if (m_.residual) made += k[j];
      const float gradient = weight * 2.0F * (made - v[j]) * scale_[j];
      f[j] = norm.reciprocal * (gradient - sum - unit * sum_unit);
    }
    return loss;
  }

  // Calls body(gradient, row, column) for each element of tensor p's gradient, each on one thread, and always the same.
  template <class Body>
  __device__ void each_gradient(int p, int rows, const Body& body) {
    if (p == m_.depth) {
      for (int j = thread_index(); j < m_.width; j += kThreads) {
        float sum = 0.0F;
        for (int warp = 0; warp < kWarps; ++warp) sum += gamma_[warp * m_.width + j];
        body(sum, 0, j);
      }
      return;
    }
    multiply<float>(in(p), out(p), rows, Bounded{layer_input(p), 1, input_stride(p), in(p), rows},
                    Bounded{output_grad(p), 1, stride(out(p)), out(p), rows},
                    [&](int i, int j, float sum) { body(sum, i, j); });
  }

  // The factor by which grad_clamp scales a gradient of this norm.
  __device__ float clamped(float norm) const {
    if (norm == 0.0F) return 1.0F;
    const float half = m_.grad_clamp / 2.0F;
    return (hyperbolic_tangent(norm / half) * half + half) / norm;
  }

  // Updates tensor p of W and S, in place or staged. Returns the squared Frobenius norm of the change of W.
  __device__ float update_tensor(int p, int token, int rows) {
    const std::int64_t at_token = static_cast<std::int64_t>(index_) * c_.indices.tokens + token;
    float by = c_.modulation == nullptr ? -1.0F : -c_.modulation[at_token * m_.tensors + p];
    if (m_.grad_clamp != 0.0F) {
      float squares = 0.0F;
      each_gradient(p, rows, [&](float g, int, int) { squares += g * g; });
      by *= clamped(square_root(sum_over_block(squares, sums_)));
    }
    const float eta = m_.momentum ? c_.momentum[at_token] : 0.0F, kept = 1.0F - c_.forget_gate[at_token];
    const bool feedback = m_.rounding == Rounding::kErrorFeedback, orthogonal = m_.orthogonalise > 0 && p < m_.depth;
    const int columns = m_.w[p].columns, begin = m_.offsets[p];
    float squares = 0.0F;
    const auto advance = [&](float update, int i, int j) {
      const int at = begin + i * columns + j;
      const float old = feedback ? w_[at] + load_weight(m_, row_, m_.ew[p], i, j) : w_[at];
      const float made = kept * old + update, change = made - old;
      squares += change * change;
      w_next_[at] = made;
    };
    float* moved = m_.momentum ? s_next_ + begin : locate(c_, c_.plan.update);
    each_gradient(p, rows, [&](float g, int i, int j) {
      const int at = i * columns + j;
      float update = by * g;
      if (m_.momentum) {
        const float old = feedback ? s_[begin + at] + load_weight(m_, row_, m_.es[p], i, j) : s_[begin + at];
        update += eta * old;
      }
      if (m_.momentum || orthogonal) moved[at] = update;
      if (orthogonal) {
        squares += update * update;
      } else {
        advance(update, i, j);
      }
    });
    if (orthogonal) {
      const float norm = square_root(sum_over_block(squares, sums_));
      sync_block();
      const Orthogonal update = orthogonalise<V>({locate(c_, c_.plan.iterate[0]), locate(c_, c_.plan.iterate[1]),
                                                  locate(c_, c_.plan.square[0]), locate(c_, c_.plan.square[1])},
                                                 moved, in(p), out(p), norm, m_.orthogonalise);
      squares = 0.0F;
      for (int at = thread_index(); at < in(p) * columns; at += kThreads) {
        const int i = at / columns, j = at % columns;
        advance(update(i, j), i, j);
      }
    }
    const float sum = sum_over_block(squares, sums_);
    sync_block();
    return sum;
  }

  const ChunkCall& c_;
  const ChunkModel& m_;
  float *sums_, *scale_, *gamma_;

  int stream_ = 0, head_ = 0, index_ = 0, chunks_ = 0;
  std::int64_t fill_ = 0;
  bool learn_ = true, unpacked_ = true;
  float *row_ = nullptr, *w_ = nullptr, *s_ = nullptr, *w_next_ = nullptr, *s_next_ = nullptr, *y_ = nullptr;
  const float *q_ = nullptr, *keys_ = nullptr, *k_ = nullptr, *v_ = nullptr, *step_size_ = nullptr;
  float loss_ = 0.0F, update_norm_ = 0.0F, committed_ = 0.0F, rejected_ = 0.0F;
};

// Blocks loop over the heads of all streams.
template <class V>
__global__ void __launch_bounds__(kThreads, 1) update_chunks(const __grid_constant__ ChunkCall call) {
  ChunkRun<V> run(call);
  const int work = call.indices.streams * call.heads;
  for (int each = block_index(); each < work; each += block_count()) {
    const int stream = each / call.heads;
    const int wrong = wrong_operand(call, stream);
    if (wrong == 0) {
      run.run(stream, each % call.heads);
      continue;
    }
    const std::int64_t size = static_cast<std::int64_t>(call.indices.tokens) * call.model.width;
    for (std::int64_t i = thread_index(); i < size; i += kThreads) call.y[each * size + i] = not_a_number();
    if (call.stats != nullptr && thread_index() < kStatCount) {
      call.stats[each * kStatCount + thread_index()] = not_a_number();
    }
    if (thread_index() == 0) report(call.status, wrong);
  }
}

}  // namespace titans::kernels::cuda
