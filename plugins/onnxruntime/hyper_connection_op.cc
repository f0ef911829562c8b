// ai.titans::HyperConnection for ONNX Runtime's CPU provider.
#include "plugins/kernels/hyper_connection_cpu.h"
#include "plugins/onnxruntime/cpu_node_op.h"

namespace titans::plugins {
namespace {

namespace op = titans::kernels::hyper_connection;
using kernels::Tensor;

struct Contract {
  using Configuration = op::Configuration;
  using Operands = op::Operands;
  using CpuKernel = op::CpuKernel;

  static constexpr std::size_t kInputs = op::kInputs, kOperands = op::kOperands;
  static constexpr std::array<kernels::InPlace, 0> kInPlace{};
  static bool is_integer(std::size_t /*input*/) { return false; }
  static bool is_optional(std::size_t operand) {
    return operand == op::kBranch || operand == op::kWeight || operand == op::kBeta;
  }
  static Tensor output(const Operands& operands, std::size_t which) {
    Tensor shape = operands[op::kResiduals];
    if (shape.rank != 4) return {};
    if (which == op::kResidualsOut) return shape;
    shape.rank = 3;
    if (which == op::kInput) shape.shape[2] = shape.shape[3];
    return shape;
  }
};

}  // namespace

const OrtCustomOp* hyper_connection_op() {
  static const CpuNodeOp<Contract> op;
  return &op;
}

}  // namespace titans::plugins
