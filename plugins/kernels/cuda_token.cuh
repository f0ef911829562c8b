// Mode update for calls of one token, as in decoding. Equations and names are those of docs/operator.md.
//
// Inside a chunk, a token only reads W and S and appends a row to the open chunk. The token that completes the chunk
// also runs the chunk update. The work is float32 and bound by memory bandwidth. If W and S fit in shared memory, a
// token loads 8 bytes per weight (W and S in float32) and the open chunk's rows; otherwise later layers are read again.
// The first layer serves key and query in one pass. In a vector-matrix product, each lane sums one column over a warp's
// rows, and the warps' sums are added in memory. Several blocks may share a head as in cuda_blocks.cuh.
#pragma once

#include "plugins/kernels/cuda_call.cuh"

namespace titans::kernels::cuda {

// A part of W or S: a copy in shared memory, or the packed row itself.
template <bool kShared>
struct Weights {
  const Model* model;
  const float* copy;  // [rows][columns] of the part
  const float* row;
  Field field;
  Part part;
  __device__ float operator()(int r, int j) const {
    if constexpr (kShared) return copy[r * part.out + j];
    return load_weight(*model, row, field, part.in_begin + r, part.out_begin + j);
  }
};

// kShared: W, S and the token's own rows are in shared memory. Otherwise W and S are read in place from the packed row.
template <class In, bool kShared>
class TokenRun {
 public:
  __device__ TokenRun(const Call& call, Group& group)
      : c_(call), m_(call.model), plan_(call.plan), group_(group), last_(m_.depth - 1) {
    int widest = 0;
    for (int i = 0; i <= m_.depth; ++i) widest = widest < m_.widths[i] ? m_.widths[i] : widest;
    width_ = pad(widest);
    reduction_ = locate<float, kShared>(c_, plan_.vectors);
    rows_ = reduction_ + kReductionWords;
    chunk_.e = rows_ + (3 + 4 * m_.depth) * width_;
    chunk_.a = chunk_.e + pad(m_.chunk);
    scores_ = chunk_.a + pad(m_.chunk);
    sums_ = locate<float, kShared>(c_, plan_.coefficients);
    sums_stride_ = width_ < pad(m_.chunk) ? pad(m_.chunk) : width_;
    result_ = locate<float>(c_, plan_.exchange);
    partial_y_ = result_ + m_.width;
    partial_scores_ = partial_y_ + m_.width;
    norm_ = partial_scores_ + pad(m_.chunk);
  }

  __device__ void run(const Item& item) {
    row_ = row_of(c_, item);
    noise_source_ = noise_source_of(m_, row_, item);
    const std::int64_t first = static_cast<std::int64_t>(item.index) * m_.width;
    In* y = static_cast<In*>(c_.y) + first;
    const bool counts = c_.valid == nullptr || c_.valid[item.stream] == 1;
    learn_ = c_.learn == nullptr || c_.learn[item.stream];
    fill_ = c_.fill == nullptr ? 0 : static_cast<int>(c_.fill[item.stream]);
    Counts numbers;
    if (counts) {
      const In* q = static_cast<const In*>(c_.q) + first;
      const In* k = static_cast<const In*>(c_.k) + first;
      const In* v = static_cast<const In*>(c_.v) + first;
      const float* scale = c_.norm_scale == nullptr ? nullptr : c_.norm_scale + item.head * m_.width;
      load(q, k);
      take_coefficients(c_.step_size[item.index], c_.momentum[item.index], 1.0F - c_.forget_gate[item.index]);
      first_layer();
      if (learn_) numbers.loss = surprise(k, v, scale);
      append();
      retrieve(q, scale, y);
      if (fill_ + 1 == m_.chunk) {
        const float* limit = c_.update_limit == nullptr ? nullptr : c_.update_limit + item.stream;
        const auto update_all = [&](bool write) { return chunk_update(write); };
        const bool updated = close_chunk(c_, group_, chunk_, limit, reduction_, norm_, numbers, update_all);
        if (updated && group_.rank == 0 && thread_index() == 0)
          store_chunk_updates(m_, row_, noise_source_.chunk_updates + 1);
      }
      store_coefficients();
    } else if (group_.rank == 0) {
      for (int j = thread_index(); j < m_.width; j += kThreads) y[j] = to_value<In>(0.0F);
    }
    if (c_.stats != nullptr && group_.rank == 0 && thread_index() == 0) {
      numbers.store(c_.stats + item.index * kStatCount);
    }
    sync_group(group_);  // all reads of this block's memory are done
  }

