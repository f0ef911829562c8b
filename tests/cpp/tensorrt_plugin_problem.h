// A stream of tokens for the operator, and the expected results in float64. They follow the equations of
// docs/operator.md one token at a time and share no code with a kernel except the packed row's layout.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "plugins/kernels/neural_memory.h"
#include "tensorrt_plugin_floats.h"

namespace titans::plugin_host {

struct Problem {
  static constexpr std::int64_t kWidth = 6, kHidden = 10, kChunk = 4;

  explicit Problem(std::int64_t streams_ = 2, std::int64_t heads_ = 3, std::int64_t tokens_ = 21)
      : streams(streams_), heads(heads_), tokens(tokens_) {
    attributes.mode = "update";
    attributes.schedule = "any";
    attributes.activation = "silu";
    attributes.widths = {kWidth, kHidden, kWidth};
    attributes.chunk_size = kChunk;
    kernels::configure(attributes, configuration);
    const auto draw = [&](std::vector<float>& values, std::int64_t count, float scale, bool gate) {
      std::normal_distribution<float> normal(0.0F, scale);
      for (std::int64_t i = 0; i < count; ++i) {
        const float value = normal(random);
        values.push_back(gate ? std::min(std::abs(value), 1.0F) : value);
      }
    };
    const std::int64_t rows = streams * heads * tokens;
    for (auto* values : {&q, &k, &v}) draw(*values, rows * kWidth, 1.0F, false);
    draw(step_size, rows, 0.05F, true);
    draw(momentum, rows, 0.5F, true);
    draw(forget_gate, rows, 0.1F, true);
    draw(weights, streams * heads * 2 * kWidth * kHidden, 0.3F, false);
    for (std::int64_t b = 0; b < streams; ++b) learn.push_back(b % 2 == 0);
  }

  // Rounds q, k and v to a narrower type.
  void round(kernels::DType type) {
    for (auto* values : {&q, &k, &v}) {
      for (float& value : *values) value = widen(type, narrow(type, value));
    }
  }

  // The pool of fresh memories.
  std::vector<float> state() const {
    const kernels::RowLayout layout(configuration);
    std::vector<float> pool(static_cast<std::size_t>(streams * heads * layout.size), 0.0F);
    for (std::int64_t head = 0; head < streams * heads; ++head) {
      float* row = pool.data() + head * layout.size;
      const float* from = weights.data() + head * 2 * kWidth * kHidden;
      std::copy(from, from + kWidth * kHidden, row + layout.w[0]);
      std::copy(from + kWidth * kHidden, from + 2 * kWidth * kHidden, row + layout.w[1]);
      row[layout.m] = row[layout.beta] = 1.0F;
    }
    return pool;
  }

  // y of all tokens: (streams, heads, tokens, width).
  std::vector<double> expected() const {
    std::vector<double> y(q.size());
    for (std::int64_t b = 0; b < streams; ++b) {
      for (std::int64_t h = 0; h < heads; ++h) run_head(b * heads + h, learn[static_cast<std::size_t>(b)], y.data());
    }
    return y;
  }

  std::int64_t streams, heads, tokens;
  kernels::Attributes attributes;
  kernels::Configuration configuration;
  std::vector<float> q, k, v, step_size, momentum, forget_gate, weights;
  std::vector<std::uint8_t> learn;  // per stream
  std::mt19937 random{11};

 private:
  using Matrix = std::vector<double>;  // row-major

  static Matrix times(const double* x, const Matrix& w, std::int64_t columns) {
    Matrix out(static_cast<std::size_t>(columns), 0.0);
    for (std::size_t i = 0; i < w.size(); ++i) {
      out[i % static_cast<std::size_t>(columns)] += x[i / static_cast<std::size_t>(columns)] * w[i];
    }
    return out;
  }

  static double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

  void run_head(std::int64_t head, bool learns, double* y) const {
    const float* from = weights.data() + head * 2 * kWidth * kHidden;
    Matrix w1(from, from + kWidth * kHidden), w2(from + kWidth * kHidden, from + 2 * kWidth * kHidden);
    Matrix s1(w1.size(), 0.0), s2(w2.size(), 0.0), start1 = w1, start2 = w2;
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t row = head * tokens + t;
      const auto vector = [&](const std::vector<float>& values) {
        return Matrix(values.begin() + row * kWidth, values.begin() + (row + 1) * kWidth);
      };
      const auto at = static_cast<std::size_t>(row);
      if (learns) {
        const Matrix key = vector(k), value = vector(v), before = times(key.data(), start1, kHidden);
        Matrix hidden = before;
        for (double& x : hidden) x *= sigmoid(x);
        Matrix error = times(hidden.data(), start2, kWidth);
        for (std::size_t i = 0; i < error.size(); ++i) error[i] = 2.0 * (error[i] - value[i]);
        const double theta = step_size[at], eta = momentum[at], keep = 1.0 - forget_gate[at];
        const auto update = [&](Matrix& w, Matrix& s, std::size_t i, double gradient) {
          s[i] = eta * s[i] - theta * gradient;
          w[i] = keep * w[i] + s[i];
        };
        for (std::size_t j = 0; j < hidden.size(); ++j) {
          double back = 0.0;
          for (std::size_t o = 0; o < error.size(); ++o) back += error[o] * start2[j * error.size() + o];
          const double gate = sigmoid(before[j]);
          back *= gate * (1.0 + before[j] * (1.0 - gate));
          for (std::size_t i = 0; i < key.size(); ++i) update(w1, s1, i * hidden.size() + j, key[i] * back);
          for (std::size_t o = 0; o < error.size(); ++o) update(w2, s2, j * error.size() + o, hidden[j] * error[o]);
        }
      }
      Matrix hidden = times(vector(q).data(), w1, kHidden);
      for (double& x : hidden) x *= sigmoid(x);
      const Matrix out = times(hidden.data(), w2, kWidth);
      std::copy(out.begin(), out.end(), y + row * kWidth);
      if ((t + 1) % kChunk == 0) {
        start1 = w1;
        start2 = w2;
      }
    }
  }
};

}  // namespace titans::plugin_host
