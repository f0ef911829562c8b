// Row operations of a memory's network: activations, LayerNorm, residual and the loss's gradient. Compiled once per
// instruction set.

#if defined(TITANS_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TITANS_ROWS_INL_H_
#undef TITANS_ROWS_INL_H_
#else
#define TITANS_ROWS_INL_H_
#endif

#include <cmath>
#include <cstddef>

#include "hwy/highway.h"
#include "plugins/kernels/memory_common.h"
#include "plugins/kernels/product-inl.h"
#include "plugins/kernels/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

inline constexpr float kLayerNormEpsilon = 1e-5F;

// A matrix with a stride, such as the open chunk's layer_input: contiguous in a packed row, padded in scratch.
struct Rows {
  float* data = nullptr;
  std::size_t stride = 0;
  float* operator[](std::size_t row) const { return data + row * stride; }
};

// Computes the memory's output M(x) from the network's output f(x): LayerNorm and residual.
struct OutputNorm {
  bool layer_norm, residual;
  const float* scale;  // of the LayerNorm
  std::size_t width;
  float* scratch;  // one row
};

// LayerNorm's mean and reciprocal standard deviation of a row.
struct Moments {
  float mean, reciprocal;
};

HWY_INLINE Moments moments(const float* z, std::size_t width) {
  const auto size = static_cast<float>(width);
  const float mean = sum_vectors(width, [&](std::size_t i, std::size_t n) HWY_ATTR { return load(z + i, n); }) / size;
  const Vector means = hn::Set(Floats(), mean);
  const float squares = sum_vectors(width, [&](std::size_t i, std::size_t n) HWY_ATTR {
    // Lanes beyond the row must be zero; otherwise each would add mean^2.
    const Vector centred = hn::IfThenElseZero(hn::FirstN(Floats(), n), hn::Sub(load(z + i, n), means));
    return hn::Mul(centred, centred);
  });
  return {mean, 1.0F / std::sqrt(squares / size + kLayerNormEpsilon)};
}

// y = M(x) from f(x), with norm and residual.
HWY_INLINE void finish_row(const OutputNorm& output, const float* f, const float* x, float* y) {
  const Moments norm = output.layer_norm ? moments(f, output.width) : Moments{0.0F, 1.0F};
  each_vector(output.width, [&](std::size_t i, std::size_t n) HWY_ATTR {
    Vector out = load(f + i, n);
    if (output.layer_norm) {
      out = hn::Mul(hn::Sub(out, hn::Set(Floats(), norm.mean)), hn::Set(Floats(), norm.reciprocal));
      out = hn::Mul(out, load(output.scale + i, n));
    }
    if (output.residual) out = hn::Add(out, load(x + i, n));
    store(out, y + i, n);
  });
}

// Replaces z = f(k) by the gradient of weight || M(k) - v ||^2 at f's output. Adds the gradient of the LayerNorm's
// scale to `at_scale` if that is not null. Returns || M(k) - v ||^2.
HWY_INLINE float error_row(const OutputNorm& output, float* z, const float* k, const float* v, float weight = 1.0F,
                           float* at_scale = nullptr) {
  const Floats d;
  const Moments norm = output.layer_norm ? moments(z, output.width) : Moments{0.0F, 1.0F};
  const Vector mean = hn::Set(d, norm.mean), reciprocal = hn::Set(d, norm.reciprocal), weights = hn::Set(d, weight);
  Vector loss = hn::Zero(d), sum = hn::Zero(d), sum_unit = hn::Zero(d);
  each_vector(output.width, [&](std::size_t i, std::size_t n) HWY_ATTR {
    Vector m = load(z + i, n), unit = hn::Zero(d), scale = hn::Set(d, 1.0F);
    if (output.layer_norm) {
      unit = hn::IfThenElseZero(hn::FirstN(d, n), hn::Mul(hn::Sub(m, mean), reciprocal));
      scale = load(output.scale + i, n);
      m = hn::Mul(unit, scale);
    }
    if (output.residual) m = hn::Add(m, load(k + i, n));
    const Vector error = hn::Sub(m, load(v + i, n));
    loss = hn::MulAdd(error, error, loss);
    const Vector at_m = hn::Mul(weights, hn::Add(error, error));
    const Vector gradient = hn::Mul(at_m, scale);
    if (output.layer_norm) {
      sum = hn::Add(sum, gradient);
      sum_unit = hn::MulAdd(gradient, unit, sum_unit);
      if (at_scale != nullptr) store(hn::MulAdd(at_m, unit, load(at_scale + i, n)), at_scale + i, n);
      // Until the second pass, z holds the normalized row and scratch the gradient.
      store(unit, z + i, n);
      store(gradient, output.scratch + i, n);
    } else {
      store(gradient, z + i, n);
    }
  });
  if (output.layer_norm) {
    const auto size = static_cast<float>(output.width);
    const Vector mean_gradient = hn::Set(d, hn::ReduceSum(d, sum) / size);
    const Vector mean_unit = hn::Set(d, hn::ReduceSum(d, sum_unit) / size);
    each_vector(output.width, [&](std::size_t i, std::size_t n) HWY_ATTR {
      const Vector centred = hn::Sub(load(output.scratch + i, n), mean_gradient);
      store(hn::Mul(reciprocal, hn::NegMulAdd(load(z + i, n), mean_unit, centred)), z + i, n);
    });
  }
  return hn::ReduceSum(d, loss);
}

inline void activate_row(Activation activation, const float* z, std::size_t size, float* value, float* derivative) {
  each_vector(size, [&](std::size_t i, std::size_t n) HWY_ATTR {
    const Vector zs = load(z + i, n);
    const Activated act =
        activation == Activation::kSilu ? activate<Activation::kSilu>(zs) : activate<Activation::kGelu>(zs);
    store(act.value, value + i, n);
    if (derivative != nullptr) store(act.derivative, derivative + i, n);
  });
}

// ---- matmuls with an epilogue ----

template <int kProducts>
HWY_INLINE void plain(const Product (&products)[kProducts], std::size_t rows, std::size_t columns, const Rows& to) {
  multiply<Part::kAll>(products, rows, columns, 0,
                       [&](Vector sum, std::size_t row, std::size_t column, std::size_t n)
                           HWY_ATTR { store(sum, to[row] + column, n); });
}

template <Activation kActivation, int kProducts, class Use>
HWY_INLINE void activated_by(const Product (&products)[kProducts], std::size_t rows, std::size_t columns,
                             const Use& use) {
  multiply<Part::kAll>(products, rows, columns, 0,
                       [&](Vector sum, std::size_t row, std::size_t column, std::size_t n)
                           HWY_ATTR { use(activate<kActivation>(sum), row, column, n); });
}

template <int kProducts, class Use>
HWY_INLINE void activated(Activation activation, const Product (&products)[kProducts], std::size_t rows,
                          std::size_t columns, const Use& use) {
  if (activation == Activation::kSilu) {
    activated_by<Activation::kSilu>(products, rows, columns, use);
  } else {
    activated_by<Activation::kGelu>(products, rows, columns, use);
  }
}

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