 private:
  __device__ Part part(int i) const { return part_of(m_, plan_.share, group_.rank, i); }
  // This token's vectors, per layer.
  __device__ float* query() const { return rows_; }
  __device__ float* key() const { return rows_ + width_; }
  __device__ float* layer_input(int i) const { return i == 0 ? key() + part(0).in_begin : rows_ + (3 + i) * width_; }
  __device__ float* x(int i) const { return i == 0 ? query() + part(0).in_begin : rows_ + (3 + m_.depth + i) * width_; }
  __device__ float* output_grad(int i) const { return rows_ + (3 + 2 * m_.depth + i) * width_; }
  __device__ float* derivative(int i) const { return rows_ + (3 + 3 * m_.depth + i) * width_; }
  __device__ float* answer() const { return rows_ + 2 * width_; }

  __device__ Weights<kShared> weights(const Place& place, const Field& field, int i) const {
    return {&m_, locate<float, kShared>(c_, place), row_, field, part(i)};
  }
  __device__ Weights<kShared> w(int i) const { return weights(plan_.w[i], m_.w[i], i); }
  __device__ Weights<kShared> s(int i) const { return weights(plan_.s[i], m_.s[i], i); }

  // ---- loops over a matrix ----

  // Calls use(j, sums) for each column j. term(r, j, sums) adds row r's terms. Each warp sums every kWarps-th row.
  template <int kSums, class Term, class Use>
  __device__ void sum_rows(int rows, int columns, const Term& term, const Use& use) {
    for (int j = lane_index(); j < columns; j += kWarpSize) {
      float sums[kSums] = {};
#pragma unroll 4
      for (int r = warp_index(); r < rows; r += kWarps) term(r, j, sums);
#pragma unroll
      for (int n = 0; n < kSums; ++n) sums_[(n * kWarps + warp_index()) * sums_stride_ + j] = sums[n];
    }
    sync_block();
    for (int j = thread_index(); j < columns; j += kThreads) {
      float sums[kSums] = {};
      for (int warp = 0; warp < kWarps; ++warp) {
#pragma unroll
        for (int n = 0; n < kSums; ++n) sums[n] += sums_[(n * kWarps + warp) * sums_stride_ + j];
      }
      use(j, sums);
    }
    sync_block();
  }

  // Calls use(r, sum of term(r, j) over the columns j) for each row r. Rows are dealt out to the warps.
  template <class Term, class Use>
  __device__ void sum_columns(int rows, int columns, const Term& term, const Use& use) {
    for (int r = warp_index(); r < rows; r += kWarps) {
      float sum = 0.0F;
      for (int j = lane_index(); j < columns; j += kWarpSize) sum += term(r, j);
      sum = sum_over_warp(sum);
      if (lane_index() == 0) use(r, sum);
    }
    sync_block();
  }

  // ---- the packed row ----

  __device__ void load(const In* q, const In* k) {
    if constexpr (kShared) {
#pragma unroll 1
      for (int each = 0; each < 2 * m_.depth; ++each) {
        const int i = each / 2;
        each % 2 == 0 ? stage(plan_.w[i], m_.w[i], i) : stage(plan_.s[i], m_.s[i], i);
      }
    }
    for (int j = thread_index(); j < m_.width; j += kThreads) {
      query()[j] = to_float(q[j]);
      key()[j] = to_float(k[j]);
    }
    wait_for_copies();
    sync_block();
  }

  __device__ void stage(const Place& place, const Field& field, int i) {
    const Part p = part(i);
    float* to = locate<float, kShared>(c_, place);
    constexpr int kFour = 4;
    const bool fours = field.columns % kFour == 0 && p.out % kFour == 0;
    const float* first = row_ + field.elements + p.in_begin * field.columns + p.out_begin;
    const int across = p.out / kFour;
    if (m_.memory_dtype == MemoryDtype::kFloat32 && fours &&
        reinterpret_cast<std::uintptr_t>(first) % (kFour * sizeof(float)) == 0) {
      for (int at = thread_index(); at < p.in * across; at += kThreads) {
        const int r = at / across, j = at % across * kFour;
        copy_16(to + r * p.out + j, first + r * field.columns + j);
      }
      return;
    }
    if (fours) {
#pragma unroll 4
      for (int at = thread_index(); at < p.in * across; at += kThreads) {
        const int r = at / across, j = at % across * kFour;
        *reinterpret_cast<Four*>(to + r * p.out + j) = load_four(m_, row_, field, p.in_begin + r, p.out_begin + j);
      }
      return;
    }
#pragma unroll 4
    for (int at = thread_index(); at < p.in * p.out; at += kThreads) {
      to[at] = load_weight(m_, row_, field, p.in_begin + at / p.out, p.out_begin + at % p.out);
    }
  }

