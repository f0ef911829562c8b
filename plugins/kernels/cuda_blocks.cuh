// Mode update for calls of several tokens. Equations and names are those of docs/operator.md.
//
// The call is cut into blocks of up to plan.rows tokens, and each block is a handful of matmuls per layer on the tensor
// cores. W and S move between global and shared memory once per call: 8 bytes per weight in and 8 out with float32.
// They stay in shared memory in between. A warp computes tiles of a result, and a thread holds a few elements of each
// tile.
//
// Several thread blocks may share a head. Each then holds a slice of the last layer's inputs, and of the previous
// layer's outputs. The network's output is a sum over the blocks, so they synchronize twice per block of tokens: once
// for the error and once for the answer.
#pragma once

#include "plugins/kernels/cuda_call.cuh"
#include "plugins/kernels/cuda_product.cuh"

namespace titans::kernels::cuda {

// Clamps the row index: tiles may read past the last row, and get the last row again.
template <class V>
struct AlongRowsUpTo {
  const V* data;
  int stride, last;
  template <class W>
  __device__ Word<W> word(int i, int k) const {
    return AlongRows<V>{data + (i < last ? i : last) * stride, 0}.template word<W>(0, k);
  }
};

// kShared: everything except the exchange area is in shared memory.
template <class In, bool kShared>
class BlocksRun {
  using V = Operand<In>;

 public:
  __device__ BlocksRun(const Call& call, Group& group)
      : c_(call), m_(call.model), plan_(call.plan), group_(group), last_(m_.depth - 1), chunk_pad_(pad(m_.chunk)) {
    float* vectors = locate<float, kShared>(c_, plan_.vectors);
    reduction_ = vectors;
    theta_ = vectors + kReductionWords;
    eta_ = theta_ + plan_.rows;
    keep_ = eta_ + plan_.rows;
    rows_f_ = keep_ + plan_.rows;
    rows_beta_ = rows_f_ + plan_.rows;
    chunk_.e = rows_beta_ + plan_.rows;
    chunk_.a = chunk_.e + chunk_pad_;
    rows_a_ = locate<float, kShared>(c_, plan_.coefficients);
    result_ = locate<float>(c_, plan_.exchange);
    partial_y_ = result_ + plan_.rows * m_.width;
    partial_scores_ = partial_y_ + plan_.rows * m_.width;
    norm_ = group_.size > 1 ? partial_scores_ + plan_.rows * chunk_pad_ : partial_y_;
    q_ = locate<V, kShared>(c_, plan_.q);
    scores_ = locate<V, kShared>(c_, plan_.scores);
  }

  __device__ void run(const Item& item) {
    row_ = row_of(c_, item);
    noise_source_ = noise_source_of(m_, row_, item);
    const std::int64_t first = static_cast<std::int64_t>(item.index) * c_.tokens;
    q_in_ = static_cast<const In*>(c_.q) + first * m_.width;
    k_in_ = static_cast<const In*>(c_.k) + first * m_.width;
    v_in_ = static_cast<const In*>(c_.v) + first * m_.width;
    y_out_ = static_cast<In*>(c_.y) + first * m_.width;
    gates_ = first;
    norm_scale_ = c_.norm_scale == nullptr ? nullptr : c_.norm_scale + item.head * m_.width;
    learn_ = c_.learn == nullptr || c_.learn[item.stream];
    limit_ = c_.update_limit == nullptr ? nullptr : c_.update_limit + item.stream;
    const int tokens = c_.valid == nullptr ? c_.tokens : static_cast<int>(c_.valid[item.stream]);
    const int start = c_.fill == nullptr ? 0 : static_cast<int>(c_.fill[item.stream]);
    counts_ = {};
    closed_ = changed_ = false;

    load(start);
    int fill = start;
    for (int done = 0, count = 0; done < tokens; done += count) {
      count = min_of(tokens - done, min_of(m_.chunk - fill, plan_.rows));
      take_coefficients(done, fill, count);
      learn_ ? surprise(done, fill, count) : no_surprise(done, fill, count);
      retrieve(done, fill, count);
      fill += count;
      if (fill == m_.chunk) {
        close();
        fill = 0;
      }
    }
    store(start, fill);
    // Padding tokens get the answer 0.
    if (group_.rank == 0) {
      for (int i = tokens * m_.width + thread_index(); i < c_.tokens * m_.width; i += kThreads) {
        y_out_[i] = to_value<In>(0.0F);
      }
    }
    counts_.loss = sum_over_block(lane_index() == 0 ? counts_.loss : 0.0F, reduction_);
    if (c_.stats != nullptr && group_.rank == 0 && thread_index() == 0) {
      counts_.store(c_.stats + item.index * kStatCount);
    }
    sync_group(group_);  // all reads of this block's memory are done
  }

