// The network M_W of a memory in plain C++, for the textbook kernel: its answer, and the gradient of its loss.
//   M_W(x) = LayerNorm(f(x)) scale + x,  f(x) = phi(... phi(x W0) ...) Wn.  LayerNorm and "+ x" are optional.
#pragma once

#include <cmath>
#include <cstddef>
#include <tuple>
#include <utility>
#include <vector>

#include "plugins/kernels/neural_memory.h"

namespace titans::kernels::textbook {

using Vector = std::vector<float>;
// Per layer (in x out), row-major: element `at` is in row at / out and column at % out.
using Weights = std::vector<Vector>;

// phi(z) and phi'(z): z sigmoid(z) for silu, z Phi(z) for gelu, with the normal distribution's Phi.
inline std::pair<float, float> activate(Activation activation, float z) {
  if (activation == Activation::kSilu) {
    const float sigmoid = 1.0F / (1.0F + std::exp(-z));
    return {z * sigmoid, sigmoid * (1.0F + z * (1.0F - sigmoid))};
  }
  const float below = 0.5F * std::erfc(-z / std::sqrt(2.0F));
  return {z * below, below + z * std::exp(-0.5F * z * z) / std::sqrt(2.0F * 3.14159265F)};
}

struct Pass {
  Weights input, slope;     // per layer: its input, and phi' at its output
  Vector unit, y;           // (f - mean) / deviation, or f without LayerNorm; M_W(x)
  float reciprocal = 1.0F;  // 1 / deviation
};

// l = || M_W(k) - v ||^2. Its gradient in layer i is layer_input[i]^T output_grad[i].
struct Surprise {
  float loss = 0.0F;
  Weights layer_input, output_grad;
};

struct Network {
  const Configuration& c;
  const float* norm_scale;

  std::size_t width(std::size_t i) const { return static_cast<std::size_t>(c.widths[i]); }
  float scale(std::size_t j) const { return c.layer_norm ? norm_scale[j] : 1.0F; }

  Pass forward(const Weights& w, const float* x) const {
    Pass pass;
    Vector& h = pass.unit;
    h.assign(x, x + width(0));
    for (std::size_t i = 0; i < w.size(); ++i) {
      pass.input.push_back(h);
      pass.slope.emplace_back(width(i + 1), 1.0F);
      h.assign(width(i + 1), 0.0F);
      for (std::size_t at = 0; at < w[i].size(); ++at) h[at % h.size()] += pass.input[i][at / h.size()] * w[i][at];
      for (std::size_t j = 0; j < h.size() && i + 1 < w.size(); ++j) {
        std::tie(h[j], pass.slope[i][j]) = activate(c.activation, h[j]);
      }
    }
    if (c.layer_norm) {
      const auto size = static_cast<float>(h.size());
      float mean = 0.0F, variance = 0.0F;
      for (const float z : h) mean += z / size;
      for (const float z : h) variance += (z - mean) * (z - mean) / size;
      pass.reciprocal = 1.0F / std::sqrt(variance + 1e-5F);
      for (float& z : h) z = (z - mean) * pass.reciprocal;
    }
    for (std::size_t j = 0; j < h.size(); ++j) pass.y.push_back(h[j] * scale(j) + (c.residual ? x[j] : 0.0F));
    return pass;
  }

  Surprise surprise(const Weights& w, const float* k, const float* v) const {
    const Pass pass = forward(w, k);
    const auto size = static_cast<float>(pass.y.size());
    Surprise result{0.0F, pass.input, Weights(w.size())};
    float mean = 0.0F, along = 0.0F;
    Vector grad;
    for (std::size_t j = 0; j < pass.y.size(); ++j) {
      const float error = pass.y[j] - v[j];
      result.loss += error * error;
      grad.push_back(2.0F * error * scale(j));
      mean += grad[j] / size;
      along += grad[j] * pass.unit[j] / size;
    }
    for (std::size_t j = 0; j < grad.size() && c.layer_norm; ++j) {
      grad[j] = pass.reciprocal * (grad[j] - mean - pass.unit[j] * along);
    }
    for (std::size_t i = w.size(); i-- > 0;) {
      for (std::size_t j = 0; j < grad.size(); ++j) grad[j] *= pass.slope[i][j];
      result.output_grad[i] = grad;
      Vector below(width(i), 0.0F);
      for (std::size_t at = 0; at < w[i].size(); ++at) below[at / grad.size()] += w[i][at] * grad[at % grad.size()];
      grad = below;
    }
    return result;
  }
};

}  // namespace titans::kernels::textbook
