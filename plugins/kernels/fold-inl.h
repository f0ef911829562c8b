// The end of a chunk: W and S take in its surprises in one pass over both. Compiled once for each instruction set.
//
//   W <- beta W + f S - sum_s a_s left_s^T right_s          S <- m S - sum_s e_s left_s^T right_s
//
// A tile of W and the same tile of S stay in registers over all tokens s of the chunk, and each is read and written
// once.

#if defined(TITANS_FOLD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TITANS_FOLD_INL_H_
#undef TITANS_FOLD_INL_H_
#else
#define TITANS_FOLD_INL_H_
#endif

#include <cstddef>

#include "hwy/highway.h"
#include "plugins/kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

struct Fold {
  std::size_t in, out, tokens;
  const float* left;  // tokens x in
  std::size_t left_stride;
  const float* right_a;  // tokens x out, rows times -a
  const float* right_e;  // tokens x out, rows times -e
  std::size_t right_stride;
  float beta, f, m;
  const float* w;  // in x out, as are the others
  const float* s;
  float* w_next;  // may be w
  float* s_next;  // may be s
};

#if HWY_TARGET == HWY_AVX2
inline constexpr int kFoldVectors = 1;
#else
inline constexpr int kFoldVectors = 2;
#endif
inline constexpr int kFoldRows = 4;

// Returns, lane by lane, the squares of what the tile of W changes by.
template <int kRows, int kVectors, bool kTail>
HWY_INLINE Vector fold_tile(const Fold& fold, std::size_t row, std::size_t column, std::size_t tail) {
  const Floats d;
  const std::size_t count = kTail ? tail : kLanes;
  Vector w[kRows][kVectors], s[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) w[i][j] = s[i][j] = hn::Zero(d);
  }
  const float* HWY_RESTRICT left = fold.left + row;
  const float* HWY_RESTRICT right_a = fold.right_a + column;
  const float* HWY_RESTRICT right_e = fold.right_e + column;
  for (std::size_t t = 0; t < fold.tokens; ++t) {
    Vector as[kVectors], es[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      as[j] = load(right_a + static_cast<std::size_t>(j) * kLanes, count);
      es[j] = load(right_e + static_cast<std::size_t>(j) * kLanes, count);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vector l = hn::Set(d, left[i]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        w[i][j] = hn::MulAdd(l, as[j], w[i][j]);
        s[i][j] = hn::MulAdd(l, es[j], s[i][j]);
      }
    }
    left += fold.left_stride;
    right_a += fold.right_stride;
    right_e += fold.right_stride;
  }
  const Vector beta = hn::Set(d, fold.beta), f = hn::Set(d, fold.f), m = hn::Set(d, fold.m);
  Vector change = hn::Zero(d);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const std::size_t at =
          (row + static_cast<std::size_t>(i)) * fold.out + column + static_cast<std::size_t>(j) * kLanes;
      const Vector w_old = load(fold.w + at, count), s_old = load(fold.s + at, count);
      const Vector w_new = hn::MulAdd(beta, w_old, hn::MulAdd(f, s_old, w[i][j]));
      const Vector delta = hn::Sub(w_new, w_old);
      change = hn::MulAdd(delta, delta, change);
      store(w_new, fold.w_next + at, count);
      store(hn::MulAdd(m, s_old, s[i][j]), fold.s_next + at, count);
    }
  }
  return change;
}

template <int kVectors, bool kTail>
HWY_INLINE Vector fold_panel(const Fold& fold, std::size_t column, std::size_t tail) {
  Vector change = hn::Zero(Floats());
  std::size_t row = 0;
  for (; row + kFoldRows <= fold.in; row += kFoldRows) {
    change = hn::Add(change, fold_tile<kFoldRows, kVectors, kTail>(fold, row, column, tail));
  }
  for (; row < fold.in; ++row) change = hn::Add(change, fold_tile<1, kVectors, kTail>(fold, row, column, tail));
  return change;
}

// Folds one layer. Returns the squared Frobenius norm of what W changes by.
inline float fold_layer(const Fold& fold) {
  constexpr std::size_t kColumns = kFoldVectors * kLanes;
  Vector change = hn::Zero(Floats());
  std::size_t column = 0;
  for (; column + kColumns <= fold.out; column += kColumns) {
    change = hn::Add(change, fold_panel<kFoldVectors, false>(fold, column, 0));
  }
  for (; column + kLanes <= fold.out; column += kLanes) {
    change = hn::Add(change, fold_panel<1, false>(fold, column, 0));
  }
  if (column < fold.out) change = hn::Add(change, fold_panel<1, true>(fold, column, fold.out - column));
  return hn::ReduceSum(Floats(), change);
}

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
