// Newton-Schulz iteration towards the nearest semi-orthogonal matrix. Compiled once per instruction set.
//
// The iterate Y is always tall, large x small: it is X^T if X is wide. A step is
//
//   A = Y^T Y          P = a I + b A + c A A          Y <- Y P
//
// Several steps are combined as Y <- Y P1 P2 P3, and the next step's A is A P P. The small x small matmuls cost less
// than the large x small ones. They are symmetric, because the factors commute, so only half of each is computed. Three
// combined steps are as accurate as separate ones; with four, the rounding of A becomes visible. Rows and columns are
// zero-padded to whole tiles, and the padding stays zero.

#if defined(TITANS_NEWTON_SCHULZ_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TITANS_NEWTON_SCHULZ_INL_H_
#undef TITANS_NEWTON_SCHULZ_INL_H_
#else
#define TITANS_NEWTON_SCHULZ_INL_H_
#endif

#include <cstddef>
#include <cstring>
#include <utility>

#include "hwy/highway.h"
#include "plugins/kernels/chunk_gates.h"
#include "plugins/kernels/outer-inl.h"
#include "plugins/kernels/product-inl.h"
#include "plugins/kernels/rows-inl.h"
#include "plugins/kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

inline constexpr float kNewtonSchulzA = 3.4445F, kNewtonSchulzB = -4.7750F, kNewtonSchulzC = 2.0315F;
inline constexpr float kNormFloor = 1e-7F;

inline constexpr std::int64_t kStepsAtOnce = 3;

// The matrices by which steps multiply Y. They are symmetric, `size` x `size`; `used` x `used` is without padding.
class Powers {
 public:
  Powers(const ChunkScratch& scratch, std::size_t size, std::size_t used, std::size_t stride)
      : size_(size),
        used_(used),
        stride_(stride),
        gram_(scratch.square[0]),
        step_(scratch.square[1]),
        all_(scratch.square[2]),
        spare_(scratch.square[3]) {}

  // A = Y^T Y, for Y of `rows` rows.
  void gram(const float* y, std::size_t rows) { multiply_into(gram_, Outer{y, stride_, y, stride_, rows}); }

  // Multiplies another step into all(), and advances A to the next step unless this is the last.
  void step(bool first, bool last) {
    const Floats d;
    const Vector b = hn::Set(d, kNewtonSchulzB), c = hn::Set(d, kNewtonSchulzC);
    multiply_symmetric(product(gram_, gram_), size_,
                       [&](Vector sum, std::size_t row, std::size_t column, std::size_t) HWY_ATTR {
                         const std::size_t at = row * stride_ + column;
                         hn::StoreU(hn::MulAdd(c, sum, hn::Mul(b, hn::LoadU(d, gram_ + at))), d, step_ + at);
                       });
    for (std::size_t i = 0; i < used_; ++i) step_[i * stride_ + i] += kNewtonSchulzA;
    mirror(step_, stride_, size_);
    if (!last) {
      multiply_into(spare_, product(gram_, step_));
      multiply_into(gram_, product(spare_, step_));
    }
    if (first) {
      std::swap(all_, step_);
    } else {
      multiply_into(spare_, product(all_, step_));
      std::swap(all_, spare_);
    }
  }

  const float* all() const { return all_; }

 private:
  Outer product(const float* a, const float* b) const { return {a, stride_, b, stride_, used_}; }

  void multiply_into(float* to, const Outer& outer) const {
    multiply_symmetric(outer, size_, [&](Vector sum, std::size_t row, std::size_t column, std::size_t) HWY_ATTR {
      hn::StoreU(sum, Floats(), to + row * stride_ + column);
    });
    mirror(to, stride_, size_);
  }

  std::size_t size_, used_, stride_;
  float *gram_, *step_, *all_, *spare_;
};

// Returns `matrix` after `steps` steps, in scratch. `matrix` is in x out without gaps; `norm` is its Frobenius norm.
inline Rows orthogonalise(const float* matrix, std::size_t in, std::size_t out, float norm, std::int64_t steps,
                          const ChunkScratch& scratch) {
  static_assert(kTileRowBlock % kTileRows == 0 && kTileRowBlock % kSymmetricBlock == 0);
  const bool upright = in >= out;
  const std::size_t large = upright ? in : out, small = upright ? out : in;
  const std::size_t rows = whole_tiles(large), columns = whole_tiles(small), stride = padded(small);
  float *y = scratch.iterate[0], *next = scratch.iterate[1];
  // Like PyTorch's clamp, this keeps a NaN.
  const float by = 1.0F / (norm < kNormFloor ? kNormFloor : norm);
  if (upright) {
    for (std::size_t i = 0; i < large; ++i) scale_row(matrix + i * small, by, small, y + i * stride);
  } else {
    transpose(matrix, large, small, large, y, stride);
    for (std::size_t i = 0; i < large; ++i) scale_row(y + i * stride, by, small, y + i * stride);
  }
  for (std::size_t i = 0; i < rows; ++i) {
    const std::size_t begin = i < large ? small : 0;
    std::memset(y + i * stride + begin, 0, (columns - begin) * sizeof(float));
  }
  for (std::int64_t remaining = steps; remaining > 0;) {
    // Splits four steps into two and two rather than three and one.
    const std::int64_t group = remaining == 4 ? 2 : HWY_MIN(remaining, kStepsAtOnce);
    Powers powers{scratch, columns, small, stride};
    powers.gram(y, large);
    for (std::int64_t step = 0; step < group; ++step) powers.step(step == 0, step + 1 == group);
    const Product products[] = {{y, stride, powers.all(), stride, small}};
    multiply<Part::kAll>(products, rows, columns, 0,
                         [&](Vector sum, std::size_t row, std::size_t column, std::size_t)
                             HWY_ATTR { hn::StoreU(sum, Floats(), next + row * stride + column); });
    std::swap(y, next);
    remaining -= group;
  }
  if (upright) return {y, stride};
  transpose(y, stride, large, small, next, padded(large));
  return {next, padded(large)};
}

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
