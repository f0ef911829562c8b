// One head with gates per chunk. Equations and names are those of docs/chunk-operator.md. Compiled once per instruction
// set.
//
// W is constant between two chunk updates, so the queries of up to a chunk of tokens are answered together. Keys,
// values and step sizes wait in the packed row, or are read from the operands if the call has the whole chunk. A chunk
// update is a forward and a backward pass over the chunk's keys. Then, for each tensor, one pass over the outer
// products updates S and W. It reads and writes each of them once: 16 bytes per weight in float32.

#if defined(TITANS_CHUNK_GATES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TITANS_CHUNK_GATES_INL_H_
#undef TITANS_CHUNK_GATES_INL_H_
#else
#define TITANS_CHUNK_GATES_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "plugins/kernels/chunk_gates.h"
#include "plugins/kernels/codec-inl.h"
#include "plugins/kernels/gemv-inl.h"
#include "plugins/kernels/newton_schulz-inl.h"
#include "plugins/kernels/outer-inl.h"
#include "plugins/kernels/product-inl.h"
#include "plugins/kernels/rows-inl.h"
#include "plugins/kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

class ChunkRun {
 public:
  ChunkRun(const ChunkPlan& plan, const ChunkHead& head, ChunkScratch& scratch)
      : c_(plan.configuration),
        layout_(plan.layout),
        head_(head),
        scratch_(scratch),
        codec_(codec_of(c_.memory_dtype)),
        rounded_(c_, layout_, codec_, head.row, head.index),
        depth_(c_.depth),
        chunk_(static_cast<std::size_t>(c_.chunk_size)),
        keys_per_token_(static_cast<std::size_t>(c_.keys_per_token)),
        width_(static_cast<std::size_t>(c_.widths[0])),
        elements_(static_cast<std::size_t>(c_.all_elements())),
        w_(codec_.direct ? field(layout_.w[0]) : scratch.weights),
        s_(codec_.direct ? field(layout_.s[0]) : scratch.surprise) {
    std::size_t begin = 0;
    for (int p = 0; p < c_.tensors(); ++p) {
      offsets_[p] = begin;
      begin += static_cast<std::size_t>(c_.elements(p));
    }
  }

  void update() {
    const auto tokens = static_cast<std::size_t>(head_.tokens);
    std::size_t fill = static_cast<std::size_t>(head_.fill) % chunk_, done = 0, answered = 0;
    while (done < tokens) {
      const std::size_t count = HWY_MIN(tokens - done, chunk_ - fill);
      const bool whole = count == chunk_;
      if (!whole) keep(done, fill, count);
      done += count;
      fill += count;
      if (fill < chunk_) break;
      // The token that completes a chunk is answered with the updated weights.
      retrieve(answered, done - 1 - answered);
      answered = done - 1;
      complete(done, whole);
      fill = 0;
    }
    retrieve(answered, tokens - answered);
  }

  void write_stats() const { stats_.write(head_.stats); }

 private:
  std::size_t in(int layer) const { return static_cast<std::size_t>(c_.in(layer)); }
  std::size_t out(int layer) const { return static_cast<std::size_t>(c_.out(layer)); }
  std::size_t index(int layer) const { return static_cast<std::size_t>(layer); }
  float* field(std::int64_t offset) const { return head_.row + offset; }
  // A tensor's offset among all weights.
  std::size_t offset(int tensor) const { return offsets_[tensor]; }

  // Makes float32 copies of W and S if the row has another memory dtype.
  void unpack_weights() {
    if (codec_.direct || unpacked_) return;
    unpacked_ = true;
    for (int p = 0; p < c_.tensors(); ++p) {
      codec_.unpack(rounded_.field(p, false), w_ + offset(p));
      if (c_.momentum) codec_.unpack(rounded_.field(p, true), s_ + offset(p));
    }
  }

  // The output norm with this gamma, if gamma is a fast weight.
  OutputNorm output_norm(const float* gamma) const {
    const float* scale = head_.norm_scale;
    if (c_.fast_norm()) {
      const Vector one = hn::Set(Floats(), 1.0F);
      each_vector(width_, [&](std::size_t i, std::size_t n)
                              HWY_ATTR { store(hn::Add(load(gamma + i, n), one), scratch_.scale + i, n); });
      scale = scratch_.scale;
    }
    return {c_.layer_norm, c_.residual, scale, width_, scratch_.row};
  }

