// ai.titans::CachedAttention for ONNX Runtime's CPU provider.
#include "plugins/kernels/cached_attention_cpu.h"
#include "plugins/onnxruntime/cpu_node_op.h"

namespace titans::plugins {
namespace {

namespace op = titans::kernels::cached_attention;
using kernels::Tensor;

struct Contract {
  using Configuration = op::Configuration;
  using Operands = op::Operands;
  using CpuKernel = op::CpuKernel;

  static constexpr std::size_t kInputs = op::kInputs, kOperands = op::kOperands;
  static constexpr auto kInPlace = op::kInPlace;
  static bool is_integer(std::size_t input) { return input >= op::kPosition; }
  static bool is_optional(std::size_t operand) { return operand >= op::kIncrements && operand < op::kInputs; }
  static Tensor output(const Operands& operands, std::size_t which) {
    return operands[which == op::kY ? op::kQ : which == op::kKeysOut ? op::kKeys : op::kValues];
  }
};

}  // namespace

const OrtCustomOp* cached_attention_op() {
  static const CpuNodeOp<Contract> op;
  return &op;
}

}  // namespace titans::plugins
