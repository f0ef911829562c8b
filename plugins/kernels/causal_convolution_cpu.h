// CausalConvolution on the CPU: a kernel per instruction set, chosen at run time as for the memory operators.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "plugins/kernels/causal_convolution.h"
#include "plugins/kernels/parallel.h"

namespace titans::kernels::causal_convolution {

// The kernel of one node. Thread-safe.
class CpuKernel {
 public:
  // `target` is one of cpu_targets(); an empty one means chosen_cpu_target(). Returns null and sets `error` if the
  // target is not supported.
  static std::unique_ptr<CpuKernel> create(const Configuration& configuration, std::string_view target,
                                           std::string& error);
  virtual ~CpuKernel() = default;

  // Checks the operands and computes. Returns an error with nothing written, or an empty string. The past is updated in
  // place if input and output are one buffer; otherwise the pool is copied first. Results do not depend on the number
  // of threads.
  virtual std::string run(const Operands& operands, const Parallel& parallel) const = 0;
};

}  // namespace titans::kernels::causal_convolution
