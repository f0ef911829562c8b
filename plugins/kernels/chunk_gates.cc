#include "plugins/kernels/chunk_gates.h"

#include <algorithm>

namespace titans::kernels {

ChunkScratch::ChunkScratch(const ChunkConfiguration& c) {
  Wanted wanted;
  const auto keys = static_cast<std::size_t>(c.keys()), all = static_cast<std::size_t>(c.all_elements());
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
    wanted.emplace_back(&layer_input[layer], keys * padded(in));
    wanted.emplace_back(&output_grad[layer], keys * padded(out));
    wanted.emplace_back(&derivative[layer], keys * padded(out));
  }
  for (float** one : {&row, &scale, &gamma_gradient}) wanted.emplace_back(one, widest);
  for (float*& side : x) wanted.emplace_back(&side, static_cast<std::size_t>(c.chunk_size) * widest);
  if (c.memory_dtype != MemoryDtype::kFloat32) {
    for (float** copy : {&weights, &surprise}) wanted.emplace_back(copy, all);
  }
  wanted.emplace_back(&transposed, transpose);
  for (float** copy : {&point, &weights_next, &surprise_next}) wanted.emplace_back(copy, all);
  if (c.orthogonalise != 0) {
    wanted.emplace_back(&update, largest);
    for (float*& one : iterate) wanted.emplace_back(&one, iterates);
    for (float*& one : square) wanted.emplace_back(&one, squares);
  }
  allocate(wanted);
}

}  // namespace titans::kernels
