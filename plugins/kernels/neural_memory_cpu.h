// The operator on the CPU: one kernel for each instruction set, chosen at run time.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "plugins/kernels/neural_memory.h"

namespace titans::kernels {

// The threads of whoever calls: runs body(context, index) for each index below `count`, on as many threads as it likes,
// and returns when all are done.
struct Parallel {
  void (*run)(void* pool, std::size_t count, void (*body)(void* context, std::size_t index), void* context);
  void* pool;
};

// Names of the instruction sets that this processor runs, the best first: out of "avx512", "avx2", "neon", "plain".
const std::vector<std::string_view>& cpu_targets();

// The one that $TITANS_CPU_TARGET names, or the best where it is not set. Empty where it names none of cpu_targets().
std::string_view chosen_cpu_target();

// One node. Any number of threads may run it at once.
class CpuKernel {
 public:
  // `target` is one of cpu_targets(); empty: chosen_cpu_target(). Returns nothing and sets `error` where there is no
  // such target.
  static std::unique_ptr<CpuKernel> create(const Configuration& configuration, std::string_view target,
                                           std::string& error);
  virtual ~CpuKernel() = default;

  // Checks the operands and computes. Returns what is wrong with them, with nothing written, or an empty string. Where
  // memory for scratch runs out, which only first calls ask for, it says so and the state is unspecified. W and
  // S are updated in place where `state` and `state_out` are one buffer, otherwise the pool is copied first. Results do
  // not depend on the number of threads.
  virtual std::string run(const Operands& operands, const Parallel& parallel) const = 0;
  virtual std::string_view target() const = 0;
};

}  // namespace titans::kernels
