#include "plugins/kernels/cpu_head.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace titans::kernels {
namespace {

constexpr std::size_t kLeastRows = 16;  // of a block in mode "read"

}  // namespace

void Scratch::want_token(const Configuration& c, Wanted& wanted) {
  const auto rows = static_cast<std::size_t>(c.chunk_size);
  const std::size_t line = padded(rows);
  std::size_t widest = 0, transpose = 0;
  for (int i = 0; i < c.depth; ++i) {
    const auto layer = static_cast<std::size_t>(i);
    const auto in = static_cast<std::size_t>(c.in(i)), out = static_cast<std::size_t>(c.out(i));
    widest = std::max({widest, padded(in), padded(out)});
    transpose = std::max({transpose, in * line, out * padded(in), padded(out)});
    if (c.memory_dtype != MemoryDtype::kFloat32) wanted.emplace_back(&w[layer], in * out);
    if (c.mode == Mode::kRead) continue;
    if (c.memory_dtype != MemoryDtype::kFloat32) wanted.emplace_back(&s[layer], in * out);
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
}

void Scratch::want_chunk(const Configuration& c, Wanted& wanted) {
  const auto keys = static_cast<std::size_t>(c.keys()), all = static_cast<std::size_t>(c.all_elements());
  rows = std::max(static_cast<std::size_t>(c.chunk_size), kLeastRows);
  std::size_t widest = 0, transpose = 0, largest = 0, iterates = 0, squares = 0;
  for (int i = 0; i < c.depth; ++i) {
    const auto layer = static_cast<std::size_t>(i);
    const auto in = static_cast<std::size_t>(c.in(i)), out = static_cast<std::size_t>(c.out(i));
    const std::size_t large = std::max(in, out), small = std::min(in, out);
    widest = std::max({widest, padded(in), padded(out)});
    transpose = std::max(transpose, out * padded(in));
    largest = std::max(largest, in * out);
    iterates = std::max({iterates, whole_tiles(large) * padded(small), small * padded(large)});
    squares = std::max(squares, whole_tiles(small) * padded(small));
    if (c.mode == Mode::kRead) continue;
    wanted.emplace_back(&left[layer], keys * padded(in));
    wanted.emplace_back(&right[layer], keys * padded(out));
    wanted.emplace_back(&derivative[layer], keys * padded(out));
  }
  for (float** row : {&scores, &scale, &gamma_gradient}) wanted.emplace_back(row, widest);
  for (float*& side : x) wanted.emplace_back(&side, rows * widest);
  if (c.memory_dtype != MemoryDtype::kFloat32) {
    for (float** copy : {&weights, &surprise}) wanted.emplace_back(copy, all);
  }
  if (c.mode == Mode::kRead) return;
  wanted.emplace_back(&transposed, transpose);
  for (float** weights : {&point, &weights_next, &surprise_next}) wanted.emplace_back(weights, all);
  if (c.orthogonalise == 0) return;
  wanted.emplace_back(&update, largest);
  for (float*& one : iterate) wanted.emplace_back(&one, iterates);
  for (float*& one : square) wanted.emplace_back(&one, squares);
}

Scratch::Scratch(const Configuration& c) {
  Wanted wanted;
  c.gates == Gates::kChunk ? want_chunk(c, wanted) : want_token(c, wanted);
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
