// The instruction sets that kernels are compiled for. Include before hwy/foreach_target.h.
#pragma once

#define HWY_DISABLED_TARGETS (~(HWY_AVX3 | HWY_AVX2 | HWY_NEON_WITHOUT_AES | HWY_EMU128 | HWY_SCALAR))
#define HWY_COMPILE_ALL_ATTAINABLE
#include "hwy/detect_targets.h"

#if HWY_TARGETS & HWY_AVX3
#define TITANS_AVX512(function) {"avx512", &N_AVX3::function},
#else
#define TITANS_AVX512(function)
#endif
#if HWY_TARGETS & HWY_AVX2
#define TITANS_AVX2(function) {"avx2", &N_AVX2::function},
#else
#define TITANS_AVX2(function)
#endif
#if HWY_TARGETS & HWY_NEON_WITHOUT_AES
#define TITANS_NEON(function) {"neon", &N_NEON_WITHOUT_AES::function},
#else
#define TITANS_NEON(function)
#endif
#if HWY_TARGETS & HWY_EMU128
#define TITANS_PLAIN(function) {"plain", &N_EMU128::function},
#elif HWY_TARGETS & HWY_SCALAR
#define TITANS_PLAIN(function) {"plain", &N_SCALAR::function},
#else
#define TITANS_PLAIN(function)
#endif

// Array elements for each target: its name and the function's address. Best first.
#define TITANS_EACH_TARGET(function) \
  TITANS_AVX512(function) TITANS_AVX2(function) TITANS_NEON(function) TITANS_PLAIN(function)

#include <algorithm>
#include <string>
#include <string_view>

#include "plugins/kernels/cpu_kernel.h"

namespace titans::kernels {

template <typename Function>
struct TargetFunction {
  std::string_view name;
  Function function;
};

// The target's function, or null and an error. An empty `target` means chosen_cpu_target().
template <typename Function, std::size_t kCount>
const TargetFunction<Function>* find_target(const TargetFunction<Function> (&all)[kCount], const char* where,
                                            std::string_view target, std::string& error) {
  const std::string_view chosen = target.empty() ? chosen_cpu_target() : target;
  const auto& runs = cpu_targets();
  if (std::find(runs.begin(), runs.end(), chosen) != runs.end()) {
    for (const TargetFunction<Function>& each : all) {
      if (each.name == chosen) return &each;
    }
  }
  error = unknown_cpu_target(where, target);
  return nullptr;
}

}  // namespace titans::kernels
