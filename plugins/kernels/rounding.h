// The noise of rounding "stochastic", identical in every kernel. docs/operator.md defines it. All arithmetic is modulo
// 2^32.
#pragma once

#include <cstdint>

// For functions that CUDA compiles for the GPU too.
#ifdef __CUDACC__
#define TITANS_BOTH __host__ __device__
#else
#define TITANS_BOTH
#endif

namespace titans::kernels {

inline constexpr std::uint32_t kGolden = 0x9E3779B9;
inline constexpr std::uint32_t kMixFirst = 0x7FEB352D, kMixSecond = 0x846CA68B;

TITANS_BOTH constexpr std::uint32_t mix(std::uint32_t x) {
  x = (x ^ (x >> 16)) * kMixFirst;
  x = (x ^ (x >> 15)) * kMixSecond;
  return x ^ (x >> 16);
}

// The part of the noise that all elements of one tensor's W or S share at one chunk update.
struct NoiseKeys {
  std::uint32_t first = 0, second = 0;
};

TITANS_BOTH constexpr NoiseKeys noise_keys(std::uint32_t seed, std::uint32_t head, std::uint32_t tensor, bool surprise,
                                           std::uint32_t chunk_updates) {
  const std::uint32_t field = mix(mix(mix(kGolden + seed) + head) + 2 * tensor + (surprise ? 1 : 0));
  const std::uint32_t first = mix(field + chunk_updates);
  return {first, mix(first + field)};
}

// The upper 24 bits are uniform: u = (noise >> 8) 2^-24.
TITANS_BOTH constexpr std::uint32_t noise(const NoiseKeys& keys, std::uint32_t element) {
  return mix(mix(element ^ keys.first) ^ keys.second);
}

}  // namespace titans::kernels
