// One head with gates per token: retrieval and update of its memory over the tokens of a call. Equations and names are
// those of docs/operator.md. Compiled once per instruction set.
//
// Tokens are processed in blocks that end where the open chunk ends. W and S are constant inside a chunk. A block of
// several tokens is therefore a handful of matmuls, and a single token a handful of passes over W and S.
// neural_memory_cpu.cc has the FLOP and bytes.

#if defined(TITANS_TOKEN_GATES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TITANS_TOKEN_GATES_INL_H_
#undef TITANS_TOKEN_GATES_INL_H_
#else
#define TITANS_TOKEN_GATES_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "plugins/kernels/chunk_update-inl.h"
#include "plugins/kernels/codec-inl.h"
#include "plugins/kernels/gemv-inl.h"
#include "plugins/kernels/product-inl.h"
#include "plugins/kernels/rows-inl.h"
#include "plugins/kernels/token_gates.h"
#include "plugins/kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

class TokenRun {
 public:
  TokenRun(const TokenPlan& plan, const Head& head, TokenScratch& scratch)
      : c_(plan.configuration),
        layout_(plan.layout),
        head_(head),
        scratch_(scratch),
        codec_(codec_of(c_.memory_dtype)),
        rounded_(c_, layout_, codec_, head.row, head.index),
        depth_(c_.depth),
        chunk_(static_cast<std::size_t>(c_.chunk_size)),
        width_(static_cast<std::size_t>(c_.widths[0])),
        output_{c_.layer_norm, c_.residual, head.norm_scale, width_, scratch.scores} {}

  void update() {
    const auto tokens = static_cast<std::size_t>(head_.tokens);
    auto fill = static_cast<std::size_t>(head_.fill);
    for (std::size_t done = 0; done < tokens;) {
      const std::size_t count = HWY_MIN(tokens - done, chunk_ - fill);
      const bool whole = count == chunk_;
      if (count == 1 && !whole) {
        open_rows();
        load_coefficients(fill);
        token(done, fill);
      } else {
        unpack_weights();
        whole ? whole_rows(done) : open_rows();
        load_coefficients(fill);
        block(done, fill, count);
      }
      done += count;
      fill += count;
      if (fill == chunk_) {
        unpack_weights();
        close_chunk();
        fill = 0;
      } else {
        store_coefficients();
      }
    }
  }

  void read() {
    const auto tokens = static_cast<std::size_t>(head_.tokens);
    if (tokens == 1) {
      const float* x = head_.q;
      for (int i = 0; i < depth_; ++i) {
        float* h = scratch_.x[static_cast<std::size_t>(i & 1)];
        codec_.gemv(Pass::kW, Gemv{stored_w(i), {}, x, nullptr, nullptr, h, nullptr});
        if (i + 1 < depth_) activate_row(c_.activation, h, out(i), h, nullptr);
        x = h;
      }
      finish_row(output_, x, head_.q, head_.y);
      return;
    }
    unpack_weights();
    // Scratch is sized for a chunk, so longer calls are cut.
    for (std::size_t done = 0; done < tokens; done += chunk_) {
      const std::size_t count = HWY_MIN(tokens - done, chunk_);
      const float* q = head_.q + done * width_;
      Rows x{const_cast<float*>(q), width_};
      for (int i = 0; i < depth_; ++i) {
        const Rows next{scratch_.x[static_cast<std::size_t>(i & 1)], padded(out(i))};
        const Product products[] = {{x.data, x.stride, weights_w(i), out(i), in(i)}};
        if (i + 1 < depth_) {
          activated(c_.activation, products, count, out(i),
                    [&](const Activated& act, std::size_t row, std::size_t column, std::size_t n)
                        HWY_ATTR { store(act.value, next[row] + column, n); });
        } else {
          plain(products, count, out(i), next);
        }
        x = next;
      }
      for (std::size_t t = 0; t < count; ++t) finish_row(output_, x[t], q + t * width_, head_.y + (done + t) * width_);
    }
  }

 private:
  std::size_t in(int layer) const { return static_cast<std::size_t>(c_.in(layer)); }
  std::size_t out(int layer) const { return static_cast<std::size_t>(c_.out(layer)); }
  std::size_t index(int layer) const { return static_cast<std::size_t>(layer); }
  float* field(std::int64_t offset) const { return head_.row + offset; }
  Stored stored_w(int i) const { return rounded_.field(i, false); }
  Stored stored_s(int i) const { return rounded_.field(i, true); }

