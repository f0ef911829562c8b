// plugins/kernels/cuda_device.cuh in plain C++. A kernel's threads are fibers of one CPU thread, so tests can check the
// CUDA kernels' arithmetic, indices and barriers without a GPU. Matrix instructions round like the hardware's: operands
// to TF32 or bfloat16, sums truncated to float32.
//
// TITANS_EMULATED_GPU describes the device as sm:multiprocessors:shared bytes per block (default 90:132:232448). A
// suffix :blocks gives the largest cluster if it is below 8. TITANS_EMULATED_ORDER sets the order of threads between
// two barriers: "forward", "reverse" or a number. A number seeds a random order in which some warps and blocks also
// fall far behind. The order determines what a missing barrier would break.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#undef __global__
#undef __device__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__

namespace titans::kernels::cuda {

int thread_index();
int block_index();
int block_count();
inline int lane_index() { return thread_index() % kWarpSize; }
inline int warp_index() { return thread_index() / kWarpSize; }

void sync_block();
bool any_in_block(bool yes);
float sum_over_warp(float value);
float max_over_warp(float value);
std::byte* shared_memory();
void sync_group(Group& group);
const float* in_rank(const float* own, int rank);
inline float load_from_group(const float* global) { return *global; }
void copy_16(float* shared, const float* global);
inline void wait_for_copies() {}
inline void report(std::int32_t* status, std::int32_t code) {
  if (status != nullptr && *status == 0) *status = code;
}

inline float to_float(float x) { return x; }
inline float to_float(Tf32 x) { return x.value; }
inline float to_float(__half x) { return __half2float(x); }
inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class V>
V to_value(float x) {
  if constexpr (std::is_same_v<V, float> || std::is_same_v<V, Tf32>) {
    return {x};
  } else if constexpr (std::is_same_v<V, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

inline float exponential(float x) { return std::exp(x); }
inline float complementary_error_function(float x) { return std::erfc(x); }
inline void sine_and_cosine(std::uint32_t phase, float& sine, float& cosine) {
  const double angle = static_cast<float>(static_cast<std::int32_t>(phase)) * 0x1p-31F * 3.14159265358979323846;
  sine = static_cast<float>(std::sin(angle));
  cosine = static_cast<float>(std::cos(angle));
}
inline float square_root(float x) { return std::sqrt(x); }
inline float hyperbolic_tangent(float x) { return std::tanh(x); }
inline float absolute(float x) { return std::fabs(x); }
inline float smaller_of(float x, float y) { return std::fmin(x, y); }
inline float larger_of(float x, float y) { return std::fmax(x, y); }
inline float whole_below(float x) { return std::floor(x); }
inline float nearest_whole(float x) { return std::nearbyint(x); }
inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

template <class V>
using Word = std::conditional_t<std::is_same_v<V, __nv_bfloat16>, std::uint32_t, float>;

inline std::uint32_t pack_pair(__nv_bfloat16 low, __nv_bfloat16 high) {
  std::uint16_t bits[2];
  std::memcpy(&bits[0], &low, sizeof(low));
  std::memcpy(&bits[1], &high, sizeof(high));
  return static_cast<std::uint32_t>(bits[1]) << 16 | bits[0];
}

enum class Products { kBFloat16, kTf32, kTf32InParts };

// One lane's part of a matrix instruction.
struct Fragments {
  float* d;
  float a[4][2], b[2][2];  // words, each of one or two values
};
// Collects the lanes of the warp.
void multiply_add_warp(const Fragments& lane, Products products);

inline void unpack(float word, float (&to)[2]) { to[0] = word; }
inline void unpack(std::uint32_t word, float (&to)[2]) {
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t bits = i == 0 ? word << 16 : word & 0xFFFF0000U;
    std::memcpy(&to[i], &bits, sizeof(bits));
  }
}

template <class V>
void multiply_add(float (&d)[4], const Word<V> (&a)[4], const Word<V> (&b)[2]) {
  Fragments lane{};
  lane.d = d;
  for (int i = 0; i < 4; ++i) unpack(a[i], lane.a[i]);
  for (int i = 0; i < 2; ++i) unpack(b[i], lane.b[i]);
  multiply_add_warp(lane, std::is_same_v<V, float>  ? Products::kTf32InParts
                          : std::is_same_v<V, Tf32> ? Products::kTf32
                                                    : Products::kBFloat16);
}

// ---- the host's side ----

std::string query_device(CudaDevice& device, const void* kernel);
// Runs body() as every thread of the launch.
std::string run_launch(const Launch& launch, void (*body)(const void*), const void* context);

template <class Parameters>
std::string launch(void (*kernel)(Parameters), const Launch& launch, const Parameters& parameters, CUstream_st*) {
  struct Context {
    void (*kernel)(Parameters);
    const Parameters* parameters;
  };
  const Context context{kernel, &parameters};
  return run_launch(
      launch,
      [](const void* raw) {
        const auto* each = static_cast<const Context*>(raw);
        each->kernel(*each->parameters);
      },
      &context);
}

std::string copy(void* to, const void* from, std::size_t bytes, CUstream_st* stream);
std::string clear(void* data, std::size_t bytes, CUstream_st* stream);

}  // namespace titans::kernels::cuda
