// Gates per chunk on the CPU: what the code of every instruction set shares.
#pragma once

#include <array>

#include "plugins/kernels/chunk_neural_memory.h"
#include "plugins/kernels/cpu_head.h"

namespace titans::kernels {

struct ChunkPlan {
  explicit ChunkPlan(const ChunkConfiguration& c) : configuration(c), layout(c) {}
  ChunkConfiguration configuration;
  ChunkRowLayout layout;
};

struct ChunkScratch : ScratchMemory {
  explicit ChunkScratch(const ChunkConfiguration& configuration);

  // Per layer, of the chunk's keys: its inputs, the loss's gradient at its outputs, the activation's derivative.
  std::array<float*, kMaxDepth> layer_input{}, output_grad{}, derivative{};
  std::array<float*, 2> x{};  // of retrieval
  float* row = nullptr;
  float* transposed = nullptr;                                                // W^T
  float *scale = nullptr, *gamma_gradient = nullptr;                          // of the LayerNorm
  float *point = nullptr, *weights_next = nullptr, *surprise_next = nullptr;  // of all weights
  float *weights = nullptr, *surprise = nullptr;  // float32 copies of a low-precision memory
  float* update = nullptr;                        // of one matrix
  std::array<float*, 2> iterate{};                // of Newton-Schulz
  std::array<float*, 4> square{};
};

struct ChunkHead : Head {
  const float* modulation;  // tokens x tensors, or null
  const float* previous;    // chunks x all weights, or null
  const float* previous_gate;
  float* initial_weights;  // chunks x all weights, or null
};

using ChunkFunction = void (*)(const ChunkPlan& plan, const ChunkHead& head, ChunkScratch& scratch);

}  // namespace titans::kernels
