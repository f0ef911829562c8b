// ChunkNeuralMemory on the CPU. Compiled once per instruction set (Highway's foreach_target). chunk_gates-inl.h
// computes one head.

#include "plugins/kernels/cpu_targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "plugins/kernels/chunk_neural_memory_cpu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// These headers include this file again, so foreach_target.h comes first.
#include "hwy/highway.h"
#include "plugins/kernels/chunk_gates-inl.h"

#if HWY_ONCE

#include "plugins/kernels/cpu_head_kernel.h"

namespace titans::kernels {
namespace {

struct ChunkRegime {
  using Configuration = ChunkConfiguration;
  using Plan = ChunkPlan;
  using Head = ChunkHead;
  using Scratch = ChunkScratch;

  static void fill(Head& head, const Plan& plan, const HeadOperands& part, const Operands& operands) {
    const Configuration& c = plan.configuration;
    const std::int64_t tokens = operands[kQ].shape[2], weights = c.chunks(tokens) * c.all_elements();
    part.fill(head, plan.layout.size, c.keys_per_token, true);
    head.modulation = part.part(kModulation, tokens * c.tensors());
    head.previous = part.part(kPrevious, weights);
    head.previous_gate = part.part(kPreviousGate, tokens);
    head.initial_weights = part.part(kInitialWeights, weights);
  }
};

constexpr TargetFunction<ChunkFunction> kTargets[] = {TITANS_EACH_TARGET(run_chunk_head)};

}  // namespace

std::unique_ptr<CpuKernel> CpuKernel::create(const ChunkConfiguration& configuration, std::string_view target,
                                             std::string& error) {
  const auto* found = find_target(kTargets, ChunkConfiguration::kOperator, target, error);
  if (found == nullptr) return nullptr;
  return std::make_unique<HeadKernel<ChunkRegime>>(configuration, found->name, found->function);
}

}  // namespace titans::kernels

#endif  // HWY_ONCE
