// The core of both CPU kernels: scratch sizes, one head's part of a call, and its statistics.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "plugins/kernels/memory_common.h"
#include "plugins/kernels/scratch_pool.h"

namespace titans::kernels {

// The stride of a scratch row: whole vectors of any instruction set, plus one cache line. Without the extra line, the
// rows of a matrix would compete for a few sets of the cache.
constexpr std::size_t padded(std::size_t width) { return (width + 15) / 16 * 16 + 16; }

// A size rounded up to whole tiles of any instruction set.
inline constexpr std::size_t kTileRowBlock = 16;
constexpr std::size_t whole_tiles(std::size_t size) {
  return (size + kTileRowBlock - 1) / kTileRowBlock * kTileRowBlock;
}

// One thread's scratch for one head. Matrices are row-major with stride padded(columns).
class ScratchMemory {
 protected:
  // Pointers to set, and the number of floats that each needs.
  using Wanted = std::vector<std::pair<float**, std::size_t>>;
  void allocate(const Wanted& wanted) {
    constexpr std::size_t kLine = kCacheLine / sizeof(float);
    const auto lines = [](std::size_t floats) { return (floats + kLine - 1) / kLine * kLine; };
    std::size_t used = 0;
    for (const auto& [field, floats] : wanted) used += lines(floats);
    memory_ = allocate_floats(used);
    float* next = memory_.get();
    for (const auto& [field, floats] : wanted) {
      *field = next;
      next += lines(floats);
    }
  }

 private:
  AlignedFloats memory_;
};

// One head of one stream in one call.
struct Head {
  float* row;  // packed row, updated in place
  std::uint32_t index;
  const float* q;  // tokens x D, like k, v and y; k and v have keys_per_token rows per token
  const float* k;
  const float* v;
  const float* step_size;  // one per key
  const float* momentum;   // one per token, like forget_gate
  const float* forget_gate;
  const float* norm_scale;  // D, or null
  float* y;
  std::int64_t tokens;  // without padding
  std::int64_t fill;
  bool learn;
  const float* update_limit;  // null: commits every chunk
  float* stats;               // kStatCount values, or null
};

// A head's statistics for the output `stats`.
struct HeadStats {
  float loss = 0.0F, update_norm = 0.0F, committed = 0.0F, rejected = 0.0F;

  // Records a chunk whose update has this norm.
  void close_chunk(float norm, bool commit) {
    if (!(norm <= update_norm) && update_norm == update_norm) update_norm = norm;  // keeps a NaN
    (commit ? committed : rejected) += 1.0F;
  }
  void write(float* stats) const {
    if (stats == nullptr) return;
    stats[0] = loss;
    stats[1] = update_norm;
    stats[2] = committed;
    stats[3] = rejected;
  }
};

}  // namespace titans::kernels