  // Copies `count` tokens of the call, from token `at`, into the open chunk.
  void keep(std::size_t at, std::size_t fill, std::size_t count) {
    const std::size_t from = at * keys_per_token_, to = fill * keys_per_token_, rows = count * keys_per_token_;
    std::memcpy(field(layout_.k) + to * width_, head_.k + from * width_, rows * width_ * sizeof(float));
    std::memcpy(field(layout_.v) + to * width_, head_.v + from * width_, rows * width_ * sizeof(float));
    if (head_.learn) {
      std::memcpy(field(layout_.theta) + to, head_.step_size + from, rows * sizeof(float));
    } else {
      std::memset(field(layout_.theta) + to, 0, rows * sizeof(float));
    }
  }

  // y = M_W(q) for tokens [at, at + count).
  void retrieve(std::size_t at, std::size_t count) {
    if (count == 0) return;
    const float* q = head_.q + at * width_;
    float* y = head_.y + at * width_;
    if (count > 1) unpack_weights();
    const float* gamma = w_ + offset(depth_);
    if (c_.fast_norm() && !codec_.direct && !unpacked_) {
      codec_.unpack(rounded_.field(depth_, false), scratch_.scale);
      gamma = scratch_.scale;
    }
    const OutputNorm output = output_norm(gamma);
    Rows x{const_cast<float*>(q), width_};
    for (int i = 0; i < depth_; ++i) {
      const Rows next{scratch_.x[index(i & 1)], padded(out(i))};
      const float* w = w_ + offset(i);
      if (count == 1) {
        codec_.gemv(Pass::kW, Gemv{rounded_.field(i, false), {}, x.data, nullptr, nullptr, next.data, nullptr});
        if (i + 1 < depth_) activate_row(c_.activation, next.data, out(i), next.data, nullptr);
      } else {
        const Product products[] = {{x.data, x.stride, w, out(i), in(i)}};
        if (i + 1 < depth_) {
          activated(c_.activation, products, count, out(i),
                    [&](const Activated& act, std::size_t row, std::size_t column, std::size_t n)
                        HWY_ATTR { store(act.value, next[row] + column, n); });
        } else {
          plain(products, count, out(i), next);
        }
      }
      x = next;
    }
    for (std::size_t t = 0; t < count; ++t) finish_row(output, x[t], q + t * width_, y + t * width_);
  }

  // ---- the end of a chunk; its last token is `done` - 1 ----

  void complete(std::size_t done, bool whole) {
    unpack_weights();
    if (head_.initial_weights != nullptr)
      std::memcpy(head_.initial_weights + chunks_ * elements_, w_, elements_ * sizeof(float));
    const std::size_t chunk = chunks_++;
    if (!head_.learn) return;
    const std::size_t first = (done - chunk_) * keys_per_token_;
    const float* k = whole ? head_.k + first * width_ : field(layout_.k);
    const float* v = whole ? head_.v + first * width_ : field(layout_.v);
    const float* theta = whole ? head_.step_size + first : field(layout_.theta);
    const std::size_t rows = chunk_ * keys_per_token_ - (c_.lookahead ? 1 : 0);
    differentiate(point(done - 1, chunk), k, c_.lookahead ? v + width_ : v, theta, rows);

    const bool guarded = head_.update_limit != nullptr;
    eta_ = c_.momentum ? head_.momentum[done - 1] : 0.0F;
    keep_ = 1.0F - head_.forget_gate[done - 1];
    const bool staged = guarded || !codec_.direct;
    w_next_ = staged ? scratch_.weights_next : w_;
    s_next_ = staged ? scratch_.surprise_next : s_;
    float squares = 0.0F;
    for (int p = 0; p < c_.tensors(); ++p) squares += update_tensor(p, done - 1, rows);
    const float norm = std::sqrt(squares);
    const bool commit = !guarded || norm <= *head_.update_limit;  // false for NaN
    if (commit) {
      if (staged) commit_weights();
      if (c_.counts_batch() && (head_.fill + static_cast<std::int64_t>(done)) % c_.batch_size == 0) {
        for (int p = 0; p < c_.tensors(); ++p) {
          std::memcpy(field(layout_.g[index(p)]), field(layout_.w[index(p)]),
                      static_cast<std::size_t>(c_.words(p)) * sizeof(float));
        }
      }
    }
    stats_.close_chunk(norm, commit);
  }

