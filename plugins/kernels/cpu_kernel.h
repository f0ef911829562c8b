// The memory operators on the CPU: a kernel per instruction set, chosen at run time.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "plugins/kernels/chunk_neural_memory.h"
#include "plugins/kernels/neural_memory.h"
#include "plugins/kernels/parallel.h"

namespace titans::kernels {

// The instruction sets that this processor supports, best first: "avx512", "avx2", "neon", "plain".
const std::vector<std::string_view>& cpu_targets();

// The target named by $TITANS_CPU_TARGET, or the best if it is not set. Empty if the name is not in cpu_targets().
std::string_view chosen_cpu_target();

// The error for a target that is not in cpu_targets(). An empty `target` means $TITANS_CPU_TARGET.
std::string unknown_cpu_target(const char* where, std::string_view target);

// The kernel of one node. Thread-safe.
class CpuKernel {
 public:
  // `target` is one of cpu_targets(); an empty one means chosen_cpu_target(). Returns null and sets `error` if the
  // target is not supported.
  static std::unique_ptr<CpuKernel> create(const Configuration& configuration, std::string_view target,
                                           std::string& error);
  static std::unique_ptr<CpuKernel> create(const ChunkConfiguration& configuration, std::string_view target,
                                           std::string& error);
  virtual ~CpuKernel() = default;

  // Checks the operands and computes. Returns an error with nothing written, or an empty string. Scratch is allocated
  // by the first calls only; if that fails, the state is unspecified. W and S are updated in place if `state` and
  // `state_out` are one buffer; otherwise the pool is copied first. Results do not depend on the number of threads.
  virtual std::string run(const Operands& operands, const Parallel& parallel) const = 0;
  virtual std::string_view target() const = 0;
};

}  // namespace titans::kernels
