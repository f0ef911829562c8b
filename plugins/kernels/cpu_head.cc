#include "plugins/kernels/cpu_head.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace titans::kernels {

Scratch::Scratch(const Configuration& c) {
  const auto rows = static_cast<std::size_t>(c.chunk_size);
  const std::size_t line = padded(rows);
  std::size_t widest = 0, transpose = 0;
  std::vector<std::pair<float**, std::size_t>> wanted;
  for (int i = 0; i < c.depth; ++i) {
    const auto layer = static_cast<std::size_t>(i);
    const auto in = static_cast<std::size_t>(c.in(i)), out = static_cast<std::size_t>(c.out(i));
    widest = std::max({widest, padded(in), padded(out)});
    transpose = std::max({transpose, in * line, out * padded(in), padded(out)});
    if (c.storage != Storage::kFloat32) wanted.emplace_back(&w[layer], in * out);
    if (c.mode == Mode::kRead) continue;
    if (c.storage != Storage::kFloat32) wanted.emplace_back(&s[layer], in * out);
    wanted.emplace_back(&left[layer], rows * padded(in));
    wanted.emplace_back(&right[layer], rows * padded(out));
    wanted.emplace_back(&derivative[layer], rows * padded(out));
    for (float** copy : {&w_next[layer], &s_next[layer]}) wanted.emplace_back(copy, in * out);
  }
  for (float** vector : {&e, &a, &rows_f, &rows_beta}) wanted.emplace_back(vector, line);
  wanted.emplace_back(&rows_a, rows * line);
  wanted.emplace_back(&scores, std::max(rows * line, widest));
  wanted.emplace_back(&transposed, transpose);
  for (float** scaled : {&right_a, &right_e}) wanted.emplace_back(scaled, rows * widest);
  for (std::size_t side = 0; side < 2; ++side) {
    for (float** x_of : {&x[side], &x_beta[side], &x_f[side]}) wanted.emplace_back(x_of, rows * widest);
  }

  constexpr std::size_t kLine = kCacheLine / sizeof(float);
  std::size_t used = 0;
  for (const auto& [field, floats] : wanted) used += (floats + kLine - 1) / kLine * kLine;
  memory_.reset(static_cast<float*>(::operator new(used * sizeof(float), std::align_val_t{kCacheLine})));
  float* next = memory_.get();
  for (const auto& [field, floats] : wanted) {
    *field = next;
    next += (floats + kLine - 1) / kLine * kLine;
  }
}

}  // namespace titans::kernels