 private:
  static __device__ int min_of(int a, int b) { return a < b ? a : b; }
  static __device__ int up_to_step(int rows) { return (rows + 15) / 16 * 16; }

  __device__ Part part(int i) const { return part_of(m_, plan_.share, group_.rank, i); }
  __device__ float* w(int i) const { return locate<float, kShared>(c_, plan_.w[i]); }
  __device__ float* s(int i) const { return locate<float, kShared>(c_, plan_.s[i]); }
  __device__ V* layer_input(int i) const { return locate<V, kShared>(c_, plan_.layer_input[i]); }
  __device__ V* output_grad(int i) const { return locate<V, kShared>(c_, plan_.output_grad[i]); }
  __device__ V* x(int i) const { return locate<V, kShared>(c_, plan_.x[i]); }
  // Strides follow from the largest part, so that all blocks use the same.
  __device__ int columns_in(int i) const { return i == last_ ? plan_.share : m_.widths[i]; }
  __device__ int columns_out(int i) const { return i == last_ - 1 ? plan_.share : m_.widths[i + 1]; }
  __device__ int stride_in(int i) const { return stride_of(columns_in(i), sizeof(V)); }
  __device__ int stride_out(int i) const { return stride_of(columns_out(i), sizeof(V)); }
  __device__ int stride_w(int i) const { return weight_stride(columns_out(i)); }
  __device__ int stride_scores() const { return stride_of(m_.chunk, sizeof(V)); }

  // ---- the packed row, in and out ----

  __device__ void load(int fill) {
    for (int i = 0; i < m_.depth; ++i) {
      const Part p = part(i);
#pragma unroll 1
      for (int matrix = 0; matrix < 2; ++matrix) {
        matrix == 0 ? load_weights(w(i), m_.w[i], i) : load_weights(s(i), m_.s[i], i);
      }
      load_rows(layer_input(i), stride_in(i), row_ + m_.layer_input[i], m_.widths[i], p.in_begin, p.in, fill);
      load_rows(output_grad(i), stride_out(i), row_ + m_.output_grad[i], m_.widths[i + 1], p.out_begin, p.out, fill);
      if (i < last_) clear(x(i), plan_.rows * stride_out(i));
    }
    clear(q_, plan_.rows * stride_of(m_.width, sizeof(V)));
    for (int at = thread_index(); at < chunk_pad_; at += kThreads) {
      chunk_.e[at] = at < fill ? row_[m_.e + at] : 0.0F;
      chunk_.a[at] = at < fill ? row_[m_.a + at] : 0.0F;
    }
    chunk_.m = fill == 0 ? 1.0F : row_[m_.m];
    chunk_.f = fill == 0 ? 0.0F : row_[m_.f];
    chunk_.beta = fill == 0 ? 1.0F : row_[m_.beta];
    wait_for_copies();
    sync_block();
  }

  // One warp per row.
  __device__ void load_weights(float* to, const Field& field, int i) {
    const Part p = part(i);
    const int stride = stride_w(i), rows = pad(columns_in(i));
    constexpr int kFour = 4;
    const float* first = row_ + field.elements + p.in_begin * field.columns + p.out_begin;
    const bool fours = field.columns % kFour == 0 && p.out % kFour == 0;
    const bool async = kShared && m_.memory_dtype == MemoryDtype::kFloat32 && fours &&
                       reinterpret_cast<std::uintptr_t>(first) % (kFour * sizeof(float)) == 0;
    for (int r = warp_index(); r < rows; r += kWarps) {
      const int whole = fours && r < p.in ? p.out : 0;  // columns loaded four at a time
#pragma unroll 2
      for (int j = lane_index() * kFour; j < whole; j += kWarpSize * kFour) {
        if (async) {
          copy_16(to + r * stride + j, first + r * field.columns + j);
        } else {
          *reinterpret_cast<Four*>(to + r * stride + j) = load_four(m_, row_, field, p.in_begin + r, p.out_begin + j);
        }
      }
#pragma unroll 4
      for (int j = whole + lane_index(); j < stride; j += kWarpSize) {
        const bool inside = r < p.in && j < p.out;
        to[r * stride + j] = inside ? load_weight(m_, row_, field, p.in_begin + r, p.out_begin + j) : 0.0F;
      }
    }
  }