  __device__ void take_coefficients(float theta, float eta, float keep) {
    const bool open = fill_ > 0;
    for (int at = thread_index(); at < m_.chunk; at += kThreads) {
      float e = open && at < fill_ ? row_[m_.e + at] : 0.0F, a = open && at < fill_ ? row_[m_.a + at] : 0.0F;
      if (learn_ && at <= fill_) {
        e = at == fill_ ? theta : eta * e;
        a = keep * a + e;
      }
      chunk_.e[at] = e;
      chunk_.a[at] = a;
    }
    chunk_.m = open ? row_[m_.m] : 1.0F;
    chunk_.f = open ? row_[m_.f] : 0.0F;
    chunk_.beta = open ? row_[m_.beta] : 1.0F;
    if (learn_) {
      chunk_.m *= eta;
      chunk_.f = keep * chunk_.f + chunk_.m;
      chunk_.beta *= keep;
    }
    sync_block();
  }

  // No barrier is needed before this write: the other blocks have read these values before their first barrier.
  __device__ void store_coefficients() {
    if (group_.rank != 0) return;
    for (int at = thread_index(); at < m_.chunk; at += kThreads) {
      row_[m_.e + at] = chunk_.e[at];
      row_[m_.a + at] = chunk_.a[at];
    }
    if (thread_index() != 0) return;
    row_[m_.m] = chunk_.m;
    row_[m_.f] = chunk_.f;
    row_[m_.beta] = chunk_.beta;
  }

  // Appends the token's vectors to the open chunk, or zeros if it learns nothing. All blocks hold the same copy of some
  // rows, so the first block stores those.
  __device__ void append() {
    for (int i = 0; i < m_.depth; ++i) {
      const Part p = part(i);
      float* to_layer_input = row_ + m_.layer_input[i] + fill_ * m_.widths[i] + p.in_begin;
      float* to_output_grad = row_ + m_.output_grad[i] + fill_ * m_.widths[i + 1] + p.out_begin;
      if (!learn_) {
        for (int j = thread_index(); j < p.in; j += kThreads) layer_input(i)[j] = 0.0F;
        for (int j = thread_index(); j < p.out; j += kThreads) output_grad(i)[j] = 0.0F;
      }
      if (i == last_ || group_.rank == 0) {
        for (int j = thread_index(); j < p.in; j += kThreads) to_layer_input[j] = layer_input(i)[j];
      }
      if (i == last_ - 1 || group_.rank == 0) {
        for (int j = thread_index(); j < p.out; j += kThreads) to_output_grad[j] = output_grad(i)[j];
      }
    }
    sync_block();
  }

  // ---- surprise and retrieval ----

  // One pass over W and S of the first layer serves key and query.
  __device__ void first_layer() {
    const auto of_w = w(0), of_s = s(0);
    const float *k = layer_input(0), *q = x(0);
    float* h = last_ == 0 ? answer() : x(1);
    float* z = last_ == 0 ? output_grad(0) : layer_input(1);
    float* slope = derivative(0);
    sum_rows<3>(
        part(0).in, part(0).out,
        [&](int r, int j, float (&sums)[3]) {
          const float weight = of_w(r, j);
          sums[0] += k[r] * weight;
          sums[1] += q[r] * weight;
          sums[2] += q[r] * of_s(r, j);
        },
        [&](int j, const float (&sums)[3]) {
          h[j] = chunk_.beta * sums[1] + chunk_.f * sums[2];
          keep_activation(0, j, sums[0], z, slope);
        });
  }

