// The CUDA primitives that the kernels use: threads, barriers, groups of blocks, matrix instructions, launches. Kernels
// depend on CUDA only through this file. The tests replace it to run them on a CPU (tests/cuda_emulation): each thread
// is a fiber there, and the primitives are plain C++.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <string>

#include "plugins/kernels/neural_memory_cuda.h"

namespace titans::kernels::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarpSize = 32;
inline constexpr int kWarps = kThreads / kWarpSize;

// The blocks that share a head. In a cluster they read each other's shared memory and use the hardware's barrier.
// Before sm_90 they synchronize on a counter in global memory, so all of them must be resident.
struct Group {
  int size;
  int rank;
  unsigned* counter;  // starts at 0; null with a cluster
  unsigned arrivals;  // the counter's value when the next barrier completes
};

// A launch of `groups` groups of `size` blocks.
struct Launch {
  int groups;
  int size;
  std::size_t shared_bytes;
  std::size_t most_shared_bytes;  // the device's limit for any launch
  bool cluster;
};

// A matmul operand with float16's precision and float32's range, because small surprises underflow in float16. The
// operand is Tf32 for float16 values, bfloat16 for bfloat16 values, and the sum of two TF32 for float32 values.
struct Tf32 {
  float value;
};

template <class V>
struct OperandOf {
  using Type = V;
};
template <>
struct OperandOf<__half> {
  using Type = Tf32;
};
template <class V>
using Operand = typename OperandOf<V>::Type;

}  // namespace titans::kernels::cuda

#ifndef __CUDACC__
#include "cuda_emulation.h"
#else

namespace titans::kernels::cuda {

__device__ inline int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ inline int block_index() { return static_cast<int>(blockIdx.x); }
__device__ inline int block_count() { return static_cast<int>(gridDim.x); }
__device__ inline int lane_index() { return thread_index() % kWarpSize; }
__device__ inline int warp_index() { return thread_index() / kWarpSize; }

__device__ inline void sync_block() { __syncthreads(); }
// A barrier that also returns whether any thread passed true.
__device__ inline bool any_in_block(bool yes) { return __syncthreads_or(static_cast<int>(yes)) != 0; }
// Every lane receives the sum, which is computed in a fixed order.
__device__ inline float sum_over_warp(float value) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xFFFFFFFFU, value, lanes);
  return value;
}
__device__ inline float max_over_warp(float value) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFU, value, lanes));
  return value;
}

__device__ inline std::byte* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return reinterpret_cast<std::byte*>(bytes);
}

// A barrier for the group. Writes to shared and global memory before it are visible to the group's blocks after it.
__device__ inline void sync_group(Group& group) {
  if (group.size == 1) {
    __syncthreads();
    return;
  }
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
  group.arrivals += static_cast<unsigned>(group.size);
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(group.counter, 1U);
    while (*static_cast<volatile unsigned*>(group.counter) < group.arrivals) {
    }
    __threadfence();
  }
  __syncthreads();
#endif
}

// The address of `own` in the shared memory of the cluster's block `rank`.
__device__ inline const float* in_rank(const float* own, [[maybe_unused]] int rank) {
#if __CUDA_ARCH__ >= 900
  std::uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<std::uint64_t>(own)), "r"(rank));
  return reinterpret_cast<const float*>(there);
#else
  return own;
#endif
}

// Another block wrote the value, so the load bypasses the L1 cache, which is not coherent.
__device__ inline float load_from_group(const float* global) { return __ldcg(global); }

// Starts an asynchronous copy of 16 bytes into shared memory. Both addresses are aligned to 16. The data is visible
// after wait_for_copies and a barrier.
__device__ inline void copy_16(float* shared, const float* global) {
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ inline void report(std::int32_t* status, std::int32_t code) {
  if (status != nullptr) atomicCAS(status, 0, code);
}

// ---- values ----

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Tf32 x) { return x.value; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class V>
__device__ V to_value(float x);
template <>
__device__ inline float to_value<float>(float x) {
  return x;
}
template <>
__device__ inline Tf32 to_value<Tf32>(float x) {
  return {x};
}
template <>
__device__ inline __half to_value<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 to_value<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline float complementary_error_function(float x) { return erfcf(x); }
// Sine and cosine of an angle in units of 2^-32 turns.
__device__ inline void sine_and_cosine(std::uint32_t phase, float& sine, float& cosine) {
  sincospif(static_cast<float>(static_cast<std::int32_t>(phase)) * 0x1p-31F, &sine, &cosine);
}
__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline float absolute(float x) { return fabsf(x); }
__device__ inline float smaller_of(float x, float y) { return fminf(x, y); }
__device__ inline float larger_of(float x, float y) { return fmaxf(x, y); }
__device__ inline float whole_below(float x) { return floorf(x); }
__device__ inline float nearest_whole(float x) { return rintf(x); }  // ties to even
__device__ inline std::uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ inline float float_of(std::uint32_t bits) { return __uint_as_float(bits); }

// ---- matrix instructions: D (16x8) += A (16 x 4 words) B (4 words x 8); a word is one float or two bfloat16 ----

template <class V>
struct WordOf {
  using Type = float;
};
template <>
struct WordOf<__nv_bfloat16> {
  using Type = std::uint32_t;
};
template <class V>
using Word = typename WordOf<V>::Type;

__device__ inline std::uint32_t pack_pair(__nv_bfloat16 low, __nv_bfloat16 high) {
  return static_cast<std::uint32_t>(__bfloat16_as_ushort(high)) << 16 | __bfloat16_as_ushort(low);
}

template <class V>
__device__ void multiply_add(float (&d)[4], const Word<V> (&a)[4], const Word<V> (&b)[2]);

template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&d)[4], const std::uint32_t (&a)[4],
                                                   const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void multiply_add_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline std::uint32_t round_tf32(float x) {
  std::uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}
