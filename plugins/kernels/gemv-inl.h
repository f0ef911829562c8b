// Vector-matrix products with W and S, which dominate decoding. They are bound by memory bandwidth, so one pass over a
// matrix serves all vectors that multiply it. A vector of accumulators holds several columns of the result while the
// pass goes down the rows. Compiled once per instruction set.

#if defined(TITANS_GEMV_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TITANS_GEMV_INL_H_
#undef TITANS_GEMV_INL_H_
#else
#define TITANS_GEMV_INL_H_
#endif

#include <cstddef>

#include "hwy/highway.h"
#include "plugins/kernels/memory_dtype-inl.h"
#include "plugins/kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

// The results of one pass over the matrices.
enum class Pass {
  kW,        // y = sum_i by_w[i] W[i]
  kWAndS,    // y = sum_i by_w[i] W[i] + by_s[i] S[i]
  kWTwiceS,  // also z = sum_i also_w[i] W[i]
};

struct Gemv {
  Stored w, s;  // of the same shape
  const float* by_w;
  const float* by_s;
  const float* also_w;
  float* y;
  float* z;
};

template <Pass kPass, int kVectors, bool kTail, class MemoryDtype>
HWY_INLINE void gemv_panel(const Gemv& g, std::size_t column, std::size_t tail) {
  const Floats d;
  const std::size_t count = kTail ? tail : kLanes;
  Vector y[kVectors], y_s[kVectors], z[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) y[j] = y_s[j] = z[j] = hn::Zero(d);
  const View<MemoryDtype> w(g.w), s(g.s);
  for (std::size_t i = 0; i < w.rows; ++i) {
    const Vector by_w = hn::Set(d, g.by_w[i]);
    const Vector by_s = kPass == Pass::kW ? by_w : hn::Set(d, g.by_s[i]);
    const Vector also_w = kPass == Pass::kWTwiceS ? hn::Set(d, g.also_w[i]) : by_w;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const std::size_t at = column + static_cast<std::size_t>(j) * kLanes;
      const Vector ws = w.load(i, at, count);
      y[j] = hn::MulAdd(by_w, ws, y[j]);
      if constexpr (kPass != Pass::kW) y_s[j] = hn::MulAdd(by_s, s.load(i, at, count), y_s[j]);
      if constexpr (kPass == Pass::kWTwiceS) z[j] = hn::MulAdd(also_w, ws, z[j]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    const std::size_t at = column + static_cast<std::size_t>(j) * kLanes;
    store(kPass == Pass::kW ? y[j] : hn::Add(y[j], y_s[j]), g.y + at, count);
    if constexpr (kPass == Pass::kWTwiceS) store(z[j], g.z + at, count);
  }
}

// The same for scale blocks. A scale is applied to the factor of its row, once per block instead of once per element.
template <Pass kPass, int kBlocks, class MemoryDtype>
HWY_INLINE void gemv_blocks(const Gemv& g, std::size_t block) {
  const Floats d;
  constexpr int kEach = static_cast<int>(kBlock / kLanes);
  Vector y[kBlocks][kEach], y_s[kBlocks][kEach], z[kBlocks][kEach];
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
    for (int j = 0; j < kEach; ++j) y[b][j] = y_s[b][j] = z[b][j] = hn::Zero(d);
  }
  const View<MemoryDtype> w(g.w), s(g.s);
  const auto column = [block](int b, int j) {
    return (block + static_cast<std::size_t>(b)) * kBlock + static_cast<std::size_t>(j) * kLanes;
  };
  for (std::size_t i = 0; i < w.rows; ++i) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const std::size_t at = block + static_cast<std::size_t>(b);
      const Vector scale = w.scale(i, at);
      const Vector by_w = hn::Mul(hn::Set(d, g.by_w[i]), scale);
      const Vector also_w = kPass == Pass::kWTwiceS ? hn::Mul(hn::Set(d, g.also_w[i]), scale) : by_w;
      const Vector by_s = kPass == Pass::kW ? by_w : hn::Mul(hn::Set(d, g.by_s[i]), s.scale(i, at));
#pragma GCC unroll 8
      for (int j = 0; j < kEach; ++j) {
        const Vector ws = w.unscaled(i, column(b, j), kLanes);
        y[b][j] = hn::MulAdd(by_w, ws, y[b][j]);
        if constexpr (kPass != Pass::kW) {
          y_s[b][j] = hn::MulAdd(by_s, s.unscaled(i, column(b, j), kLanes), y_s[b][j]);
        }
        if constexpr (kPass == Pass::kWTwiceS) z[b][j] = hn::MulAdd(also_w, ws, z[b][j]);
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
    for (int j = 0; j < kEach; ++j) {
      store(kPass == Pass::kW ? y[b][j] : hn::Add(y[b][j], y_s[b][j]), g.y + column(b, j), kLanes);
      if constexpr (kPass == Pass::kWTwiceS) store(z[b][j], g.z + column(b, j), kLanes);
    }
  }
}

