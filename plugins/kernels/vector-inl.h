// Vectors of floats, and operations on one row of them. Compiled once per instruction set.

#if defined(TITANS_VECTOR_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TITANS_VECTOR_INL_H_
#undef TITANS_VECTOR_INL_H_
#else
#define TITANS_VECTOR_INL_H_
#endif

#include <cstddef>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;
using Vector = hn::Vec<Floats>;
inline constexpr std::size_t kLanes = HWY_MAX_LANES_D(Floats);

// The first `count` <= kLanes values, then zeros.
HWY_INLINE Vector load(const float* from, std::size_t count) {
  return count == kLanes ? hn::LoadU(Floats(), from) : hn::LoadN(Floats(), from, count);
}

HWY_INLINE void store(Vector v, float* to, std::size_t count) {
  if (count == kLanes) {
    hn::StoreU(v, Floats(), to);
  } else {
    hn::StoreN(v, Floats(), to, count);
  }
}

// Calls body(index, count of valid lanes) for each vector of `size` values.
template <class Body>
HWY_INLINE void each_vector(std::size_t size, const Body& body) {
  std::size_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, size - i);
}

// The sum of body(index, count of valid lanes). Lanes beyond the count must be zero.
template <class Body>
HWY_INLINE float sum_vectors(std::size_t size, const Body& body) {
  Vector sum = hn::Zero(Floats());
  each_vector(size, [&](std::size_t i, std::size_t n) HWY_ATTR { sum = hn::Add(sum, body(i, n)); });
  return hn::ReduceSum(Floats(), sum);
}

HWY_INLINE void scale_row(const float* from, float by, std::size_t size, float* to) {
  const Vector factor = hn::Set(Floats(), by);
  each_vector(size,
              [&](std::size_t i, std::size_t n) HWY_ATTR { store(hn::Mul(load(from + i, n), factor), to + i, n); });
}

HWY_INLINE void fill_row(float* to, float value, std::size_t size) {
  each_vector(size, [&](std::size_t i, std::size_t n) HWY_ATTR { store(hn::Set(Floats(), value), to + i, n); });
}

#if HWY_TARGET != HWY_SCALAR
// Adds up the blocks of four lanes.
template <class D>
HWY_INLINE void store_block_sum(D d, hn::Vec<D> v, float* to) {
  if constexpr (HWY_MAX_LANES_D(D) == 4) {
    hn::StoreU(v, d, to);
  } else {
    const hn::Half<D> half;
    store_block_sum(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)), to);
  }
}
#endif

// Stores the sums of four vectors, which takes fewer shuffles than four separate sums.
HWY_INLINE void store_sums(const Vector (&v)[4], float* to) {
#if HWY_TARGET == HWY_SCALAR
  for (int i = 0; i < 4; ++i) to[i] = hn::GetLane(v[i]);
#else
  const Floats d;
  const hn::Repartition<double, Floats> pairs;
  const auto add_pairs = [&](Vector a, Vector b) HWY_ATTR {
    return hn::BitCast(pairs, hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  };
  const auto low = add_pairs(v[0], v[1]), high = add_pairs(v[2], v[3]);
  // Each block of four lanes now becomes the four sums over that block.
  const Vector blocks = hn::Add(hn::BitCast(d, hn::InterleaveLower(pairs, low, high)),
                                hn::BitCast(d, hn::InterleaveUpper(pairs, low, high)));
  store_block_sum(d, blocks, to);
#endif
}

// Writes the transpose of `from` (rows x columns) to `to` (columns x rows).
inline void transpose(const float* from, std::size_t from_stride, std::size_t rows, std::size_t columns, float* to,
                      std::size_t to_stride) {
  std::size_t row = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::CappedTag<float, 4> d;
  const hn::Repartition<double, decltype(d)> dd;
  for (; row + 4 <= rows; row += 4) {
    const float* top = from + row * from_stride;
    std::size_t column = 0;
    for (; column + 4 <= columns; column += 4) {
      const auto a = hn::LoadU(d, top + column);
      const auto b = hn::LoadU(d, top + from_stride + column);
      const auto c = hn::LoadU(d, top + 2 * from_stride + column);
      const auto e = hn::LoadU(d, top + 3 * from_stride + column);
      const auto ab_low = hn::BitCast(dd, hn::InterleaveLower(d, a, b));
      const auto ab_high = hn::BitCast(dd, hn::InterleaveUpper(d, a, b));
      const auto ce_low = hn::BitCast(dd, hn::InterleaveLower(d, c, e));
      const auto ce_high = hn::BitCast(dd, hn::InterleaveUpper(d, c, e));
      float* out = to + column * to_stride + row;
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, ab_low, ce_low)), d, out);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, ab_low, ce_low)), d, out + to_stride);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, ab_high, ce_high)), d, out + 2 * to_stride);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, ab_high, ce_high)), d, out + 3 * to_stride);
    }
    for (; column < columns; ++column) {
      for (std::size_t i = 0; i < 4; ++i) to[column * to_stride + row + i] = top[i * from_stride + column];
    }
  }
