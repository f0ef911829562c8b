// Small helpers for float32 values that all CUDA kernels use.
#pragma once

#include "plugins/kernels/cuda_device.cuh"

namespace titans::kernels::cuda {

__device__ inline bool is_finite(float x) { return x - x == 0.0F; }
__device__ inline bool is_nan(float x) { return x != x; }
__device__ inline float infinity() { return __builtin_inff(); }
__device__ inline float not_a_number() { return __builtin_nanf(""); }

// Four consecutive floats, which the compiler loads and stores as one.
struct alignas(16) Four {
  float v[4];
};

}  // namespace titans::kernels::cuda
