// HyperConnection on the CPU: one kernel for each instruction set, chosen at run time as the memory's.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "plugins/kernels/hyper_connection.h"
#include "plugins/kernels/neural_memory_cpu.h"

namespace titans::kernels::hyper_connection {

// One node. Any number of threads may run it at once.
class CpuKernel {
 public:
  // `target` is one of cpu_targets(); empty: chosen_cpu_target(). Returns nothing and sets `error` where there is no
  // such target, or the number of iterations is wrong.
  static std::unique_ptr<CpuKernel> create(std::int64_t iterations, std::string_view target, std::string& error);
  virtual ~CpuKernel() = default;

  // Checks the operands and computes. Returns what is wrong with them, with nothing written, or an empty string.
  // Results do not depend on the number of threads.
  virtual std::string run(const Operands& operands, const Parallel& parallel) const = 0;
};

}  // namespace titans::kernels::hyper_connection
