// The chunk update adds a chunk's surprises to W and S, in one pass over both. Compiled once per instruction set.
//
//   W <- beta W + f S - sum_s a_s layer_input_s^T output_grad_s
//   S <- m S - sum_s e_s layer_input_s^T output_grad_s
//
// A tile of W and the same tile of S stay in registers over all tokens s of the chunk. Each is read and written once:
// 16 bytes per weight, for 4 FLOP per weight and token.

#if defined(TITANS_CHUNK_UPDATE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TITANS_CHUNK_UPDATE_INL_H_
#undef TITANS_CHUNK_UPDATE_INL_H_
#else
#define TITANS_CHUNK_UPDATE_INL_H_
#endif

#include <cstddef>

#include "hwy/highway.h"
#include "plugins/kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

struct ChunkUpdate {
  std::size_t in, out, tokens;
  const float* layer_input;  // tokens x in
  std::size_t input_stride;
  const float* grad_a;  // tokens x out, rows of output_grad times -a
  const float* grad_e;  // tokens x out, the rows of output_grad times -a
  std::size_t grad_stride;
  float beta, f, m;
  const float* w;  // in x out, like the others
  const float* s;
  float* w_next;  // may be equal to w
  float* s_next;  // may be equal to s
};

#if HWY_TARGET == HWY_AVX2
inline constexpr int kUpdateVectors = 1;
#else
inline constexpr int kUpdateVectors = 2;
#endif
inline constexpr int kUpdateRows = 4;

// Returns the squared change of the tile of W, lane by lane.
template <int kRows, int kVectors, bool kTail>
HWY_INLINE Vector update_tile(const ChunkUpdate& update, std::size_t row, std::size_t column, std::size_t tail) {
  const Floats d;
  const std::size_t count = kTail ? tail : kLanes;
  Vector w[kRows][kVectors], s[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) w[i][j] = s[i][j] = hn::Zero(d);
  }
  const float* HWY_RESTRICT input = update.layer_input + row;
  const float* HWY_RESTRICT grad_a = update.grad_a + column;
  const float* HWY_RESTRICT grad_e = update.grad_e + column;
  for (std::size_t t = 0; t < update.tokens; ++t) {
    Vector as[kVectors], es[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      as[j] = load(grad_a + static_cast<std::size_t>(j) * kLanes, count);
      es[j] = load(grad_e + static_cast<std::size_t>(j) * kLanes, count);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vector l = hn::Set(d, input[i]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        w[i][j] = hn::MulAdd(l, as[j], w[i][j]);
        s[i][j] = hn::MulAdd(l, es[j], s[i][j]);
      }
    }
    input += update.input_stride;
    grad_a += update.grad_stride;
    grad_e += update.grad_stride;
  }
  const Vector beta = hn::Set(d, update.beta), f = hn::Set(d, update.f), m = hn::Set(d, update.m);
  Vector change = hn::Zero(d);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const std::size_t at =
          (row + static_cast<std::size_t>(i)) * update.out + column + static_cast<std::size_t>(j) * kLanes;
      const Vector w_old = load(update.w + at, count), s_old = load(update.s + at, count);
      const Vector w_new = hn::MulAdd(beta, w_old, hn::MulAdd(f, s_old, w[i][j]));
      const Vector delta = hn::Sub(w_new, w_old);
      change = hn::MulAdd(delta, delta, change);
      store(w_new, update.w_next + at, count);
      store(hn::MulAdd(m, s_old, s[i][j]), update.s_next + at, count);
    }
  }
  return change;
}

template <int kVectors, bool kTail>
HWY_INLINE Vector update_panel(const ChunkUpdate& update, std::size_t column, std::size_t tail) {
  Vector change = hn::Zero(Floats());
  std::size_t row = 0;
  for (; row + kUpdateRows <= update.in; row += kUpdateRows) {
    change = hn::Add(change, update_tile<kUpdateRows, kVectors, kTail>(update, row, column, tail));
  }
  for (; row < update.in; ++row) change = hn::Add(change, update_tile<1, kVectors, kTail>(update, row, column, tail));
  return change;
}

// Updates one layer. Returns the squared Frobenius norm of the change of W.
inline float update_layer(const ChunkUpdate& update) {
  constexpr std::size_t kColumns = kUpdateVectors * kLanes;
  Vector change = hn::Zero(Floats());
  std::size_t column = 0;
  for (; column + kColumns <= update.out; column += kColumns) {
    change = hn::Add(change, update_panel<kUpdateVectors, false>(update, column, 0));
  }
  for (; column + kLanes <= update.out; column += kLanes) {
    change = hn::Add(change, update_panel<1, false>(update, column, 0));
  }
  if (column < update.out) change = hn::Add(change, update_panel<1, true>(update, column, update.out - column));
  return hn::ReduceSum(Floats(), change);
}

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