  __device__ void clear(V* data, int count) {
    for (int at = thread_index(); at < count; at += kThreads) data[at] = to_value<V>(0.0F);
  }

  __device__ void load_rows(V* to, int stride, const float* from, int width, int begin, int count, int fill) {
    for (int r = warp_index(); r < chunk_pad_; r += kWarps) {
#pragma unroll 4
      for (int j = lane_index(); j < stride; j += kWarpSize) {
        to[r * stride + j] = to_value<V>(r < fill && j < count ? from[r * width + begin + j] : 0.0F);
      }
    }
  }

  __device__ void store(int start, int fill) {
    for (int i = 0; i < m_.depth; ++i) {
      const Part p = part(i);
      // Other memory dtypes are written by the chunk update.
      for (int r = warp_index(); changed_ && m_.memory_dtype == MemoryDtype::kFloat32 && r < p.in; r += kWarps) {
        const int first = (p.in_begin + r) * m_.widths[i + 1] + p.out_begin, from = r * stride_w(i);
        for (int j = lane_index(); j < p.out; j += kWarpSize) {
          row_[m_.w[i].elements + first + j] = w(i)[from + j];
          row_[m_.s[i].elements + first + j] = s(i)[from + j];
        }
      }
      const int first = closed_ ? 0 : start;
      // All blocks hold the same copy, so the first one stores it.
      if (i == last_ || group_.rank == 0) {
        store_rows(layer_input(i), stride_in(i), row_ + m_.layer_input[i], m_.widths[i], p.in_begin, p.in, first, fill);
      }
      if (i == last_ - 1 || group_.rank == 0) {
        store_rows(output_grad(i), stride_out(i), row_ + m_.output_grad[i], m_.widths[i + 1], p.out_begin, p.out, first,
                   fill);
      }
    }
    if (group_.rank != 0) return;
    for (int at = thread_index(); at < m_.chunk; at += kThreads) {
      row_[m_.e + at] = chunk_.e[at];
      row_[m_.a + at] = chunk_.a[at];
    }
    if (thread_index() != 0) return;
    row_[m_.m] = chunk_.m;
    row_[m_.f] = chunk_.f;
    row_[m_.beta] = chunk_.beta;
    store_chunk_updates(m_, row_, noise_source_.chunk_updates);
  }

  __device__ void store_rows(const V* from, int stride, float* to, int width, int begin, int count, int first,
                             int end) {
    for (int at = thread_index(); at < (end - first) * count; at += kThreads) {
      const int r = first + at / count, j = at % count;
      to[r * width + begin + j] = to_float(from[r * stride + j]);
    }
  }

  // ---- tokens [done, done + count) of the call, rows [fill, fill + count) of the chunk ----

  __device__ void take_coefficients(int done, int fill, int count) {
    for (int t = thread_index(); t < count; t += kThreads) {
      theta_[t] = c_.step_size[gates_ + done + t];
      eta_[t] = c_.momentum[gates_ + done + t];
      keep_[t] = 1.0F - c_.forget_gate[gates_ + done + t];
    }
    sync_block();
    for (int at = thread_index(); at < chunk_pad_; at += kThreads) {
      float e = chunk_.e[at], a = chunk_.a[at];
      for (int t = 0; t < count; ++t) {
        if (learn_ && at <= fill + t) {
          e = at == fill + t ? theta_[t] : eta_[t] * e;
          a = keep_[t] * a + e;
        }
        rows_a_[t * chunk_pad_ + at] = a;
      }
      chunk_.e[at] = e;
      chunk_.a[at] = a;
    }
    for (int t = 0; t < count; ++t) {
      if (learn_) {
        chunk_.m *= eta_[t];
        chunk_.f = keep_[t] * chunk_.f + chunk_.m;
        chunk_.beta *= keep_[t];
      }
      if (thread_index() == 0) {
        rows_f_[t] = chunk_.f;
        rows_beta_[t] = chunk_.beta;
      }
    }
  }

