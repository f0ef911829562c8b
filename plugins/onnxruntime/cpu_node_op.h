// A custom operator of ONNX Runtime's CPU provider, for operators with one kernel and operands of fixed dtypes.
#pragma once

#include <onnxruntime_c_api.h>

#include <array>
#include <cstddef>
#include <memory>
#include <string>

#include "plugins/kernels/operands.h"
#include "plugins/onnxruntime/ort_node.h"

namespace titans::plugins {

// `Contract` provides the types Configuration, Operands and CpuKernel; kInputs and kOperands, their numbers; kInPlace,
// pairs of inputs and outputs that may share a buffer; the functions is_integer(input), is_optional(operand); and
// output(operands, which), a tensor with the shape of that output, or an absent one if the inputs have wrong ranks. The
// kernel's check rejects wrong shapes.
template <class Contract>
class CpuNodeOp final : public OrtCustomOp {
 public:
  CpuNodeOp() : OrtCustomOp{} {
    version = ORT_API_VERSION;
    GetName = [](const OrtCustomOp*) { return Configuration::kOperator; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    GetInputTypeCount = [](const OrtCustomOp*) -> std::size_t { return Contract::kInputs; };
    GetInputType = [](const OrtCustomOp*, std::size_t input) {
      return Contract::is_integer(input) ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    };
    GetInputCharacteristic = [](const OrtCustomOp*, std::size_t input) { return characteristic(input); };
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return kOutputs; };
    GetOutputType = [](const OrtCustomOp*, std::size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
    GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t output) {
      return characteristic(Contract::kInputs + output);
    };
    GetStartVersion = [](const OrtCustomOp*) { return kVersion; };
    GetEndVersion = [](const OrtCustomOp*) { return kVersion; };
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
      return guarded(*api, [&] { *kernel = new NodeKernel(*api, *info); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return static_cast<NodeKernel*>(kernel)->compute(*context);
    };
    KernelDestroy = [](void* kernel) { delete static_cast<NodeKernel*>(kernel); };
    if constexpr (kPairs > 0) {
      GetMayInplace = [](int** inputs, int** outputs) -> std::size_t {
        static InPlacePairs pairs;
        *inputs = pairs.inputs.data();
        *outputs = pairs.outputs.data();
        return kPairs;
      };
      ReleaseMayInplace = [](int*, int*) {};
    }
  }

 private:
  using Configuration = typename Contract::Configuration;

  static constexpr int kVersion = 1;  // of the operator's domain
  static constexpr std::size_t kOutputs = Contract::kOperands - Contract::kInputs;
  static constexpr std::size_t kPairs = Contract::kInPlace.size();

  struct InPlacePairs {
    std::array<int, kPairs> inputs, outputs;

    InPlacePairs() {
      for (std::size_t i = 0; i < kPairs; ++i) {
        inputs[i] = static_cast<int>(Contract::kInPlace[i].input);
        outputs[i] = static_cast<int>(Contract::kInPlace[i].output - Contract::kInputs);
      }
    }
  };

  static OrtCustomOpInputOutputCharacteristic characteristic(std::size_t operand) {
    return Contract::is_optional(operand) ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }

  // The kernel of one node of a session.
  class NodeKernel {
   public:
    NodeKernel(const OrtApi& api, const OrtKernelInfo& info) : api_(api) {
      std::string error;
      kernel_ = Contract::CpuKernel::create(read_configuration<Configuration>(api, info), {}, error);
      check(api, error);
    }

    OrtStatus* compute(OrtKernelContext& context) noexcept {
      return guarded(api_, [&] {
        typename Contract::Operands operands;
        read_inputs(api_, context, operands.data(), Contract::kInputs);
        const std::size_t outputs = output_count(api_, context);
        for (std::size_t i = 0; i < outputs && i < kOutputs; ++i) {
          const std::size_t which = Contract::kInputs + i;
          operands[which] = make_output(api_, context, i, Contract::output(operands, which));
        }
        SessionThreads threads{api_, context};
        check(api_, kernel_->run(operands, threads.parallel()));
      });
    }

   private:
    const OrtApi& api_;
    std::unique_ptr<typename Contract::CpuKernel> kernel_;
  };
};

// The definitions for the CPU provider only. They live as long as the process.
const OrtCustomOp* cached_attention_op();
const OrtCustomOp* causal_convolution_op();
const OrtCustomOp* hyper_connection_op();

}  // namespace titans::plugins