  // Writes the staged update to the state.
  void commit_weights() {
    if (codec_.direct) {
      std::memcpy(w_, w_next_, elements_ * sizeof(float));
      if (c_.momentum) std::memcpy(s_, s_next_, elements_ * sizeof(float));
      return;
    }
    for (int p = 0; p < c_.tensors(); ++p) {
      rounded_.store_tensor(p, false, w_next_ + offset(p), w_ + offset(p));
      if (c_.momentum) rounded_.store_tensor(p, true, s_next_ + offset(p), s_ + offset(p));
    }
    rounded_.count();
  }

  // The weights at which the gradient is taken.
  const float* point(std::size_t token, std::size_t chunk) {
    const float* point = w_;
    if (c_.keeps_point()) {
      point = codec_.direct ? field(layout_.g[0]) : scratch_.point;
      for (int p = 0; p < c_.tensors() && !codec_.direct; ++p) {
        codec_.unpack(stored_tensor(c_, head_.row, layout_.g[index(p)], p), scratch_.point + offset(p));
      }
    }
    if (head_.previous == nullptr) return point;
    const float* previous = head_.previous + chunk * elements_;
    const Vector rho = hn::Set(Floats(), head_.previous_gate[token]);
    each_vector(elements_, [&](std::size_t i, std::size_t n) HWY_ATTR {
      store(hn::MulAdd(rho, load(previous + i, n), load(point + i, n)), scratch_.point + i, n);
    });
    return scratch_.point;
  }

  // The gradient of the loss, in factors: matrix i has the gradient layer_input_i^T output_grad_i. Gamma's gradient is
  // in scratch.
  void differentiate(const float* weights, const float* k, const float* v, const float* theta, std::size_t rows) {
    const int last = depth_ - 1;
    layer_input_[0] = {const_cast<float*>(k), width_};
    for (int i = 0; i < depth_; ++i) {
      if (i > 0) layer_input_[i] = {scratch_.layer_input[index(i)], padded(in(i))};
      output_grad_[i] = {scratch_.output_grad[index(i)], padded(out(i))};
    }
    for (int i = 0; i < last; ++i) {
      const Rows derivative{scratch_.derivative[index(i)], padded(out(i))};
      const Product products[] = {{layer_input_[i].data, layer_input_[i].stride, weights + offset(i), out(i), in(i)}};
      activated(c_.activation, products, rows, out(i),
                [&](const Activated& act, std::size_t row, std::size_t column, std::size_t n) HWY_ATTR {
                  store(act.value, layer_input_[i + 1][row] + column, n);
                  store(act.derivative, derivative[row] + column, n);
                });
    }
    const Product products[] = {
        {layer_input_[last].data, layer_input_[last].stride, weights + offset(last), out(last), in(last)}};
    plain(products, rows, out(last), output_grad_[last]);
    const OutputNorm output = output_norm(weights + offset(depth_));
    float* gamma = c_.fast_norm() ? scratch_.gamma_gradient : nullptr;
    if (gamma != nullptr) fill_row(gamma, 0.0F, width_);
    for (std::size_t r = 0; r < rows; ++r) {
      stats_.loss += c_.loss_scale * error_row(output, output_grad_[last][r], k + r * width_, v + r * width_,
                                               c_.loss_scale * theta[r], gamma);
    }
    for (int i = last; i > 0; --i) {
      const std::size_t stride = padded(in(i));
      transpose(weights + offset(i), out(i), in(i), out(i), scratch_.transposed, stride);
      const Rows derivative{scratch_.derivative[index(i - 1)], padded(in(i))};
      const Product backward[] = {{output_grad_[i].data, output_grad_[i].stride, scratch_.transposed, stride, out(i)}};
      multiply<Part::kAll>(
          backward, rows, in(i), 0, [&](Vector sum, std::size_t row, std::size_t column, std::size_t n) HWY_ATTR {
            store(hn::Mul(sum, load(derivative[row] + column, n)), output_grad_[i - 1][row] + column, n);
          });
    }
  }

  // Calls body(gradient, index in the tensor, count of valid lanes) for each vector of tensor p's gradient.
  template <class Body>
  HWY_INLINE void each_gradient(int p, std::size_t rows, const Body& body) {
    if (p == depth_) {
      each_vector(width_,
                  [&](std::size_t i, std::size_t n) HWY_ATTR { body(load(scratch_.gamma_gradient + i, n), i, n); });
      return;
    }
    const std::size_t columns = out(p);
    multiply_outer(
        Outer{layer_input_[p].data, layer_input_[p].stride, output_grad_[p].data, output_grad_[p].stride, rows}, in(p),
        columns, [&](Vector sum, std::size_t row, std::size_t column, std::size_t n) HWY_ATTR {
          body(sum, row * columns + column, n);
        });
  }