  // Copies queries, and keys if the tokens learn, to the matmul operands. With one layer, each block takes its slice of
  // columns.
  __device__ void take_rows(int done, int fill, int count) {
    const Part p = part(0);
    const int stride_q = stride_of(columns_in(0), sizeof(V));
    for (int at = thread_index(); at < count * p.in; at += kThreads) {
      const int t = at / p.in, j = at % p.in, from = (done + t) * m_.width + p.in_begin + j;
      q_[t * stride_q + j] = to_value<V>(to_float(q_in_[from]));
      if (learn_) layer_input(0)[(fill + t) * stride_in(0) + j] = to_value<V>(to_float(k_in_[from]));
    }
  }

  // Matmuls over the chunk's rows go in steps. Rows between the last one and the end of its step must be zero, because
  // an earlier chunk may have left data there.
  __device__ void clear_tail(int end) {
    const int tail = min_of(up_to_step(end), chunk_pad_) - end;
    for (int i = 0; i < m_.depth; ++i) {
      clear(layer_input(i) + end * stride_in(i), tail * stride_in(i));
      clear(output_grad(i) + end * stride_out(i), tail * stride_out(i));
    }
  }

  // Rows of tokens that learn nothing may hold any finite value, because their coefficient is 0.
  __device__ void no_surprise(int done, int fill, int count) {
    for (int i = 0; i < m_.depth; ++i) {
      clear(layer_input(i) + fill * stride_in(i), count * stride_in(i));
      clear(output_grad(i) + fill * stride_out(i), count * stride_out(i));
    }
    take_rows(done, fill, count);
    clear_tail(fill + count);
    sync_group(group_);  // others may still read this block's part for the previous tokens
  }

  __device__ AlongRowsUpTo<V> rows_of(V* data, int stride, int fill, int count) const {
    return {data + fill * stride, stride, count - 1};
  }

  __device__ void surprise(int done, int fill, int count) {
    take_rows(done, fill, count);
    clear_tail(fill + count);
    sync_block();
    for (int i = 0; i < last_; ++i) {
      V *next = layer_input(i + 1) + fill * stride_in(i + 1), *derivative = x(i);
      const int stride = stride_in(i + 1);
      multiply<V>(count, part(i).out, m_.widths[i], rows_of(layer_input(i), stride_in(i), fill, count),
                  AlongColumns<float>{w(i), stride_w(i)}, [&](int t, int j, float z) {
                    const Activated act = activate(m_.gelu, z);
                    next[t * stride + j] = to_value<V>(act.value);
                    derivative[t * stride_out(i) + j] = to_value<V>(act.derivative);
                  });
      sync_block();
    }
    multiply<V>(count, m_.width, part(last_).in, rows_of(layer_input(last_), stride_in(last_), fill, count),
                AlongColumns<float>{w(last_), stride_w(last_)},
                [&](int t, int j, float z) { result_[t * m_.width + j] = z; });
    sync_group(group_);
    // The sum is written to memory that no other block reads.
    float* sums = group_.size > 1 ? partial_y_ : result_;
    for (int t = warp_index(); t < count; t += kWarps) {
      float* f = sums + t * m_.width;
      if (group_.size > 1) {
        for (int j = lane_index(); j < m_.width; j += kWarpSize) {
          f[j] = sum_over_group(c_, group_, result_ + t * m_.width + j);
        }
      }
      const int at = (done + t) * m_.width;
      counts_.loss +=
          error_row(m_, f, k_in_ + at, v_in_ + at, norm_scale_, output_grad(last_) + (fill + t) * stride_out(last_));
    }
    sync_block();
    for (int i = last_; i > 0; --i) {
      V *to = output_grad(i - 1) + fill * stride_out(i - 1), *derivative = x(i - 1);
      const int stride = stride_out(i - 1);
      multiply<V>(count, part(i).in, m_.widths[i + 1], rows_of(output_grad(i), stride_out(i), fill, count),
                  AlongRows<float>{w(i), stride_w(i)}, [&](int t, int j, float z) {
                    to[t * stride + j] = to_value<V>(z * to_float(derivative[t * stride + j]));
                  });
      sync_block();
    }
  }