template <>
__device__ inline void multiply_add<Tf32>(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  std::uint32_t rounded_a[4], rounded_b[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded_a[i] = round_tf32(a[i]);
#pragma unroll
  for (int i = 0; i < 2; ++i) rounded_b[i] = round_tf32(b[i]);
  multiply_add_tf32(d, rounded_a, rounded_b);
}
// Splits a float into a sum of two TF32 values of 11 bits, with a relative error of 2^-22.
__device__ inline void split_tf32(float x, std::uint32_t& high, std::uint32_t& low) {
  high = round_tf32(x);
  low = round_tf32(x - __uint_as_float(high));
}
// A float32 matmul from TF32: three of the four partial products, the small ones first.
template <>
__device__ inline void multiply_add<float>(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  std::uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) split_tf32(a[i], a_high[i], a_low[i]);
#pragma unroll
  for (int i = 0; i < 2; ++i) split_tf32(b[i], b_high[i], b_low[i]);
  // The small terms get their own sum, because the instruction truncates its accumulator.
  float sum[4] = {};
  multiply_add_tf32(sum, a_low, b_high);
  multiply_add_tf32(sum, a_high, b_low);
  multiply_add_tf32(sum, a_high, b_high);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += sum[i];
}

// ---- the host's side ----

inline std::string describe(cudaError_t error) {
  if (error == cudaSuccess) return {};
  return failure("NeuralMemory", "E0713",
                 std::string("CUDA call failed: ") + cudaGetErrorName(error) + ": " + cudaGetErrorString(error),
                 "check device, driver and memory");
}

// The largest cluster of this kernel: 8, 4, 2 or 1 blocks. Small GPUs and MIG slices have room for less.
inline cudaError_t query_clusters(const void* kernel, CudaDevice& device) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.shared_bytes));
  if (error != cudaSuccess) return error;
  for (device.most_cluster = 8; device.most_cluster > 1; device.most_cluster /= 2) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(device.most_cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(device.most_cluster));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = device.shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0) return cudaSuccess;
    cudaGetLastError();  // an unsupported cluster size is not an error
  }
  return cudaSuccess;
}

inline std::string query_device(CudaDevice& device, [[maybe_unused]] const void* kernel) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
    return value;
  };
  device.sm = ask(cudaDevAttrComputeCapabilityMajor) * 10 + ask(cudaDevAttrComputeCapabilityMinor);
  device.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  device.shared_bytes = static_cast<std::size_t>(ask(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  constexpr int kFirstClusterSm = 90;
  if (error == cudaSuccess && device.sm >= kFirstClusterSm) error = query_clusters(kernel, device);
  return describe(error);
}

template <class Parameters>
std::string launch(void (*kernel)(Parameters), const Launch& launch, const Parameters& parameters,
                   CUstream_st* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.groups * launch.size));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  if (launch.size > 1 && launch.cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(launch.size);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else if (launch.size > 1) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  config.attrs = &attribute;
  config.numAttrs = launch.size > 1 ? 1 : 0;
  // Always the device's limit: the setting belongs to the function, and other threads may launch it concurrently.
  const cudaError_t allowed =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(launch.most_shared_bytes));
  if (allowed != cudaSuccess) return describe(allowed);
  return describe(cudaLaunchKernelEx(&config, kernel, parameters));
}

inline std::string copy(void* to, const void* from, std::size_t bytes, CUstream_st* stream) {
  return describe(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
}
inline std::string clear(void* data, std::size_t bytes, CUstream_st* stream) {
  return describe(cudaMemsetAsync(data, 0, bytes, stream));
}

}  // namespace titans::kernels::cuda

#endif
