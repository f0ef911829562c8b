// ai.titans::CausalConvolution for ONNX Runtime's CPU provider.
#include "plugins/kernels/causal_convolution_cpu.h"
#include "plugins/onnxruntime/cpu_node_op.h"

namespace titans::plugins {
namespace {

namespace op = titans::kernels::causal_convolution;
using kernels::Tensor;

struct Contract {
  using Configuration = op::Configuration;
  using Operands = op::Operands;
  using CpuKernel = op::CpuKernel;

  static constexpr std::size_t kInputs = op::kInputs, kOperands = op::kOperands;
  static constexpr auto kInPlace = op::kInPlace;
  static bool is_integer(std::size_t input) { return input == op::kValid || input == op::kSlots; }
  static bool is_optional(std::size_t operand) { return operand >= op::kBias && operand < op::kInputs; }
  static Tensor output(const Operands& operands, std::size_t which) {
    return operands[which == op::kY ? op::kX : op::kPast];
  }
};

}  // namespace

const OrtCustomOp* causal_convolution_op() {
  static const CpuNodeOp<Contract> op;
  return &op;
}

}  // namespace titans::plugins