  // -a (x . layer_input), the factors of output_grad. They are 0 for later tokens.
  __device__ V score(int t, int at, int fill, float product) const {
    return to_value<V>(at <= fill + t ? -rows_a_[t * chunk_pad_ + at] * product : 0.0F);
  }

  // y_t = M_(W_t)(q_t). Each layer is the sum of three matmuls:
  //   beta (x W) + f (x S) - (a o x layer_input^T) output_grad.
  __device__ void retrieve(int done, int fill, int count) {
    const int rows = fill + count, stride = stride_scores();
    for (int i = 0; i <= last_; ++i) {
      const bool shared = i == last_ && group_.size > 1;
      const V* input = i == 0 ? q_ : x(i - 1);
      const int stride_x = i == 0 ? stride_of(columns_in(0), sizeof(V)) : stride_out(i - 1), depth = part(i).in;
      const AlongRows<V> along_x{input, stride_x};
      multiply<V>(count, up_to_step(rows), depth, along_x, AlongRows<V>{layer_input(i), stride_in(i)},
                  [&](int t, int at, float product) {
                    if (shared) {
                      partial_scores_[t * chunk_pad_ + at] = product;
                    } else {
                      scores_[t * stride + at] = score(t, at, fill, product);
                    }
                  });
      if (!shared) sync_block();
      each_tile(count, part(i).out, [&](int row, int column) {
        Tile tile, of_s;
        tile.add_pair<V>(of_s, row, column, depth, along_x, AlongColumns<float>{w(i), stride_w(i)},
                         AlongColumns<float>{s(i), stride_w(i)});
        tile.combine(row, of_s, [&](int t, float of_w, float of_s_) {
          const int at = min_of(t, count - 1);
          return rows_beta_[at] * of_w + rows_f_[at] * of_s_;
        });
        if (!shared) {
          tile.add<V>(row, column, min_of(rows, fill + row + kTileRows), AlongRows<V>{scores_, stride},
                      AlongColumns<V>{output_grad(i), stride_out(i)});
        }
        tile.each(row, column, [&](int t, int j, float h) {
          if (t >= count || j >= part(i).out) return;
          if (i < last_) {
            x(i)[t * stride_out(i) + j] = to_value<V>(activate(m_.gelu, h).value);
          } else {
            (shared ? partial_y_ : result_)[t * m_.width + j] = h;
          }
        });
      });
      if (!shared) sync_block();
    }
    int begin = 0, end = count;
    if (group_.size > 1) sum_answers(fill, count, begin, end);
    for (int t = begin + warp_index(); t < end; t += kWarps) {
      const int at = (done + t) * m_.width;
      finish_row(m_, result_ + t * m_.width, q_in_ + at, norm_scale_, y_out_ + at);
    }
    sync_block();
  }

  // If several blocks share the head, each finishes the rows [begin, end).
  __device__ void sum_answers(int fill, int count, int& begin, int& end) {
    const int rows = fill + count, stride = stride_scores(), columns = up_to_step(rows);
    const int each = (count + group_.size - 1) / group_.size;
    begin = min_of(group_.rank * each, count);
    end = min_of(begin + each, count);
    sync_group(group_);
    for (int at = thread_index(); at < (end - begin) * columns; at += kThreads) {
      const int t = begin + at / columns, j = at % columns;
      scores_[t * stride + j] = score(t, j, fill, sum_over_group(c_, group_, partial_scores_ + t * chunk_pad_ + j));
    }
    sync_block();
    multiply<V>(end - begin, m_.width, rows, AlongRowsUpTo<V>{scores_ + begin * stride, stride, end - begin - 1},
                AlongColumns<V>{output_grad(last_), stride_out(last_)}, [&](int t, int j, float value) {
                  const int at = (begin + t) * m_.width + j;
                  result_[at] = sum_over_group(c_, group_, partial_y_ + at) + value;
                });
    sync_block();
  }

