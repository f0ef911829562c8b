// Row by row arithmetic that both memory operators' CUDA kernels use: sums, activations, LayerNorm.
#pragma once

#include "plugins/kernels/cuda_device.cuh"
#include "plugins/kernels/cuda_numbers.cuh"

namespace titans::kernels::cuda {

inline constexpr float kLayerNormEpsilon = 1e-5F;

// The sum over the block, in a fixed order; every thread receives it. `words`: kWarps floats of shared memory.
__device__ inline float sum_over_block(float value, float* words) {
  value = sum_over_warp(value);
  sync_block();
  if (lane_index() == 0) words[warp_index()] = value;
  sync_block();
  float sum = 0.0F;
  for (int warp = 0; warp < kWarps; ++warp) sum += words[warp];
  return sum;
}

struct Activated {
  float value, derivative;
};
__device__ inline Activated activate(bool gelu, float z) {
  if (gelu) {
    constexpr float kHalfRoot = 0.70710678118654752F, kDensity = 0.39894228040143268F;
    const float below = 0.5F * complementary_error_function(-z * kHalfRoot);
    return {z * below, below + z * kDensity * exponential(-0.5F * z * z)};
  }
  const float gate = 1.0F / (1.0F + exponential(-z));
  return {z * gate, gate * (1.0F + z * (1.0F - gate))};
}

// LayerNorm's mean and reciprocal standard deviation of a row. A warp holds the row.
struct Moments {
  float mean, reciprocal;
};
__device__ inline Moments moments(const float* row, int size) {
  float sum = 0.0F, squares = 0.0F;
  for (int j = lane_index(); j < size; j += kWarpSize) sum += row[j];
  const float mean = sum_over_warp(sum) / static_cast<float>(size);
  for (int j = lane_index(); j < size; j += kWarpSize) squares += (row[j] - mean) * (row[j] - mean);
  return {mean, 1.0F / square_root(sum_over_warp(squares) / static_cast<float>(size) + kLayerNormEpsilon)};
}

}  // namespace titans::kernels::cuda
