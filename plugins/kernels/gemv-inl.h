// Products of single rows with W and S, which is what decoding is: each element is loaded once for all rows that want
// it. Compiled once for each instruction set.

#if defined(TITANS_GEMV_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TITANS_GEMV_INL_H_
#undef TITANS_GEMV_INL_H_
#else
#define TITANS_GEMV_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"
#include "plugins/kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

// Matrices as the packed row stores them: float32, or bfloat16 as the upper half of a float32.
struct Float32 {
  using Element = float;
  static HWY_INLINE Vector load(const float* from, std::size_t count) { return HWY_NAMESPACE::load(from, count); }
  static HWY_INLINE Vector round(Vector v) { return v; }
};

struct BFloat16 {
  using Element = std::uint16_t;
  static HWY_INLINE Vector load(const std::uint16_t* from, std::size_t count) {
    const hn::RebindToUnsigned<Floats> bits;
    const hn::Rebind<std::uint16_t, Floats> half;
    const auto raw = count == kLanes ? hn::LoadU(half, from) : hn::LoadN(half, from, count);
    return hn::BitCast(Floats(), hn::ShiftLeft<16>(hn::PromoteTo(bits, raw)));
  }
  // The nearest bfloat16, ties to even, as a float32. NaN stays NaN.
  static HWY_INLINE Vector round(Vector v) {
    const hn::RebindToUnsigned<Floats> bits;
    const auto raw = hn::BitCast(bits, v);
    const auto odd = hn::And(hn::ShiftRight<16>(raw), hn::Set(bits, 1));
    const auto rounded = hn::Add(raw, hn::Add(odd, hn::Set(bits, 0x7FFF)));
    const auto kept = hn::And(rounded, hn::Set(bits, 0xFFFF0000));
    return hn::IfThenElse(hn::IsNaN(v), v, hn::BitCast(Floats(), kept));
  }
  // `v` holds bfloat16 values.
  static HWY_INLINE void store(Vector v, std::uint16_t* to, std::size_t count) {
    const hn::RebindToUnsigned<Floats> bits;
    const hn::Rebind<std::uint16_t, Floats> half;
    const auto raw = hn::TruncateTo(half, hn::ShiftRight<16>(hn::BitCast(bits, v)));
    count == kLanes ? hn::StoreU(raw, half, to) : hn::StoreN(raw, half, to, count);
  }
};

// Which rows are wanted of one pass over matrices of `in` x `out`:
enum class Pass {
  kOne,      // y = sum_i by_w[i] W[i]
  kTwo,      // y = sum_i by_w[i] W[i] + by_s[i] S[i]
  kTwoMore,  // that, and z = sum_i also_w[i] W[i]
};

template <class Storage>
struct Gemv {
  std::size_t in, out;
  const typename Storage::Element* w;
  const typename Storage::Element* s;
  const float* by_w;
  const float* by_s;
  const float* also_w;
  float* y;
  float* z;
};

template <Pass kPass, int kVectors, bool kTail, class Storage>
HWY_INLINE void gemv_panel(const Gemv<Storage>& g, std::size_t column, std::size_t tail) {
  const Floats d;
  const std::size_t count = kTail ? tail : kLanes;
  Vector y[kVectors], y_s[kVectors], z[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) y[j] = y_s[j] = z[j] = hn::Zero(d);
  const auto* HWY_RESTRICT w = g.w + column;
  const auto* HWY_RESTRICT s = kPass == Pass::kOne ? nullptr : g.s + column;
  for (std::size_t i = 0; i < g.in; ++i) {
    const Vector by_w = hn::Set(d, g.by_w[i]);
    const Vector by_s = kPass == Pass::kOne ? by_w : hn::Set(d, g.by_s[i]);
    const Vector also_w = kPass == Pass::kTwoMore ? hn::Set(d, g.also_w[i]) : by_w;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const std::size_t at = static_cast<std::size_t>(j) * kLanes;
      const Vector ws = Storage::load(w + at, count);
      y[j] = hn::MulAdd(by_w, ws, y[j]);
      if constexpr (kPass != Pass::kOne) y_s[j] = hn::MulAdd(by_s, Storage::load(s + at, count), y_s[j]);
      if constexpr (kPass == Pass::kTwoMore) z[j] = hn::MulAdd(also_w, ws, z[j]);
    }
    w += g.out;
    if constexpr (kPass != Pass::kOne) s += g.out;
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    const std::size_t at = column + static_cast<std::size_t>(j) * kLanes;
    store(kPass == Pass::kOne ? y[j] : hn::Add(y[j], y_s[j]), g.y + at, count);
    if constexpr (kPass == Pass::kTwoMore) store(z[j], g.z + at, count);
  }
}

template <Pass kPass, class Storage>
HWY_INLINE void gemv(const Gemv<Storage>& g) {
  constexpr int kVectors = HWY_TARGET == HWY_AVX2 ? 3 : 4;
  std::size_t column = 0;
  for (; column + kVectors * kLanes <= g.out; column += kVectors * kLanes) {
    gemv_panel<kPass, kVectors, false>(g, column, 0);
  }
  for (; column + kLanes <= g.out; column += kLanes) gemv_panel<kPass, 1, false>(g, column, 0);
  if (column < g.out) gemv_panel<kPass, 1, true>(g, column, g.out - column);
}

// y[i] = W[i] . x for each of the `in` rows.
template <class Storage>
HWY_INLINE void gemv_transposed(const typename Storage::Element* w, std::size_t in, std::size_t out, const float* x,
                                float* y) {
  const Floats d;
  std::size_t i = 0;
  for (; i + 4 <= in; i += 4, w += 4 * out) {
    Vector sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
    each_vector(out, [&](std::size_t column, std::size_t n) HWY_ATTR {
      const Vector xs = load(x + column, n);
#pragma GCC unroll 4
      for (std::size_t r = 0; r < 4; ++r) sum[r] = hn::MulAdd(Storage::load(w + r * out + column, n), xs, sum[r]);
    });
    store_sums(sum, y + i);
  }
  for (; i < in; ++i, w += out) {
    y[i] = sum_vectors(out, [&](std::size_t column, std::size_t n)
                                HWY_ATTR { return hn::Mul(Storage::load(w + column, n), load(x + column, n)); });
  }
}

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