  // ---- the end of a chunk ----

  __device__ void close() {
    const auto update_all = [&](bool write) { return chunk_update(write); };
    const bool updated = close_chunk(c_, group_, chunk_, limit_, reduction_, norm_, counts_, update_all);
    changed_ |= updated;
    noise_source_.chunk_updates += updated ? 1U : 0U;
    closed_ = true;
  }

  // W and S after the chunk. Returns this thread's part of the squared change of W.
  __device__ float chunk_update(bool write) {
    const bool feedback = m_.rounding == Rounding::kErrorFeedback;
    float squares = 0.0F;
    for (int i = 0; i < m_.depth; ++i) {
      const Part p = part(i);
      float *of_w = w(i), *of_s = s(i);
      const int stride = stride_w(i);
      const AlongColumns<V> inputs{layer_input(i), stride_in(i)}, gradients{output_grad(i), stride_out(i)};
      each_tile(p.in, p.out, [&](int row, int column) {
        Tile change_w, change_s;
        change_w.add_pair<V>(change_s, row, column, m_.chunk, inputs,
                             ScaledAlongDepth<AlongColumns<V>>{gradients, chunk_.a},
                             ScaledAlongDepth<AlongColumns<V>>{gradients, chunk_.e});
        change_w.each_with(change_s, row, column, [&](int r, int j, float by_a, float by_e) {
          if (r >= p.in || j >= p.out) return;
          const int at = r * stride + j;
          float old = of_w[at], surprise = of_s[at];
          if (feedback) {
            old += load_weight(m_, row_, m_.ew[i], p.in_begin + r, p.out_begin + j);
            surprise += load_weight(m_, row_, m_.es[i], p.in_begin + r, p.out_begin + j);
          }
          const float now = chunk_.beta * old + chunk_.f * surprise - by_a;
          squares += (now - old) * (now - old);
          if (!write) return;
          of_w[at] = now;
          of_s[at] = chunk_.m * surprise - by_e;
        });
      });
    }
    if (write && m_.memory_dtype != MemoryDtype::kFloat32) {
      sync_block();
      round_weights();
    }
    return squares;
  }

  // Rounds W and S to the memory dtype, in the packed row and in shared memory. A warp takes one scale block of a row.
  __device__ void round_weights() {
    for (int i = 0; i < m_.depth; ++i) {
      const Part p = part(i);
      const int across = (p.out + kWarpSize - 1) / kWarpSize, blocks = p.in * across;
#pragma unroll 1
      for (int block = warp_index(); block < 2 * blocks; block += kWarps) {
        const bool of_s = block >= blocks;
        const int at = of_s ? block - blocks : block;
        const int r = at / across, j = at % across * kWarpSize + lane_index();
        float* x = (of_s ? s(i) : w(i)) + r * stride_w(i) + j;
        const bool inside = j < p.out;
        const float kept =
            keep_block(m_, noise_source_, row_, i, of_s, p.in_begin + r, p.out_begin + j, inside, inside ? *x : 0.0F);
        if (inside) *x = kept;
      }
    }
  }

  const Call& c_;
  const Model& m_;
  const Plan& plan_;
  Group& group_;
  int last_, chunk_pad_;
  float *reduction_, *theta_, *eta_, *keep_, *rows_f_, *rows_beta_, *rows_a_;
  float *result_, *partial_y_, *partial_scores_, *norm_;  // in the exchange area
  V *q_, *scores_;
  float* row_ = nullptr;
  NoiseSource noise_source_;
  const In *q_in_ = nullptr, *k_in_ = nullptr, *v_in_ = nullptr;
  In* y_out_ = nullptr;
  std::int64_t gates_ = 0;
  const float *norm_scale_ = nullptr, *limit_ = nullptr;
  bool learn_ = true, closed_ = false, changed_ = false;
  Coefficients chunk_;
  Counts counts_;
};

template <class In, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) update_blocks(const __grid_constant__ Call call) {
  run_items<In, BlocksRun<In, kShared>>(call);
}

}  // namespace titans::kernels::cuda