  // The factor by which grad_clamp scales a gradient of this norm.
  float clamped(float norm) const {
    if (norm == 0.0F) return 1.0F;
    const float half = c_.grad_clamp / 2.0F;
    return (std::tanh(norm / half) * half + half) / norm;
  }

  // Updates tensor p of W and S, in place or in scratch if the update is guarded. Returns the squared Frobenius norm of
  // the change of W.
  float update_tensor(int p, std::size_t token, std::size_t rows) {
    const Floats d;
    float by = head_.modulation == nullptr
                   ? -1.0F
                   : -head_.modulation[token * static_cast<std::size_t>(c_.tensors()) + index(p)];
    if (c_.grad_clamp != 0.0F) {
      Vector squares = hn::Zero(d);
      each_gradient(p, rows, [&](Vector g, std::size_t, std::size_t) HWY_ATTR { squares = hn::MulAdd(g, g, squares); });
      by *= clamped(std::sqrt(hn::ReduceSum(d, squares)));
    }
    const float* w = w_ + offset(p);
    const float* s = c_.momentum ? s_ + offset(p) : nullptr;
    float* w_next = w_next_ + offset(p);
    float* s_next = c_.momentum ? s_next_ + offset(p) : nullptr;
    if (c_.rounding == Rounding::kErrorFeedback) {
      rounded_.add_error(p, false, w, w_next);
      w = w_next;
      if (c_.momentum) {
        rounded_.add_error(p, true, s, s_next);
        s = s_next;
      }
    }
    const bool orthogonal = c_.orthogonalise > 0 && p < depth_;
    const Vector scale = hn::Set(d, by), eta = hn::Set(d, eta_), keep = hn::Set(d, keep_);
    Vector squares = hn::Zero(d);
    const auto advance = [&](Vector update, std::size_t at, std::size_t n) HWY_ATTR {
      const Vector old = load(w + at, n);
      const Vector made = hn::MulAdd(keep, old, update);
      const Vector change = hn::Sub(made, old);
      squares = hn::MulAdd(change, change, squares);
      store(made, w_next + at, n);
    };
    float* moved = s_next != nullptr ? s_next : scratch_.update;
    each_gradient(p, rows, [&](Vector g, std::size_t at, std::size_t n) HWY_ATTR {
      Vector update = hn::Mul(scale, g);
      if (s != nullptr) update = hn::MulAdd(eta, load(s + at, n), update);
      if (s != nullptr || orthogonal) store(update, moved + at, n);
      if (orthogonal) {
        squares = hn::MulAdd(update, update, squares);
      } else {
        advance(update, at, n);
      }
    });
    if (!orthogonal) return hn::ReduceSum(d, squares);
    const float norm = std::sqrt(hn::ReduceSum(d, squares));
    const Rows update = orthogonalise(moved, in(p), out(p), norm, c_.orthogonalise, scratch_);
    squares = hn::Zero(d);
    for (std::size_t i = 0; i < in(p); ++i) {
      each_vector(out(p),
                  [&](std::size_t j, std::size_t n) HWY_ATTR { advance(load(update[i] + j, n), i * out(p) + j, n); });
    }
    return hn::ReduceSum(d, squares);
  }

  const ChunkConfiguration& c_;
  const ChunkRowLayout& layout_;
  const ChunkHead& head_;
  ChunkScratch& scratch_;
  const Codec& codec_;
  Rounded rounded_;
  int depth_;
  std::size_t chunk_, keys_per_token_, width_, elements_;
  float *w_, *s_;  // all of W and S in float32: the state itself, or copies
  std::size_t offsets_[kMaxTensors + 1] = {};
  bool unpacked_ = false;
  Rows layer_input_[kMaxDepth], output_grad_[kMaxDepth];
  float eta_ = 0.0F, keep_ = 1.0F;
  float *w_next_ = nullptr, *s_next_ = nullptr;
  std::size_t chunks_ = 0;  // completed by this call
  HeadStats stats_;
};

inline void run_chunk_head(const ChunkPlan& plan, const ChunkHead& head, ChunkScratch& scratch) {
  ChunkRun run(plan, head, scratch);
  run.update();
  run.write_stats();
}

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
