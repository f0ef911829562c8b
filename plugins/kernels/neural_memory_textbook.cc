#include "plugins/kernels/neural_memory_textbook.h"

#include <algorithm>
#include <cmath>

#include "plugins/kernels/cpu_head_kernel.h"
#include "plugins/kernels/textbook_network.h"
#include "plugins/kernels/token_gates.h"

namespace titans::kernels {
namespace {

using textbook::Weights;

// One head of one stream. Its packed row holds W_0 and S_0, the values at the chunk's start, the factors of each
// surprise of the open chunk, and the coefficients of these.
struct TextbookHead {
  const Configuration& c;
  const RowLayout& layout;
  const Head& head;
  HeadStats stats{};
  textbook::Network network{c, head.norm_scale};
  std::size_t depth = static_cast<std::size_t>(c.depth), chunk = static_cast<std::size_t>(c.chunk_size);
  float *e = field(layout.e), *a = field(layout.a);
  float &m = *field(layout.m), &f = *field(layout.f), &beta = *field(layout.beta);

  float* field(std::int64_t offset) const { return head.row + offset; }

  // y_t = M_(W_t)(q_t). In mode "read" the memory does not learn, and W_t is W_0.
  void run() {
    const bool update = c.mode == Mode::kUpdate;
    for (std::int64_t t = 0; t < head.tokens; ++t) {
      const std::size_t r = static_cast<std::size_t>(head.fill + t) % chunk;
      if (update) learn(t, r);
      const Weights w = update ? combine(beta, f, a) : combine(1.0F, 0.0F, nullptr);
      const textbook::Vector y = network.forward(w, head.q + t * c.widths[0]).y;
      std::copy(y.begin(), y.end(), head.y + t * c.widths[0]);
      if (update && r + 1 == chunk) update_chunk(w);
    }
    if (update) stats.write(head.stats);
  }

  // Token t of the call is token r of the chunk. Its surprise is the gradient of || M_(W_0)(k) - v ||^2. With theta
  // (step_size), eta (momentum) and alpha (forget_gate):
  //   S_t = eta S_(t-1) - theta surprise_t             W_t = (1 - alpha) W_(t-1) + S_t
  // Both are linear in W_0, S_0 and the chunk's surprises, so it is enough to keep their coefficients:
  //   S_t = m S_0 - sum_r e_r surprise_r               W_t = beta W_0 + f S_0 - sum_r a_r surprise_r
  void learn(std::int64_t t, std::size_t r) {
    if (r == 0) start_chunk();
    if (!head.learn) return;
    const float theta = head.step_size[t], eta = head.momentum[t], keep = 1.0F - head.forget_gate[t];
    const auto now = network.surprise(combine(1.0F, 0.0F, nullptr), head.k + t * c.widths[0], head.v + t * c.widths[0]);
    stats.loss += now.loss;
    for (std::size_t i = 0; i < depth; ++i) {
      const auto &input = now.layer_input[i], &grad = now.output_grad[i];
      std::copy(input.begin(), input.end(), field(layout.layer_input[i]) + r * input.size());
      std::copy(grad.begin(), grad.end(), field(layout.output_grad[i]) + r * grad.size());
    }
    for (std::size_t i = 0; i < r; ++i) e[i] *= eta;
    e[r] = theta;
    for (std::size_t i = 0; i <= r; ++i) a[i] = keep * a[i] + e[i];
    m *= eta;
    f = keep * f + m;
    beta *= keep;
  }

  // by_w W_0 + by_s S_0 - sum_r by_row[r] surprise_r, per layer. Rows with factor 0 may hold anything.
  Weights combine(float by_w, float by_s, const float* by_row) const {
    Weights all;
    for (std::size_t i = 0; i < depth; ++i) {
      const std::size_t in = network.width(i), out = network.width(i + 1);
      const float *w = field(layout.w[i]), *s = field(layout.s[i]);
      const float *input = field(layout.layer_input[i]), *grad = field(layout.output_grad[i]);
      textbook::Vector& sum = all.emplace_back(w, w + in * out);
      for (std::size_t at = 0; at < sum.size(); ++at) {
        sum[at] *= by_w;
        if (by_s != 0.0F) sum[at] += by_s * s[at];
        for (std::size_t r = 0; r < chunk && by_row != nullptr; ++r) {
          if (by_row[r] != 0.0F) sum[at] -= by_row[r] * input[r * in + at / out] * grad[r * out + at % out];
        }
      }
    }
    return all;
  }

  void start_chunk() const {
    std::fill(e, e + chunk, 0.0F);
    std::fill(a, a + chunk, 0.0F);
    m = beta = 1.0F;
    f = 0.0F;
  }

  // The last token's W and S become W_0 and S_0 of the next chunk, unless the guard's limit is exceeded.
  void update_chunk(const Weights& w_c) {
    const Weights s_c = combine(0.0F, m, e), w_0 = combine(1.0F, 0.0F, nullptr);
    float squares = 0.0F;
    for (std::size_t i = 0; i < depth; ++i) {
      for (std::size_t at = 0; at < w_0[i].size(); ++at)
        squares += (w_c[i][at] - w_0[i][at]) * (w_c[i][at] - w_0[i][at]);
    }
    const float norm = std::sqrt(squares);
    const bool commit = head.update_limit == nullptr || norm <= *head.update_limit;  // false for NaN
    stats.close_chunk(norm, commit);
    for (std::size_t i = 0; i < depth && commit; ++i) {
      std::copy(w_c[i].begin(), w_c[i].end(), field(layout.w[i]));
      std::copy(s_c[i].begin(), s_c[i].end(), field(layout.s[i]));
    }
    start_chunk();
  }
};

// Runs the head in the loop over heads and streams that all CPU kernels share.
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
  static void run(const Plan& plan, const Head& head, Scratch& /*scratch*/) {
    TextbookHead{plan.configuration, plan.layout, head}.run();
  }
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
