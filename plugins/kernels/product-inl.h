// Small matmuls with an epilogue: a tile accumulates one or more matmuls in registers, and the epilogue finishes and
// stores its vectors. Compiled once per instruction set.
//
// A matmul is A (rows x k) times B (k x columns), both row-major. The operands have the size of one head's memory and
// fit in the L1 or L2 cache, so nothing is packed.

#if defined(TITANS_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TITANS_PRODUCT_INL_H_
#undef TITANS_PRODUCT_INL_H_
#else
#define TITANS_PRODUCT_INL_H_
#endif

#include <cstddef>

#include "hwy/highway.h"
#include "plugins/kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

#if HWY_TARGET == HWY_AVX2
inline constexpr int kTileRows = 4;  // 16 registers
inline constexpr int kUnroll = 2;
#else
inline constexpr int kTileRows = 8;  // 32 registers
inline constexpr int kUnroll = 4;
#endif

// One matmul that a tile accumulates. In a triangular one, row i has only the first `first + i + 1` of the k terms. A
// must have zeros after them, up to the next multiple of kTileRows.
struct Product {
  const float* a;
  std::size_t a_stride;
  const float* b;
  std::size_t b_stride;
  std::size_t k;
  bool triangular = false;
  std::size_t first = 0;
};

// Adds kSteps terms of the sum. A row's address is computed once for all of them.
template <int kRows, int kVectors, bool kTail, int kSteps>
HWY_INLINE void steps(const Product& p, const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, std::size_t tail,
                      Vector (&sum)[kRows][kVectors]) {
  const Floats d;
  Vector bs[kSteps][kVectors];
#pragma GCC unroll 8
  for (int t = 0; t < kSteps; ++t) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const float* from = b + static_cast<std::size_t>(t) * p.b_stride + static_cast<std::size_t>(j) * kLanes;
      bs[t][j] = kTail ? hn::LoadN(d, from, tail) : hn::LoadU(d, from);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const float* row = a + static_cast<std::size_t>(i) * p.a_stride;
#pragma GCC unroll 8
    for (int t = 0; t < kSteps; ++t) {
      const Vector as = hn::Set(d, row[t]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] = hn::MulAdd(as, bs[t][j], sum[i][j]);
    }
  }
}

// Adds rows x (vectors of columns) of a matmul to `sum`. With kTail, the single vector has `tail` columns.
template <int kRows, int kVectors, bool kTail>
HWY_INLINE void accumulate(const Product& p, std::size_t row, std::size_t column, std::size_t tail,
                           Vector (&sum)[kRows][kVectors]) {
  static_assert(!kTail || kVectors == 1);
  std::size_t k = p.k;
  if (p.triangular) k = HWY_MIN(k, p.first + row + kRows);
  const float* HWY_RESTRICT a = p.a + row * p.a_stride;
  const float* HWY_RESTRICT b = p.b + column;
  std::size_t t = 0;
  for (; t + kUnroll <= k; t += kUnroll)
    steps<kRows, kVectors, kTail, kUnroll>(p, a + t, b + t * p.b_stride, tail, sum);
  for (; t < k; ++t) steps<kRows, kVectors, kTail, 1>(p, a + t, b + t * p.b_stride, tail, sum);
}

template <int kRows, int kVectors, bool kTail, int kProducts, class Epilogue>
HWY_INLINE void tile(const Product (&products)[kProducts], std::size_t row, std::size_t column, std::size_t tail,
                     const Epilogue& epilogue) {
  Vector sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = hn::Zero(Floats());
  }
  for (int n = 0; n < kProducts; ++n) accumulate<kRows, kVectors, kTail>(products[n], row, column, tail, sum);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      epilogue(sum[i][j], row + static_cast<std::size_t>(i), column + static_cast<std::size_t>(j) * kLanes,
               kTail ? tail : kLanes);
    }
  }
}

// The wanted elements of a result: all, or columns up to `first + i` of row i. Elements above may be computed too, if a
// tile covers them.
enum class Part { kAll, kLower };

template <int kVectors, bool kTail, int kProducts, class Epilogue>
HWY_INLINE void panel(const Product (&products)[kProducts], std::size_t row, std::size_t rows, std::size_t column,
                      std::size_t tail, const Epilogue& epilogue) {
  for (; row + kTileRows <= rows; row += kTileRows) {
    tile<kTileRows, kVectors, kTail>(products, row, column, tail, epilogue);
  }
  if constexpr (kTileRows > 4) {
    for (; row + 4 <= rows; row += 4) tile<4, kVectors, kTail>(products, row, column, tail, epilogue);
  }
  for (; row < rows; ++row) tile<1, kVectors, kTail>(products, row, column, tail, epilogue);
}

// Computes the sum of the matmuls, rows x columns. Calls epilogue(vector, row, column, count of valid lanes) for each
// vector.
template <Part kPart, int kProducts, class Epilogue>
HWY_INLINE void multiply(const Product (&products)[kProducts], std::size_t rows, std::size_t columns, std::size_t first,
                         const Epilogue& epilogue) {
  const auto top = [first](std::size_t column) -> std::size_t {
    if (kPart == Part::kAll || column <= first) return 0;
    return (column - first) / kTileRows * kTileRows;
  };
  std::size_t column = 0;
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
    panel<2, false>(products, top(column), rows, column, 0, epilogue);
  }
  if (column + kLanes <= columns) {
    panel<1, false>(products, top(column), rows, column, 0, epilogue);
    column += kLanes;
  }
  if (column < columns) panel<1, true>(products, top(column), rows, column, columns - column, epilogue);
}

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