  // W and S in float32: the state itself, or the copies that unpack_weights has made.
  float* weights_w(int i) const { return codec_.direct ? field(layout_.w[index(i)]) : scratch_.w[index(i)]; }
  float* weights_s(int i) const { return codec_.direct ? field(layout_.s[index(i)]) : scratch_.s[index(i)]; }

  void unpack_weights() {
    if (codec_.direct || unpacked_) return;
    unpacked_ = true;
    for (int i = 0; i < depth_; ++i) {
      codec_.unpack(stored_w(i), weights_w(i));
      if (c_.mode == Mode::kUpdate) codec_.unpack(stored_s(i), weights_s(i));
    }
  }

  // ---- the rows of the block's surprises, and the chunk's coefficients ----

  void open_rows() {
    for (int i = 0; i < depth_; ++i) {
      layer_input_[i] = {field(layout_.layer_input[index(i)]), in(i)};
      output_grad_[i] = {field(layout_.output_grad[index(i)]), out(i)};
    }
  }

  void whole_rows(std::size_t done) {
    for (int i = 0; i < depth_; ++i) {
      layer_input_[i] = {scratch_.layer_input[index(i)], padded(in(i))};
      output_grad_[i] = {scratch_.output_grad[index(i)], padded(out(i))};
    }
    // The keys are used in place. They are only read.
    layer_input_[0] = {const_cast<float*>(head_.k) + done * width_, width_};
  }

  void load_coefficients(std::size_t fill) {
    if (fill == 0) {
      m_ = beta_ = 1.0F;
      f_ = 0.0F;
    } else {
      m_ = *field(layout_.m);
      f_ = *field(layout_.f);
      beta_ = *field(layout_.beta);
      std::memcpy(scratch_.e, field(layout_.e), fill * sizeof(float));
      std::memcpy(scratch_.a, field(layout_.a), fill * sizeof(float));
    }
    const std::size_t rest = padded(chunk_) - fill;
    std::memset(scratch_.e + fill, 0, rest * sizeof(float));
    std::memset(scratch_.a + fill, 0, rest * sizeof(float));
  }

  void store_coefficients() {
    std::memcpy(field(layout_.e), scratch_.e, chunk_ * sizeof(float));
    std::memcpy(field(layout_.a), scratch_.a, chunk_ * sizeof(float));
    *field(layout_.m) = m_;
    *field(layout_.f) = f_;
    *field(layout_.beta) = beta_;
  }

  // Adds token `at` of the call, which is the chunk's token t, to e, a, m, f and beta.
  void advance(std::size_t at, std::size_t t) {
    if (!head_.learn) return;  // e and a of the token are already zero
    const float eta = head_.momentum[at], keep = 1.0F - head_.forget_gate[at];
    const Vector etas = hn::Set(Floats(), eta), keeps = hn::Set(Floats(), keep);
    float *e = scratch_.e, *a = scratch_.a;
    for (std::size_t s = 0; s < t; s += kLanes) {
      hn::StoreU(hn::Mul(etas, hn::LoadU(Floats(), e + s)), Floats(), e + s);
    }
    e[t] = head_.step_size[at];
    for (std::size_t s = 0; s <= t; s += kLanes) {
      hn::StoreU(hn::MulAdd(keeps, hn::LoadU(Floats(), a + s), hn::LoadU(Floats(), e + s)), Floats(), a + s);
    }
    m_ *= eta;
    f_ = keep * f_ + m_;
    beta_ *= keep;
  }

  // ---- several tokens: [done, done + count) of the call, rows [fill, fill + count) of the chunk ----

  void block(std::size_t done, std::size_t fill, std::size_t count) {
    const std::size_t stride = padded(chunk_);
    for (std::size_t t = 0; t < count; ++t) {
      advance(done + t, fill + t);
      std::memcpy(scratch_.rows_a + t * stride, scratch_.a, stride * sizeof(float));
      scratch_.rows_f[t] = f_;
      scratch_.rows_beta[t] = beta_;
    }
    if (head_.learn) {
      surprise(done, fill, count);
    } else if (count < chunk_) {
      no_surprise(fill, count);
    }
    // Without learning, only the earlier rows may hold surprises.
    retrieve(done, fill, count, head_.learn ? fill + count : fill);
  }

