// Gates per token on the CPU: types shared by the code of all instruction sets.
#pragma once

#include <array>

#include "plugins/kernels/cpu_head.h"
#include "plugins/kernels/neural_memory.h"

namespace titans::kernels {

struct TokenPlan {
  explicit TokenPlan(const Configuration& c) : configuration(c), layout(c) {}
  Configuration configuration;
  RowLayout layout;
};

struct TokenScratch : ScratchMemory {
  explicit TokenScratch(const Configuration& configuration);

  // The open chunk's coefficients at the last token, and those of each token of a block: a (C x C), f and beta.
  float *e = nullptr, *a = nullptr, *rows_a = nullptr, *rows_f = nullptr, *rows_beta = nullptr;
  // Per layer, for a block: layer_input and output_grad as in the packed row, and the activation's derivative.
  std::array<float*, kMaxDepth> layer_input{}, output_grad{}, derivative{};
  // For retrieval: the layer's x, beta x and f x; and the masked products with layer_input.
  std::array<float*, 2> x{}, x_beta{}, x_f{};
  float* scores = nullptr;
  float* transposed = nullptr;                       // W^T or layer_input^T
  float *grad_a = nullptr, *grad_e = nullptr;        // output_grad times -a and -e, for the chunk update
  std::array<float*, kMaxDepth> w{}, s{};            // float32 copies of a low-precision memory
  std::array<float*, kMaxDepth> w_next{}, s_next{};  // a chunk update that is guarded or must be rounded
};

using TokenFunction = void (*)(const TokenPlan& plan, const Head& head, TokenScratch& scratch);

}  // namespace titans::kernels