  // Handles z of layer i for the key. Hidden layers apply the activation.
  __device__ void keep_activation(int i, int j, float z, float* to, float* slope) const {
    if (i == last_) {
      to[j] = z;
      return;
    }
    const Activated act = activate(m_.gelu, z);
    to[j] = act.value;
    slope[j] = act.derivative;
  }

  __device__ float surprise(const In* k, const In* v, const float* scale) {
    for (int i = 1; i <= last_; ++i) {
      const auto of_w = w(i);
      const float* input = layer_input(i);
      float *z = i == last_ ? output_grad(i) : layer_input(i + 1), *slope = derivative(i);
      sum_rows<1>(
          part(i).in, part(i).out, [&](int r, int j, float (&sums)[1]) { sums[0] += input[r] * of_w(r, j); },
          [&](int j, const float (&sums)[1]) { keep_activation(i, j, sums[0], z, slope); });
    }
    float* error = output_grad(last_);
    if (group_.size > 1) {
      for (int j = thread_index(); j < m_.width; j += kThreads) result_[j] = error[j];
      sync_group(group_);
      for (int j = thread_index(); j < m_.width; j += kThreads) error[j] = sum_over_group(c_, group_, result_ + j);
      sync_block();
    }
    if (warp_index() == 0) {
      const float loss = error_row(m_, error, k, v, scale, error);
      if (lane_index() == 0) *reduction_ = loss;
    }
    sync_block();
    const float loss = *reduction_;
    for (int i = last_; i > 0; --i) {
      const auto of_w = w(i);
      const float *from = output_grad(i), *slope = derivative(i - 1);
      float* to = output_grad(i - 1);
      sum_columns(
          part(i).in, part(i).out, [&](int r, int j) { return of_w(r, j) * from[j]; },
          [&](int r, float sum) { to[r] = sum * slope[r]; });
    }
    return loss;
  }

  // Row `at` of the open chunk. This token's own row is still in the block's memory.
  __device__ const float* layer_input_row(int i, int at) const {
    return at == fill_ ? layer_input(i) : row_ + m_.layer_input[i] + at * m_.widths[i] + part(i).in_begin;
  }
  __device__ const float* output_grad_row(int i, int at) const {
    return at == fill_ ? output_grad(i) : row_ + m_.output_grad[i] + at * m_.widths[i + 1] + part(i).out_begin;
  }

  // h <- h - sum_s a_s (x . layer_input_s) output_grad_s. scores_ has the factors of output_grad.
  __device__ void add_surprises(int i, float* h) {
    const float *rows = row_ + m_.output_grad[i] + part(i).out_begin, *own = output_grad(i);
    const int width = m_.widths[i + 1];
    sum_rows<1>(
        fill_, part(i).out, [&](int at, int j, float (&sums)[1]) { sums[0] += scores_[at] * rows[at * width + j]; },
        [&](int j, const float (&sums)[1]) { h[j] -= sums[0] + scores_[fill_] * own[j]; });
  }

  __device__ void retrieve(const In* q, const float* scale, In* y) {
    for (int i = 0; i <= last_; ++i) {
      const bool shared = i == last_ && group_.size > 1;
      const float* input = x(i);
      float* h = i == last_ ? answer() : x(i + 1);
      if (i > 0) {
        const auto of_w = w(i), of_s = s(i);
        sum_rows<2>(
            part(i).in, part(i).out,
            [&](int r, int j, float (&sums)[2]) {
              sums[0] += input[r] * of_w(r, j);
              sums[1] += input[r] * of_s(r, j);
            },
            [&](int j, const float (&sums)[2]) { h[j] = chunk_.beta * sums[0] + chunk_.f * sums[1]; });
      }
      sum_columns(
          fill_ + 1, part(i).in, [&](int at, int j) { return input[j] * layer_input_row(i, at)[j]; },
          [&](int at, float sum) { (shared ? partial_scores_ : scores_)[at] = shared ? sum : chunk_.a[at] * sum; });
      if (shared) {
        for (int j = thread_index(); j < m_.width; j += kThreads) partial_y_[j] = h[j];
        sync_group(group_);
        if (group_.rank != 0) return;
        for (int at = thread_index(); at <= fill_; at += kThreads) {
          scores_[at] = chunk_.a[at] * sum_over_group(c_, group_, partial_scores_ + at);
        }
        for (int j = thread_index(); j < m_.width; j += kThreads) h[j] = sum_over_group(c_, group_, partial_y_ + j);
        sync_block();
      }
      add_surprises(i, h);
      if (i == last_) break;
      for (int j = thread_index(); j < part(i).out; j += kThreads) h[j] = activate(m_.gelu, h[j]).value;
      sync_block();
    }
    if (warp_index() == 0) finish_row(m_, answer(), q, scale, y);
  }