  // Rows of tokens that learn nothing may hold any finite value, because their coefficient is 0.
  void no_surprise(std::size_t fill, std::size_t count) {
    for (int i = 0; i < depth_; ++i) {
      for (std::size_t t = fill; t < fill + count; ++t) {
        fill_row(layer_input_[i][t], 0.0F, in(i));
        fill_row(output_grad_[i][t], 0.0F, out(i));
      }
    }
  }

  void surprise(std::size_t done, std::size_t fill, std::size_t count) {
    const float* k = head_.k + done * width_;
    const float* v = head_.v + done * width_;
    if (layer_input_[0].data + fill * layer_input_[0].stride != k) {
      for (std::size_t t = 0; t < count; ++t)
        std::memcpy(layer_input_[0][fill + t], k + t * width_, width_ * sizeof(float));
    }
    const int last = depth_ - 1;
    for (int i = 0; i < last; ++i) {
      const Rows next{layer_input_[i + 1][fill], layer_input_[i + 1].stride};
      const Rows derivative{scratch_.derivative[index(i)], padded(out(i))};
      const Product products[] = {{layer_input_[i][fill], layer_input_[i].stride, weights_w(i), out(i), in(i)}};
      activated(c_.activation, products, count, out(i),
                [&](const Activated& act, std::size_t row, std::size_t column, std::size_t n) HWY_ATTR {
                  store(act.value, next[row] + column, n);
                  store(act.derivative, derivative[row] + column, n);
                });
    }
    const Rows error{output_grad_[last][fill], output_grad_[last].stride};
    const Product products[] = {
        {layer_input_[last][fill], layer_input_[last].stride, weights_w(last), out(last), in(last)}};
    plain(products, count, out(last), error);
    for (std::size_t t = 0; t < count; ++t) stats_.loss += error_row(output_, error[t], k + t * width_, v + t * width_);
    for (int i = last; i > 0; --i) {
      const std::size_t stride = padded(in(i));
      transpose(weights_w(i), out(i), in(i), out(i), scratch_.transposed, stride);
      const Rows to{output_grad_[i - 1][fill], output_grad_[i - 1].stride};
      const Rows derivative{scratch_.derivative[index(i - 1)], padded(in(i))};
      const Product backward[] = {{output_grad_[i][fill], output_grad_[i].stride, scratch_.transposed, stride, out(i)}};
      multiply<Part::kAll>(backward, count, in(i), 0,
                           [&](Vector sum, std::size_t row, std::size_t column, std::size_t n) HWY_ATTR {
                             store(hn::Mul(sum, load(derivative[row] + column, n)), to[row] + column, n);
                           });
    }
  }

  // y_t = M_(W_t)(q_t). Each layer is one sum of three matmuls:
  //   (beta x) W + (f x) S - (a o x layer_input^T) output_grad.
  // `rows`: the number of the chunk's tokens that may have learned.
  void retrieve(std::size_t done, std::size_t fill, std::size_t count, std::size_t rows) {
    const float* q = head_.q + done * width_;
    Rows x{const_cast<float*>(q), width_};
    Rows x_beta{scratch_.x_beta[1], padded(width_)}, x_f{scratch_.x_f[1], padded(width_)};
    for (std::size_t t = 0; t < count; ++t) {
      scale_row(x[t], scratch_.rows_beta[t], width_, x_beta[t]);
      scale_row(x[t], scratch_.rows_f[t], width_, x_f[t]);
    }
    const std::size_t stride = padded(chunk_);
    const Rows a{scratch_.rows_a, stride}, scores{scratch_.scores, stride};
    for (int i = 0; i < depth_; ++i) {
      transpose(layer_input_[i].data, layer_input_[i].stride, rows, in(i), scratch_.transposed, stride);
      const Product with_inputs[] = {{x.data, x.stride, scratch_.transposed, stride, in(i)}};
      multiply<Part::kLower>(with_inputs, count, rows, fill,
                             [&](Vector sum, std::size_t row, std::size_t column, std::size_t n) HWY_ATTR {
                               store(hn::Neg(hn::Mul(sum, load(a[row] + column, n))), scores[row] + column, n);
                             });
      const Product products[] = {
          {x_beta.data, x_beta.stride, weights_w(i), out(i), in(i)},
          {x_f.data, x_f.stride, weights_s(i), out(i), in(i)},
          {scores.data, stride, output_grad_[i].data, output_grad_[i].stride, rows, true, fill}};
      const std::size_t side = static_cast<std::size_t>(i & 1);
      const Rows next{scratch_.x[side], padded(out(i))};
      if (i + 1 < depth_) {
        const Rows next_beta{scratch_.x_beta[side], padded(out(i))}, next_f{scratch_.x_f[side], padded(out(i))};
        activated(c_.activation, products, count, out(i),
                  [&](const Activated& act, std::size_t row, std::size_t column, std::size_t n) HWY_ATTR {
                    store(act.value, next[row] + column, n);
                    store(hn::Mul(act.value, hn::Set(Floats(), scratch_.rows_beta[row])), next_beta[row] + column, n);
                    store(hn::Mul(act.value, hn::Set(Floats(), scratch_.rows_f[row])), next_f[row] + column, n);
                  });
        x_beta = next_beta;
        x_f = next_f;
      } else {
        plain(products, count, out(i), next);
      }
      x = next;
    }
    for (std::size_t t = 0; t < count; ++t) finish_row(output_, x[t], q + t * width_, head_.y + (done + t) * width_);
  }

