// Sums of outer products: A^T B with both row-major. An epilogue receives the results while they are in registers.
// Compiled once per instruction set.

#if defined(TITANS_OUTER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TITANS_OUTER_INL_H_
#undef TITANS_OUTER_INL_H_
#else
#define TITANS_OUTER_INL_H_
#endif

#include <cstddef>

#include "hwy/highway.h"
#include "plugins/kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

// A (k x rows) and B (k x columns).
struct Outer {
  const float* a;
  std::size_t a_stride;
  const float* b;
  std::size_t b_stride;
  std::size_t k;
};

#if HWY_TARGET == HWY_AVX2
inline constexpr int kOuterRows = 4;  // 16 registers
#else
inline constexpr int kOuterRows = 8;  // 32 registers
#endif

template <int kRows, int kVectors, bool kTail, class Epilogue>
HWY_INLINE void outer_tile(const Outer& p, std::size_t row, std::size_t column, std::size_t tail,
                           const Epilogue& epilogue) {
  const Floats d;
  const std::size_t count = kTail ? tail : kLanes;
  Vector sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = hn::Zero(d);
  }
  const float* HWY_RESTRICT a = p.a + row;
  const float* HWY_RESTRICT b = p.b + column;
  for (std::size_t t = 0; t < p.k; ++t, a += p.a_stride, b += p.b_stride) {
    Vector bs[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) bs[j] = load(b + static_cast<std::size_t>(j) * kLanes, count);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vector as = hn::Set(d, a[i]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] = hn::MulAdd(as, bs[j], sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      epilogue(sum[i][j], row + static_cast<std::size_t>(i), column + static_cast<std::size_t>(j) * kLanes, count);
    }
  }
}

template <int kVectors, bool kTail, class Epilogue>
HWY_INLINE void outer_panel(const Outer& p, std::size_t rows, std::size_t column, std::size_t tail,
                            const Epilogue& epilogue) {
  std::size_t row = 0;
  for (; row + kOuterRows <= rows; row += kOuterRows) {
    outer_tile<kOuterRows, kVectors, kTail>(p, row, column, tail, epilogue);
  }
  for (; row < rows; ++row) outer_tile<1, kVectors, kTail>(p, row, column, tail, epilogue);
}

// Computes A^T B, rows x columns. Calls epilogue(vector, row, column, count of valid lanes) for each vector.
template <class Epilogue>
HWY_INLINE void multiply_outer(const Outer& p, std::size_t rows, std::size_t columns, const Epilogue& epilogue) {
  std::size_t column = 0;
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
    outer_panel<2, false>(p, rows, column, 0, epilogue);
  }
  if (column + kLanes <= columns) {
    outer_panel<1, false>(p, rows, column, 0, epilogue);
    column += kLanes;
  }
  if (column < columns) outer_panel<1, true>(p, rows, column, columns - column, epilogue);
}

// ---- symmetric results ----

// Rows of a tile, which is one vector wide. Small tiles compute fewer elements that symmetry already gives.
inline constexpr std::size_t kSymmetricRows = kLanes == 16 ? 16 : 8;
// Sizes are multiples of this.
inline constexpr std::size_t kSymmetricBlock = 16;

// Computes a symmetric A^T B: the tiles on and below the diagonal. `size` is a multiple of kSymmetricBlock.
template <class Epilogue>
HWY_INLINE void multiply_symmetric(const Outer& p, std::size_t size, const Epilogue& epilogue) {
  for (std::size_t column = 0; column < size; column += kLanes) {
    for (std::size_t row = column / kSymmetricRows * kSymmetricRows; row < size; row += kSymmetricRows) {
      outer_tile<static_cast<int>(kSymmetricRows), 1, false>(p, row, column, 0, epilogue);
    }
  }
}

// Copies the elements that multiply_symmetric has left out.
inline void mirror(float* matrix, std::size_t stride, std::size_t size) {
  for (std::size_t column = 0; column + kSymmetricRows < size; column += kSymmetricRows) {
    const std::size_t below = column + kSymmetricRows;
    transpose(matrix + below * stride + column, stride, size - below, kSymmetricRows, matrix + column * stride + below,
              stride);
  }
}

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
