// The memory operators on the CPU: one kernel for each instruction set, chosen at run time.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "plugins/kernels/chunk_neural_memory.h"
#include "plugins/kernels/neural_memory.h"

namespace titans::kernels {

// The caller's threads: runs body(context, index) for each index below `count`, on any number of threads, and returns
// when all are done.
struct Parallel {
  void (*run)(void* pool, std::size_t count, void (*body)(void* context, std::size_t index), void* context);
  void* pool;
};

// Names of the instruction sets that this processor runs, the best first: out of "avx512", "avx2", "neon", "plain".
const std::vector<std::string_view>& cpu_targets();

// The one that $TITANS_CPU_TARGET names, or the best if it is not set. Empty if it names none of cpu_targets().
std::string_view chosen_cpu_target();

// The error of a target that is not among cpu_targets(); empty: that of $TITANS_CPU_TARGET.
std::string unknown_cpu_target(const char* where, std::string_view target);

// The kernel of one node. Any number of threads may run it at once.
class CpuKernel {
 public:
  // `target` is one of cpu_targets(); empty: chosen_cpu_target(). Returns null and sets `error` if there is no such
  // target.
  static std::unique_ptr<CpuKernel> create(const Configuration& configuration, std::string_view target,
                                           std::string& error);
  static std::unique_ptr<CpuKernel> create(const ChunkConfiguration& configuration, std::string_view target,
                                           std::string& error);
  virtual ~CpuKernel() = default;

  // Checks the operands and computes. Returns an error, with nothing written, or an empty string. After an error of
  // missing scratch memory, which only first calls ask for, the state is unspecified. W and S are updated in place if
  // `state` and `state_out` are one buffer, otherwise the pool is copied first. Results do not depend on the number of
  // threads.
  virtual std::string run(const Operands& operands, const Parallel& parallel) const = 0;
  virtual std::string_view target() const = 0;
};

}  // namespace titans::kernels