  // ---- one token: `at` of the call, row `fill` of the chunk ----

  void token(std::size_t at, std::size_t fill) {
    advance(at, fill);
    const float* q = head_.q + at * width_;
    const float* k = head_.k + at * width_;
    const int last = depth_ - 1;
    float* x = scratch_.x[0];
    float* x_beta = scratch_.x_beta[0];
    float* x_f = scratch_.x_f[0];
    scale_row(q, beta_, width_, x_beta);
    scale_row(q, f_, width_, x_f);
    if (head_.learn) {
      std::memcpy(layer_input_[0][fill], k, width_ * sizeof(float));
      float* z = last == 0 ? output_grad_[0][fill] : layer_input_[1][fill];
      codec_.gemv(Pass::kWTwiceS, Gemv{stored_w(0), stored_s(0), x_beta, x_f, layer_input_[0][fill], x, z});
      for (int i = 0; i < last; ++i) {
        activate_row(c_.activation, layer_input_[i + 1][fill], out(i), layer_input_[i + 1][fill],
                     scratch_.derivative[index(i)]);
        z = i + 1 == last ? output_grad_[last][fill] : layer_input_[i + 2][fill];
        codec_.gemv(Pass::kW, Gemv{stored_w(i + 1), {}, layer_input_[i + 1][fill], nullptr, nullptr, z, nullptr});
      }
      stats_.loss += error_row(output_, output_grad_[last][fill], k, head_.v + at * width_);
      for (int i = last; i > 0; --i) {
        float* to = output_grad_[i - 1][fill];
        codec_.gemv_transposed(stored_w(i), output_grad_[i][fill], to);
        const float* derivative = scratch_.derivative[index(i - 1)];
        each_vector(in(i), [&](std::size_t j, std::size_t n)
                               HWY_ATTR { store(hn::Mul(load(to + j, n), load(derivative + j, n)), to + j, n); });
      }
    } else {
      no_surprise(fill, 1);
      codec_.gemv(Pass::kWAndS, Gemv{stored_w(0), stored_s(0), x_beta, x_f, nullptr, x, nullptr});
    }
    const std::size_t rows = head_.learn ? fill + 1 : fill;
    add_surprises(0, rows, q, x);
    for (int i = 1; i < depth_; ++i) {
      activate_row(c_.activation, x, in(i), x, nullptr);
      scale_row(x, beta_, in(i), x_beta);
      scale_row(x, f_, in(i), x_f);
      float* h = scratch_.x[index(i & 1)];
      codec_.gemv(Pass::kWAndS, Gemv{stored_w(i), stored_s(i), x_beta, x_f, nullptr, h, nullptr});
      add_surprises(i, rows, x, h);
      x = h;
    }
    finish_row(output_, x, q, head_.y + at * width_);
  }

