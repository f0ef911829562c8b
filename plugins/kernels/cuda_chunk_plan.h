// Where a thread block keeps its scratch while it works on a head with chunk gates, and the configuration as the kernel
// sees it. The host decides; this file does not need CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "plugins/kernels/chunk_neural_memory.h"
#include "plugins/kernels/cuda_plan.h"

namespace titans::kernels::cuda {

// Offsets are in words of the packed row.
struct ChunkModel : Codec {
  int depth, tensors, chunk, width, widest, keys_per_token;
  int widths[kMaxDepth + 1];
  Field w[kMaxTensors], g[kMaxTensors], s[kMaxTensors], ew[kMaxTensors], es[kMaxTensors];
  int rows[kMaxTensors];         // of a tensor; its columns are in the field
  int offsets[kMaxTensors + 1];  // of a tensor among all weights; the last is their number
  int weight_words;              // of all W in the packed row
  int k, v, theta, chunk_updates, row;
  int orthogonalise;
  std::int64_t batch_size, period;  // batch_size: 0 if no position moves the gradient point
  float loss_scale, grad_clamp;
  bool aligned, gelu, residual, layer_norm, fast_norm, momentum, keeps_point, lookahead, direct;
};

ChunkModel make_chunk_model(const ChunkConfiguration& configuration);

// A block's scratch. `weights` to `surprise_next` have all weights, float32.
struct ChunkPlan {
  Place sums, vectors[2], scale, gamma;  // of single rows; gamma: one gradient per warp
  Place iterate[2], square[2];           // of Newton-Schulz
  Place x[2];                            // rows of a retrieval
  Place layer_input[kMaxDepth], derivative[kMaxDepth], output_grad[kMaxDepth];  // rows of a chunk's keys
  Place point, weights, surprise, weights_next, surprise_next, update;
  std::uint32_t shared_bytes = 0;
  std::size_t workspace_bytes = 0;  // per block
};

ChunkPlan make_chunk_plan(const ChunkConfiguration& configuration, const CudaDevice& device);
// Blocks of a launch for this many heads: at most one per multiprocessor, because a block takes its registers.
int chunk_blocks(const CudaDevice& device, std::int64_t work);

std::string describe(const ChunkPlan& plan);

}  // namespace titans::kernels::cuda
