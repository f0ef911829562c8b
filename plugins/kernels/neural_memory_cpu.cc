// NeuralMemory on the CPU. Compiled once per instruction set (Highway's foreach_target). neural_memory_textbook.cc has
// the same computation without optimizations.
//
// A head's W and S (tens to hundreds of KiB) stay in a core's cache for the whole call. They are only read between two
// chunk updates. A whole chunk is a few small matmuls per layer. Masks, gates and activations are applied while the
// result is in registers (token_gates-inl.h).
//
// A single token needs one pass over S and, per layer, one (the first) or three over W. All but one of these passes hit
// the cache. With chunks of 64, a head and token cost:
//   linear memory of 64:  57 kFLOP; 49 KiB moved if tokens come one by one
//   MLP 64-256-64:        442 kFLOP; 345 KiB moved

#include "plugins/kernels/cpu_targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "plugins/kernels/neural_memory_cpu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// These headers include this file again, so foreach_target.h comes first.
#include "hwy/highway.h"
#include "plugins/kernels/token_gates-inl.h"

#if HWY_ONCE

#include "plugins/kernels/cpu_head_kernel.h"

namespace titans::kernels {
namespace {

struct TokenRegime {
  using Configuration = kernels::Configuration;
  using Plan = TokenPlan;
  using Head = kernels::Head;
  using Scratch = TokenScratch;

  static void fill(Head& head, const Plan& plan, const HeadOperands& part, const Operands& /*operands*/) {
    part.fill(head, plan.layout.size, 1, plan.configuration.mode == Mode::kUpdate);
  }
};

constexpr TargetFunction<TokenFunction> kTargets[] = {TITANS_EACH_TARGET(run_token_head)};

}  // namespace

std::unique_ptr<CpuKernel> CpuKernel::create(const Configuration& configuration, std::string_view target,
                                             std::string& error) {
  const auto* found = find_target(kTargets, Configuration::kOperator, target, error);
  if (found == nullptr) return nullptr;
  return std::make_unique<HeadKernel<TokenRegime>>(configuration, found->name, found->function);
}

}  // namespace titans::kernels

#endif  // HWY_ONCE