  // h <- h - sum_s a_s (x . layer_input_s) output_grad_s over the chunk's first `rows` tokens.
  void add_surprises(int i, std::size_t rows, const float* x, float* h) {
    gemv_transposed<Float32>(plain_matrix(layer_input_[i].data, rows, in(i)), x, scratch_.scores);
    each_vector(rows, [&](std::size_t s, std::size_t n) HWY_ATTR {
      store(hn::Mul(load(scratch_.scores + s, n), load(scratch_.a + s, n)), scratch_.scores + s, n);
    });
    float* sum = scratch_.transposed;
    const Stored gradients = plain_matrix(output_grad_[i].data, rows, out(i));
    gemv<Float32>(Pass::kW, Gemv{gradients, {}, scratch_.scores, nullptr, nullptr, sum, nullptr});
    each_vector(out(i), [&](std::size_t j, std::size_t n)
                            HWY_ATTR { store(hn::Sub(load(h + j, n), load(sum + j, n)), h + j, n); });
  }

  // ---- the end of a chunk ----

  void close_chunk() {
    const bool untouched = beta_ == 1.0F && f_ == 0.0F && m_ == 1.0F && all_zero(scratch_.e) && all_zero(scratch_.a);
    const bool guarded = head_.update_limit != nullptr, staged = guarded || !codec_.direct;
    float squares = 0.0F;
    for (int i = 0; i < depth_ && !untouched; ++i) squares += update_layer(i, staged);
    const float norm = std::sqrt(squares);
    const bool commit = !guarded || norm <= *head_.update_limit;  // false for NaN
    if (commit && staged && !untouched) commit_weights();
    std::memset(scratch_.e, 0, chunk_ * sizeof(float));
    std::memset(scratch_.a, 0, chunk_ * sizeof(float));
    m_ = beta_ = 1.0F;
    f_ = 0.0F;
    store_coefficients();
    stats_.close_chunk(norm, commit);
  }

  bool all_zero(const float* values) const {
    return std::all_of(values, values + chunk_, [](float x) { return x == 0.0F; });
  }

  // Updates layer i, in place or in scratch if `staged`. Returns the squared norm of the change of W.
  float update_layer(int i, bool staged) {
    const std::size_t stride = padded(out(i));
    for (std::size_t s = 0; s < chunk_; ++s) {
      scale_row(output_grad_[i][s], -scratch_.a[s], out(i), scratch_.grad_a + s * stride);
      scale_row(output_grad_[i][s], -scratch_.e[s], out(i), scratch_.grad_e + s * stride);
    }
    const float *w = weights_w(i), *s = weights_s(i);
    float* w_next = staged ? scratch_.w_next[index(i)] : weights_w(i);
    float* s_next = staged ? scratch_.s_next[index(i)] : weights_s(i);
    if (c_.rounding == Rounding::kErrorFeedback) {
      rounded_.add_error(i, false, w, w_next);
      rounded_.add_error(i, true, s, s_next);
      w = w_next;
      s = s_next;
    }
    return HWY_NAMESPACE::update_layer(ChunkUpdate{in(i), out(i), chunk_, layer_input_[i].data, layer_input_[i].stride,
                                                   scratch_.grad_a, scratch_.grad_e, stride, beta_, f_, m_, w, s,
                                                   w_next, s_next});
  }

  // Writes the staged update to the state.
  void commit_weights() {
    for (int i = 0; i < depth_; ++i) {
      float *w_next = scratch_.w_next[index(i)], *s_next = scratch_.s_next[index(i)];
      if (codec_.direct) {
        std::memcpy(weights_w(i), w_next, in(i) * out(i) * sizeof(float));
        std::memcpy(weights_s(i), s_next, in(i) * out(i) * sizeof(float));
      } else {
        rounded_.store_tensor(i, false, w_next, weights_w(i));
        rounded_.store_tensor(i, true, s_next, weights_s(i));
      }
    }
    rounded_.count();
  }

 public:
  void write_stats() const { stats_.write(head_.stats); }

 private:
  const Configuration& c_;
  const RowLayout& layout_;
  const Head& head_;
  TokenScratch& scratch_;
  const Codec& codec_;
  Rounded rounded_;
  int depth_;
  std::size_t chunk_, width_;
  OutputNorm output_;
  Rows layer_input_[kMaxDepth], output_grad_[kMaxDepth];
  float m_ = 1.0F, f_ = 0.0F, beta_ = 1.0F;
  bool unpacked_ = false;
  HeadStats stats_;
};

inline void run_token_head(const TokenPlan& plan, const Head& head, TokenScratch& scratch) {
  TokenRun run(plan, head, scratch);
  if (plan.configuration.mode == Mode::kRead) return run.read();
  run.update();
  run.write_stats();
}

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