  // ---- the end of a chunk ----

  // Computes W and S after the chunk and writes them to the packed row. Returns this thread's part of the squared
  // change of W. A warp takes 32 columns of kRows rows, which share the loads of output_grad.
  __device__ float chunk_update(bool write) {
    constexpr int kRows = 4;
    float squares = 0.0F;
    for (int i = 0; i < m_.depth; ++i) {
      const Part p = part(i);
      const auto of_w = w(i), of_s = s(i);
      const int across = (p.out + kWarpSize - 1) / kWarpSize;
      for (int tile = warp_index(); tile < (p.in + kRows - 1) / kRows * across; tile += kWarps) {
        const int r0 = tile / across * kRows, first = tile % across * kWarpSize, j = first + lane_index();
        const bool inside = j < p.out;
        float by_a[kRows] = {}, by_e[kRows] = {};
        for (int t = 0; t < m_.chunk; ++t) {
          if (chunk_.a[t] == 0.0F && chunk_.e[t] == 0.0F) continue;  // frozen tokens
          const float value = inside ? output_grad_row(i, t)[j] : 0.0F;
          const float* inputs = layer_input_row(i, t) + r0;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float product = r0 + r < p.in ? inputs[r] * value : 0.0F;
            by_a[r] += chunk_.a[t] * product;
            by_e[r] += chunk_.e[t] * product;
          }
        }
        if (m_.memory_dtype == MemoryDtype::kFloat32) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (!inside || r0 + r >= p.in) continue;
            const int index = (p.in_begin + r0 + r) * m_.widths[i + 1] + p.out_begin + j;
            const float old = of_w(r0 + r, j), surprise = of_s(r0 + r, j);
            const float now = chunk_.beta * old + chunk_.f * surprise - by_a[r];
            squares += (now - old) * (now - old);
            if (!write) continue;
            row_[m_.w[i].elements + index] = now;
            row_[m_.s[i].elements + index] = chunk_.m * surprise - by_e[r];
          }
          continue;
        }
#pragma unroll 1
        for (int r = 0; r < kRows; ++r) {
          if (r0 + r >= p.in) break;
          const int row = p.in_begin + r0 + r, column = p.out_begin + j;
          float old = inside ? of_w(r0 + r, j) : 0.0F, surprise = inside ? of_s(r0 + r, j) : 0.0F;
          if (inside && m_.rounding == Rounding::kErrorFeedback) {
            old += load_weight(m_, row_, m_.ew[i], row, column);
            surprise += load_weight(m_, row_, m_.es[i], row, column);
          }
          const float now = chunk_.beta * old + chunk_.f * surprise - by_a[0];
          if (inside) squares += (now - old) * (now - old);
          const float next = chunk_.m * surprise - by_e[0];
#pragma unroll 1
          for (int matrix = 0; write && matrix < 2; ++matrix) {
            keep_block(m_, noise_source_, row_, i, matrix == 1, row, column, inside, matrix == 0 ? now : next);
          }
          // Shifts the next row to the front, because registers cannot be indexed.
#pragma unroll
          for (int n = 0; n + 1 < kRows; ++n) {
            by_a[n] = by_a[n + 1];
            by_e[n] = by_e[n + 1];
          }
        }
      }
    }
    return squares;
  }

  const Call& c_;
  const Model& m_;
  const Plan& plan_;
  Group& group_;
  int last_, width_, sums_stride_;
  float *reduction_, *rows_, *scores_, *sums_;
  float *result_, *partial_y_, *partial_scores_, *norm_;  // in the exchange area
  float* row_ = nullptr;
  NoiseSource noise_source_;
  bool learn_ = true;
  int fill_ = 0;
  Coefficients chunk_;
};

template <class In, bool kShared>
__global__ void __launch_bounds__(kThreads, kShared ? 2 : 1) update_token(const __grid_constant__ Call call) {
  run_items<In, TokenRun<In, kShared>>(call);
}

}  // namespace titans::kernels::cuda
