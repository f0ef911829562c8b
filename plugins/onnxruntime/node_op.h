// A custom operator of ONNX Runtime for operators with operands of fixed dtypes.
#pragma once

#include <onnxruntime_c_api.h>

#include <array>
#include <cstddef>
#include <vector>

#include "plugins/kernels/operands.h"
#include "plugins/onnxruntime/ort_node.h"

namespace titans::plugins {

// `Contract` provides the types Configuration and Operands; kInputs and kOperands, their numbers; kInPlace, pairs of
// inputs and outputs that may share a buffer; the functions is_integer(input), is_optional(operand); and
// output(operands, which), a tensor with the shape of that output, or an absent one if the inputs have wrong ranks. The
// kernel's check rejects wrong shapes.
//
// `NodeKernel` is the kernel of one node of a session: kProvider, a constructor with the API and the node's
// information, and run(context, operands), which throws.
template <class Contract, class NodeKernel>
class NodeOp final : public OrtCustomOp {
 public:
  NodeOp() : OrtCustomOp{} {
    version = ORT_API_VERSION;
    GetName = [](const OrtCustomOp*) { return Configuration::kOperator; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return NodeKernel::kProvider; };
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
      return guarded(*api, [&] { *kernel = new Node{*api, NodeKernel(*api, *info)}; });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return static_cast<Node*>(kernel)->compute(*context);
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
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

  struct Node {
    const OrtApi& api;
    NodeKernel kernel;

    OrtStatus* compute(OrtKernelContext& context) noexcept {
      return guarded(api, [&] {
        typename Contract::Operands operands;
        read_inputs(api, context, operands.data(), Contract::kInputs);
        const std::size_t outputs = output_count(api, context);
        for (std::size_t i = 0; i < outputs && i < kOutputs; ++i) {
          const std::size_t which = Contract::kInputs + i;
          operands[which] = make_output(api, context, i, Contract::output(operands, which));
        }
        kernel.run(context, operands);
      });
    }
  };
};

// The definitions for one provider. They live as long as the process.
std::vector<const OrtCustomOp*> cpu_node_ops();
#ifdef TITANS_WITH_CUDA
std::vector<const OrtCustomOp*> cuda_node_ops();
#endif

}  // namespace titans::plugins