template <Pass kPass, class MemoryDtype>
HWY_INLINE void gemv_pass(const Gemv& g) {
  constexpr int kVectors = HWY_TARGET == HWY_AVX2 ? 3 : 4;
  const std::size_t columns = g.w.columns;
  std::size_t column = 0;
  if constexpr (MemoryDtype::kScaled) {
    constexpr int kBlocks = kLanes == 16 ? 2 : 1;
    for (; column + kBlocks * kBlock <= columns; column += kBlocks * kBlock) {
      gemv_blocks<kPass, kBlocks, MemoryDtype>(g, column / kBlock);
    }
    for (; column + kBlock <= columns; column += kBlock) gemv_blocks<kPass, 1, MemoryDtype>(g, column / kBlock);
  }
  for (; column + kVectors * kLanes <= columns; column += kVectors * kLanes) {
    gemv_panel<kPass, kVectors, false, MemoryDtype>(g, column, 0);
  }
  for (; column + kLanes <= columns; column += kLanes) gemv_panel<kPass, 1, false, MemoryDtype>(g, column, 0);
  if (column < columns) gemv_panel<kPass, 1, true, MemoryDtype>(g, column, columns - column);
}

template <class MemoryDtype>
void gemv(Pass pass, const Gemv& g) {
  switch (pass) {
    case Pass::kW:
      return gemv_pass<Pass::kW, MemoryDtype>(g);
    case Pass::kWAndS:
      return gemv_pass<Pass::kWAndS, MemoryDtype>(g);
    case Pass::kWTwiceS:
      return gemv_pass<Pass::kWTwiceS, MemoryDtype>(g);
  }
}

// y[i] = W[i] . x for each row of W.
template <class MemoryDtype>
void gemv_transposed(const Stored& stored, const float* x, float* y) {
  const Floats d;
  const View<MemoryDtype> w(stored);
  std::size_t i = 0;
  for (; i + 4 <= w.rows; i += 4) {
    Vector sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
    std::size_t begin = 0;
    if constexpr (MemoryDtype::kScaled) {
      for (; begin + kBlock <= w.columns; begin += kBlock) {
        Vector part[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
#pragma GCC unroll 8
        for (std::size_t j = 0; j < kBlock; j += kLanes) {
          const Vector xs = load(x + begin + j, kLanes);
#pragma GCC unroll 4
          for (std::size_t r = 0; r < 4; ++r) {
            part[r] = hn::MulAdd(w.unscaled(i + r, begin + j, kLanes), xs, part[r]);
          }
        }
#pragma GCC unroll 4
        for (std::size_t r = 0; r < 4; ++r) sum[r] = hn::MulAdd(part[r], w.scale(i + r, begin / kBlock), sum[r]);
      }
    }
    each_vector(w.columns - begin, [&](std::size_t rest, std::size_t n) HWY_ATTR {
      const std::size_t column = begin + rest;
      const Vector xs = load(x + column, n);
#pragma GCC unroll 4
      for (std::size_t r = 0; r < 4; ++r) sum[r] = hn::MulAdd(w.load(i + r, column, n), xs, sum[r]);
    });
    store_sums(sum, y + i);
  }
  for (; i < w.rows; ++i) {
    y[i] = sum_vectors(w.columns, [&](std::size_t column, std::size_t n)
                                      HWY_ATTR { return hn::Mul(w.load(i, column, n), load(x + column, n)); });
  }
}

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
