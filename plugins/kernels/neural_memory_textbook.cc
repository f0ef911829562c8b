#include "plugins/kernels/neural_memory_textbook.h"

#include <algorithm>
#include <cmath>

#include "plugins/kernels/cpu_head_kernel.h"
#include "plugins/kernels/token_gates.h"

namespace titans::kernels {
namespace {

using Vector = std::vector<float>;
using Matrices = std::vector<Vector>;  // per layer, row-major, in x out

// phi(z) and phi'(z). silu(z) = z sigmoid(z); gelu(z) = z Phi(z), with the normal distribution's Phi.
struct Activated {
  float value, derivative;
};
Activated activate(Activation activation, float z) {
  if (activation == Activation::kSilu) {
    const float sigmoid = 1.0F / (1.0F + std::exp(-z));
    return {z * sigmoid, sigmoid * (1.0F + z * (1.0F - sigmoid))};
  }
  const float below = 0.5F * std::erfc(-z / std::sqrt(2.0F));
  return {z * below, below + z * std::exp(-0.5F * z * z) / std::sqrt(2.0F * 3.14159265F)};
}

// One head of one stream. The row's W and S are W_0 and S_0, the values at the chunk's start, until the next chunk
// update.
class TextbookHead {
 public:
  TextbookHead(const TokenPlan& plan, const Head& head) : c_(plan.configuration), layout_(plan.layout), head_(head) {}

  void run() {
    const bool update = c_.mode == Mode::kUpdate;
    for (std::int64_t t = 0; t < head_.tokens; ++t) {
      const Matrices w_t = update ? step(t) : combine(1.0F, 0.0F, nullptr);
      const Pass pass = forward(w_t, head_.q + t * c_.widths[0]);
      std::copy(pass.y.begin(), pass.y.end(), head_.y + t * c_.widths[0]);
      if (update && (head_.fill + t + 1) % c_.chunk_size == 0) update_chunk(w_t);
    }
    if (update) stats_.write(head_.stats);
  }

 private:
  float* field(std::int64_t offset) const { return head_.row + offset; }
  float* w(std::size_t i) const { return field(layout_.w[i]); }
  float* s(std::size_t i) const { return field(layout_.s[i]); }
  std::size_t layers() const { return static_cast<std::size_t>(c_.depth); }

  // M_W(x) = LayerNorm(f(x)) scale + x, for f(x) = phi(... phi(x W0) ...) Wn. LayerNorm and "+ x" are optional.
  struct Pass {
    Matrices inputs, slopes;  // per layer: its input, and phi' at its output
    Vector unit, y;           // f(x), after LayerNorm's (f - mean) / deviation; M_W(x)
    float reciprocal = 1.0F;  // 1 / deviation
  };
  Pass forward(const Matrices& weights, const float* x) const {
    Pass pass;
    pass.unit.assign(x, x + c_.widths[0]);
    for (std::size_t i = 0; i < layers(); ++i) {
      pass.inputs.push_back(pass.unit);
      Vector z(static_cast<std::size_t>(c_.widths[i + 1]), 0.0F);
      for (std::size_t at = 0; at < weights[i].size(); ++at)
        z[at % z.size()] += pass.unit[at / z.size()] * weights[i][at];
      pass.slopes.emplace_back(z.size(), 1.0F);
      for (std::size_t j = 0; j < z.size() && i + 1 < layers(); ++j) {
        const Activated one = activate(c_.activation, z[j]);
        z[j] = one.value;
        pass.slopes[i][j] = one.derivative;
      }
      pass.unit = z;
    }
    if (c_.layer_norm) {
      const auto size = static_cast<float>(pass.unit.size());
      float mean = 0.0F, variance = 0.0F;
      for (const float z : pass.unit) mean += z / size;
      for (const float z : pass.unit) variance += (z - mean) * (z - mean) / size;
      pass.reciprocal = 1.0F / std::sqrt(variance + 1e-5F);
      for (float& z : pass.unit) z = (z - mean) * pass.reciprocal;
    }
    for (std::size_t j = 0; j < pass.unit.size(); ++j) {
      pass.y.push_back(pass.unit[j] * scale(j) + (c_.residual ? x[j] : 0.0F));
    }
    return pass;
  }
  float scale(std::size_t j) const { return c_.layer_norm ? head_.norm_scale[j] : 1.0F; }

  // The surprise is the gradient of l = || M_(W_0)(k) - v ||^2. In layer i it is layer_input_i^T output_grad_i. Both
  // factors become row `at` of the open chunk. Returns l.
  float surprise(std::int64_t t, std::int64_t at) const {
    const float *k = head_.k + t * c_.widths[0], *v = head_.v + t * c_.widths[0];
    const Matrices weights = combine(1.0F, 0.0F, nullptr);
    const Pass pass = forward(weights, k);
    const auto size = static_cast<float>(pass.y.size());
    float loss = 0.0F, mean = 0.0F, along = 0.0F;
    Vector gradient;
    for (std::size_t j = 0; j < pass.y.size(); ++j) {
      const float error = pass.y[j] - v[j];
      loss += error * error;
      gradient.push_back(2.0F * error * scale(j));
      mean += gradient[j] / size;
      along += gradient[j] * pass.unit[j] / size;
    }
    for (std::size_t j = 0; j < pass.y.size() && c_.layer_norm; ++j) {
      gradient[j] = pass.reciprocal * (gradient[j] - mean - pass.unit[j] * along);
    }
    for (std::size_t i = layers(); i-- > 0;) {
      const std::size_t columns = gradient.size();
      for (std::size_t j = 0; j < columns; ++j) gradient[j] *= pass.slopes[i][j];
      std::copy(pass.inputs[i].begin(), pass.inputs[i].end(), field(layout_.layer_input[i]) + at * c_.widths[i]);
      std::copy(gradient.begin(), gradient.end(), field(layout_.output_grad[i]) + at * c_.widths[i + 1]);
      Vector below(pass.inputs[i].size(), 0.0F);
      for (std::size_t m = 0; m < weights[i].size(); ++m) below[m / columns] += weights[i][m] * gradient[m % columns];
      gradient = below;
    }
    return loss;
  }

