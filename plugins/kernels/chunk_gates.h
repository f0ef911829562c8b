// Gates per chunk on the CPU: types shared by the code of all instruction sets.
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

  // Per layer, for the chunk's keys: the layer's inputs, the loss's gradient at its outputs, the activation's
  // derivative.
  std::array<float*, kMaxDepth> layer_input{}, output_grad{}, derivative{};
  std::array<float*, 2> x{};  // inputs of two successive layers in retrieval
  float* row = nullptr;
  float* transposed = nullptr;                                                // W^T
  float *scale = nullptr, *gamma_gradient = nullptr;                          // of the LayerNorm
  float *point = nullptr, *weights_next = nullptr, *surprise_next = nullptr;  // all weights each
  float *weights = nullptr, *surprise = nullptr;  // float32 copies of a low-precision memory
  float* update = nullptr;                        // one matrix
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