#endif
  for (; row < rows; ++row) {
    for (std::size_t column = 0; column < columns; ++column) {
      to[column * to_stride + row] = from[row * from_stride + column];
    }
  }
}

// ---- activations and their derivatives ----

struct Activated {
  Vector value, derivative;
};

HWY_INLINE Vector sigmoid(Vector z) {
  const Floats d;
  const Vector one = hn::Set(d, 1.0F);
  // Below -88 the exponential overflows float32, and the result rounds to zero.
  const Vector s = hn::Div(one, hn::Add(one, hn::Exp(d, hn::Min(hn::Neg(z), hn::Set(d, 88.0F)))));
  return hn::IfThenZeroElse(hn::Lt(z, hn::Set(d, -88.0F)), s);
}

HWY_INLINE Activated silu(Vector z) {
  const Vector one = hn::Set(Floats(), 1.0F);
  const Vector s = sigmoid(z);
  return {hn::Mul(z, s), hn::Mul(s, hn::MulAdd(z, hn::Sub(one, s), one))};
}

// The cumulative distribution function of the normal distribution, from the rational Chebyshev approximation of erfc in
// "Numerical Recipes", section 6.2. Its relative error is below 1.2e-7 everywhere.
HWY_INLINE Vector normal_cdf(Vector z) {
  const Floats d;
  const Vector one = hn::Set(d, 1.0F);
  const Vector x = hn::Mul(hn::Abs(z), hn::Set(d, 0.70710678F));
  const Vector t = hn::Div(one, hn::MulAdd(x, hn::Set(d, 0.5F), one));
  Vector p = hn::Set(d, 0.17087277F);
  for (const float c : {-0.82215223F, 1.48851587F, -1.13520398F, 0.27886807F, -0.18628806F, 0.09678418F, 0.37409196F,
                        1.00002368F, -1.26551223F}) {
    p = hn::MulAdd(p, t, hn::Set(d, c));
  }
  // Beyond 13, erfc is zero in float32. The limit keeps the square finite.
  const Vector near = hn::Min(x, hn::Set(d, 13.0F));
  const Vector half = hn::Mul(hn::Mul(hn::Set(d, 0.5F), t), hn::Exp(d, hn::NegMulAdd(near, near, p)));
  return hn::IfThenElse(hn::Lt(z, hn::Zero(d)), half, hn::Sub(one, half));
}

HWY_INLINE Activated gelu(Vector z) {
  const Floats d;
  const Vector cdf = normal_cdf(z);
  const Vector near = hn::Min(hn::Abs(z), hn::Set(d, 18.0F));
  const Vector density = hn::Mul(hn::Exp(d, hn::Mul(hn::Mul(near, near), hn::Set(d, -0.5F))), hn::Set(d, 0.39894228F));
  return {hn::Mul(z, cdf), hn::MulAdd(z, density, cdf)};
}

template <Activation kActivation>
HWY_INLINE Activated activate(Vector z) {
  return kActivation == Activation::kSilu ? silu(z) : gelu(z);
}

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
