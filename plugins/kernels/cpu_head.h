// What the code of every instruction set shares: sizes that follow from the configuration, scratch memory, and one
// head's part of a call.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "plugins/kernels/neural_memory.h"

namespace titans::kernels {

inline constexpr std::size_t kCacheLine = 64;

// A row of scratch: whole vectors of any instruction set, and one cache line more, so that the rows of a matrix do not
// all fall into the same few sets of the cache.
constexpr std::size_t padded(std::size_t width) { return (width + 15) / 16 * 16 + 16; }

// Rows or columns of a matrix that is padded to whole tiles of any instruction set.
inline constexpr std::size_t kTileRowBlock = 16;
constexpr std::size_t whole_tiles(std::size_t size) {
  return (size + kTileRowBlock - 1) / kTileRowBlock * kTileRowBlock;
}

// One thread's scratch for one head, of which a configuration has what it needs. Matrices are row-major with stride
// padded(columns).
struct Scratch {
  explicit Scratch(const Configuration& configuration);

  // The open chunk's coefficients at the last token, and of each token of a block: a (C x C), f and beta.
  float *e = nullptr, *a = nullptr, *rows_a = nullptr, *rows_f = nullptr, *rows_beta = nullptr;
  // Per layer, of a block: left and right as in the packed row, the activation's derivative.
  std::array<float*, kMaxDepth> left{}, right{}, derivative{};
  // Retrieval: x of the layer, beta x, f x; the masked products with left.
  std::array<float*, 2> x{}, x_beta{}, x_f{};
  float* scores = nullptr;
  float* transposed = nullptr;                       // W^T or left^T
  float *right_a = nullptr, *right_e = nullptr;      // of the fold
  std::array<float*, kMaxDepth> w{}, s{};            // float32 copies, for weights that are stored otherwise
  std::array<float*, kMaxDepth> w_next{}, s_next{};  // where a guarded fold waits, or one to be rounded

  // With gates = "chunk": left, right and derivative are of the chunk's keys.
  std::size_t rows = 0;                                                       // that x has
  float *scale = nullptr, *gamma_gradient = nullptr;                          // of the LayerNorm
  float *point = nullptr, *weights_next = nullptr, *surprise_next = nullptr;  // of all weights
  float *weights = nullptr, *surprise = nullptr;                              // float32 copies, as above
  float* update = nullptr;                                                    // of one matrix
  std::array<float*, 2> iterate{};                                            // of Newton-Schulz
  std::array<float*, 4> square{};

 private:
  using Wanted = std::vector<std::pair<float**, std::size_t>>;
  void want_token(const Configuration& configuration, Wanted& wanted);
  void want_chunk(const Configuration& configuration, Wanted& wanted);

  struct Free {
    void operator()(float* data) const noexcept { ::operator delete(data, std::align_val_t{kCacheLine}); }
  };
  std::unique_ptr<float, Free> memory_;
};

struct Plan {
  explicit Plan(const Configuration& c) : configuration(c), layout(c) {}
  Configuration configuration;
  RowLayout layout;
};

// One head of one stream in one call.
struct Head {
  float* row;  // packed, updated in place
  std::uint32_t index;
  const float* q;  // tokens x D, as are k, v and y
  const float* k;
  const float* v;
  const float* step_size;  // one for each token, as are the other gates; or for each key
  const float* momentum;
  const float* forget_gate;
  const float* norm_scale;  // D, or null
  const float* modulation;  // tokens x tensors, or null
  const float* previous;    // chunks x all weights, or null
  const float* previous_gate;
  float* y;
  float* before;        // chunks x all weights, or null
  std::int64_t tokens;  // that count
  std::int64_t fill;
  bool learn;
  const float* update_limit;  // null: every chunk is committed
  float* stats;               // kStatCount of them, or null
};

// The code of one instruction set.
struct CpuFunctions {
  void (*update)(const Plan& plan, const Head& head, Scratch& scratch);
  void (*read)(const Plan& plan, const Head& head, Scratch& scratch);
};

}  // namespace titans::kernels
