#include "plugins/kernels/cpu_targets.h"

#include <cstdlib>

#if HWY_ARCH_X86
#include <cpuid.h>
#endif

namespace titans::kernels {
namespace {

#if HWY_ARCH_X86
// Some compilers' __builtin_cpu_supports does not have f16c.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

// The CPU features of each target, in namespaces with Highway's target names.
namespace N_AVX3 {
[[maybe_unused]] bool supported() {
#if HWY_ARCH_X86
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}
}  // namespace N_AVX3

namespace N_AVX2 {
[[maybe_unused]] bool supported() {
#if HWY_ARCH_X86
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && has_f16c();
#else
  return false;
#endif
}
}  // namespace N_AVX2

namespace N_NEON_WITHOUT_AES {
[[maybe_unused]] bool supported() { return true; }
}  // namespace N_NEON_WITHOUT_AES
namespace N_EMU128 {
[[maybe_unused]] bool supported() { return true; }
}  // namespace N_EMU128
namespace N_SCALAR {
[[maybe_unused]] bool supported() { return true; }
}  // namespace N_SCALAR

constexpr TargetFunction<bool (*)()> kTargets[] = {TITANS_EACH_TARGET(supported)};

const char* named_target() {
  const char* named = std::getenv("TITANS_CPU_TARGET");
  return named == nullptr ? "" : named;
}

}  // namespace

const std::vector<std::string_view>& cpu_targets() {
  static const std::vector<std::string_view> names = [] {
    std::vector<std::string_view> found;
    for (const auto& target : kTargets) {
      if (target.function()) found.push_back(target.name);
    }
    return found;
  }();
  return names;
}

std::string_view chosen_cpu_target() {
  const std::string_view named = named_target();
  if (named.empty()) return cpu_targets().front();
  const auto found = std::find(cpu_targets().begin(), cpu_targets().end(), named);
  return found == cpu_targets().end() ? std::string_view() : *found;
}

std::string unknown_cpu_target(const char* where, std::string_view target) {
  std::string names;
  for (const std::string_view name : cpu_targets()) names += (names.empty() ? "" : " or ") + std::string(name);
  const std::string got = target.empty() ? named_target() : std::string(target);
  return failure(where, "E0712", "not supported on this processor: " + expected("instruction set " + names, got),
                 "set TITANS_CPU_TARGET to one of these, or unset it");
}

}  // namespace titans::kernels
