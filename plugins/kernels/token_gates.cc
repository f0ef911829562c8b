#include "plugins/kernels/token_gates.h"

#include <algorithm>

namespace titans::kernels {

TokenScratch::TokenScratch(const Configuration& c) {
  Wanted wanted;
  const auto rows = static_cast<std::size_t>(c.chunk_size);
  const std::size_t line = padded(rows);
  const bool low_precision = c.memory_dtype != MemoryDtype::kFloat32;
  std::size_t widest = 0, transpose = 0;
  for (int i = 0; i < c.depth; ++i) {
    const auto layer = static_cast<std::size_t>(i);
    const auto in = static_cast<std::size_t>(c.in(i)), out = static_cast<std::size_t>(c.out(i));
    widest = std::max({widest, padded(in), padded(out)});
    transpose = std::max({transpose, in * line, out * padded(in), padded(out)});
    if (low_precision) wanted.emplace_back(&w[layer], in * out);
    if (c.mode == Mode::kRead) continue;
    if (low_precision) wanted.emplace_back(&s[layer], in * out);
    wanted.emplace_back(&layer_input[layer], rows * padded(in));
    wanted.emplace_back(&output_grad[layer], rows * padded(out));
    wanted.emplace_back(&derivative[layer], rows * padded(out));
    for (float** copy : {&w_next[layer], &s_next[layer]}) wanted.emplace_back(copy, in * out);
  }
  for (float** vector : {&e, &a, &rows_f, &rows_beta}) wanted.emplace_back(vector, line);
  wanted.emplace_back(&rows_a, rows * line);
  wanted.emplace_back(&scores, std::max(rows * line, widest));
  wanted.emplace_back(&transposed, transpose);
  for (float** scaled : {&grad_a, &grad_e}) wanted.emplace_back(scaled, rows * widest);
  for (std::size_t side = 0; side < 2; ++side) {
    for (float** x_of : {&x[side], &x_beta[side], &x_f[side]}) wanted.emplace_back(x_of, rows * widest);
  }
  allocate(wanted);
}

}  // namespace titans::kernels