  // by_w W_0 + by_s S_0 - sum_r by_row[r] surprise_r over the open chunk, per layer. Rows with factor 0 may hold
  // anything.
  Matrices combine(float by_w, float by_s, const float* by_row) const {
    Matrices all;
    for (std::size_t i = 0; i < layers(); ++i) {
      const std::int64_t in = c_.widths[i], out = c_.widths[i + 1];
      all.emplace_back(w(i), w(i) + in * out);
      for (float& x : all[i]) x *= by_w;
      for (std::int64_t m = 0; m < in * out && by_s != 0.0F; ++m) all[i][static_cast<std::size_t>(m)] += by_s * s(i)[m];
      for (std::int64_t r = 0; by_row != nullptr && r < c_.chunk_size; ++r) {
        const float *input = field(layout_.layer_input[i]) + r * in,
                    *gradient = field(layout_.output_grad[i]) + r * out;
        for (std::int64_t m = 0; m < in * out && by_row[r] != 0.0F; ++m) {
          all[i][static_cast<std::size_t>(m)] -= by_row[r] * input[m / out] * gradient[m % out];
        }
      }
    }
    return all;
  }

  // Processes token t of the call, with gates theta (step_size), eta (momentum) and alpha (forget_gate). Returns W_t.
  //   S_t = eta S_(t-1) - theta surprise_t             W_t = (1 - alpha) W_(t-1) + S_t
  // Both are linear in W_0, S_0 and the chunk's surprises, so it is enough to keep their coefficients:
  //   S_t = m S_0 - sum_r e_r surprise_r               W_t = beta W_0 + f S_0 - sum_r a_r surprise_r
  Matrices step(std::int64_t t) {
    float *e = field(layout_.e), *a = field(layout_.a);
    float &m = *field(layout_.m), &f = *field(layout_.f), &beta = *field(layout_.beta);
    const std::int64_t at = (head_.fill + t) % c_.chunk_size;
    if (at == 0) start_chunk();
    if (head_.learn) {
      const float theta = head_.step_size[t], eta = head_.momentum[t], keep = 1.0F - head_.forget_gate[t];
      stats_.loss += surprise(t, at);
      for (std::int64_t r = 0; r < at; ++r) e[r] *= eta;
      e[at] = theta;
      for (std::int64_t r = 0; r <= at; ++r) a[r] = keep * a[r] + e[r];
      m *= eta;
      f = keep * f + m;
      beta *= keep;
    }
    return combine(beta, f, a);
  }

  void start_chunk() const {
    for (const std::int64_t rows : {layout_.e, layout_.a}) std::fill(field(rows), field(rows) + c_.chunk_size, 0.0F);
    *field(layout_.m) = *field(layout_.beta) = 1.0F;
    *field(layout_.f) = 0.0F;
  }

  // W and S of the chunk's last token become W_0 and S_0 of the next chunk, unless the guard's limit is exceeded.
  void update_chunk(const Matrices& w_c) {
    const Matrices s_c = combine(0.0F, *field(layout_.m), field(layout_.e));
    float squares = 0.0F;
    for (std::size_t i = 0; i < layers(); ++i) {
      for (std::size_t m = 0; m < w_c[i].size(); ++m) squares += (w_c[i][m] - w(i)[m]) * (w_c[i][m] - w(i)[m]);
    }
    const float norm = std::sqrt(squares);
    const bool commit = head_.update_limit == nullptr || norm <= *head_.update_limit;  // false for NaN
    stats_.close_chunk(norm, commit);
    for (std::size_t i = 0; i < layers() && commit; ++i) {
      std::copy(w_c[i].begin(), w_c[i].end(), w(i));
      std::copy(s_c[i].begin(), s_c[i].end(), s(i));
    }
    start_chunk();
  }

  const Configuration& c_;
  const RowLayout& layout_;
  const Head& head_;
  HeadStats stats_;
};

struct TextbookRegime {
  using Configuration = kernels::Configuration;
  using Plan = TokenPlan;
  using Head = kernels::Head;
  struct Scratch {
    explicit Scratch(const Configuration& /*configuration*/) {}
  };

  static void fill(Head& head, const Plan& plan, const HeadOperands& part, const Operands& /*operands*/) {
    part.fill(head, plan.layout.size, 1, plan.configuration.mode == Mode::kUpdate);
  }
  static void run(const Plan& plan, const Head& head, Scratch& /*scratch*/) { TextbookHead(plan, head).run(); }
};

}  // namespace

std::unique_ptr<CpuKernel> make_textbook_kernel(const Configuration& configuration, std::string& error) {
  if (configuration.memory_dtype == MemoryDtype::kFloat32) {
    return std::make_unique<HeadKernel<TextbookRegime>>(configuration, kTextbookTarget, &TextbookRegime::run);
  }
  error = failure(Configuration::kOperator, "E0712",
                  "not supported by the textbook kernel: expected memory_dtype \"float32\", got another",
                  "use an instruction set's kernel");
  return nullptr;
}

}  // namespace titans::kernels
