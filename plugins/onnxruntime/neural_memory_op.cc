#include "plugins/onnxruntime/neural_memory_op.h"

#include <exception>
#include <memory>
#include <string>

#include "plugins/kernels/neural_memory_cpu.h"

namespace titans::plugins {
namespace {

using namespace titans::kernels;

constexpr int kVersion = 1;  // of the operator's domain
// The operator's output that may share the buffer of input kState.
constexpr int kStateOutput = kStateOut - kY;

// An ONNX Runtime object and the function of its API that releases it.
template <typename Object>
using Handle = std::unique_ptr<Object, void (*)(Object*)>;

// Carries a status through code that knows exceptions.
struct Failure {
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status != nullptr) throw Failure{status};
}

// Runs `body`, and returns what it throws as a status: nothing may be thrown into ONNX Runtime.
template <typename Body>
OrtStatus* guarded(const OrtApi& api, Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  }
}

// What a node lacks stays as it is; what must be there, configure() says.
Attributes read_attributes(const OrtApi& api, const OrtKernelInfo& info) {
  Attributes attributes;
  const auto found = [&](OrtStatus* status) {
    if (status != nullptr) api.ReleaseStatus(status);
    return status == nullptr;
  };
  const auto is_text = [&](const char* name, std::size_t& size) {
    return found(api.KernelInfoGetAttribute_string(&info, name, nullptr, &size)) && size != 0;
  };
  const auto is_number = [&](const char* name, std::int64_t& number) {
    return found(api.KernelInfoGetAttribute_int64(&info, name, &number));
  };
  // One that is there and of another type is not one that is left out.
  const auto refuse_another_type = [&](const char* name) {
    float real = 0;
    std::int64_t number = 0;
    std::size_t size = 0;
    if (!found(api.KernelInfoGetAttribute_float(&info, name, &real)) && !is_number(name, number) &&
        !is_text(name, size)) {
      return;
    }
    const std::string text = std::string("[NeuralMemory] expected attribute ") + name +
                             " of the type that docs/operator.md gives it but got another; do export the model again";
    throw Failure{api.CreateStatus(ORT_INVALID_ARGUMENT, text.c_str())};
  };
  const auto read_text = [&](const char* name, std::string& value) {
    std::size_t size = 0;  // with the final NUL
    if (!is_text(name, size)) return refuse_another_type(name);
    std::string text(size, '\0');
    check(api.KernelInfoGetAttribute_string(&info, name, text.data(), &size));
    text.resize(size - 1);
    value = text;
  };
  const auto read_number = [&](const char* name, std::int64_t& value) {
    std::int64_t number = 0;
    if (!is_number(name, number)) return refuse_another_type(name);
    value = number;
  };
  read_text("mode", attributes.mode);
  read_text("schedule", attributes.schedule);
  read_text("activation", attributes.activation);
  read_text("storage", attributes.storage);
  read_number("residual", attributes.residual);
  read_number("layer_norm", attributes.layer_norm);
  read_number("chunk_size", attributes.chunk_size);
  std::size_t count = 0;
  if (found(api.KernelInfoGetAttributeArray_int64(&info, "widths", nullptr, &count))) {
    attributes.widths.resize(count);
    check(api.KernelInfoGetAttributeArray_int64(&info, "widths", attributes.widths.data(), &count));
  }
  return attributes;
}

DType dtype_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return DType::kFloat32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      return DType::kInt64;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
      return DType::kBool;
    default:
      return DType::kOther;
  }
}

// The session's own threads, as many as it has been given.
struct Threads {
  const OrtApi& api;
  OrtKernelContext& context;

  static void run(void* self, std::size_t count, void (*body)(void*, std::size_t), void* argument) {
    const Threads& threads = *static_cast<Threads*>(self);
    check(threads.api.KernelContext_ParallelFor(&threads.context, body, count, 0, argument));
  }
};

// One node of a session.
class Node {
 public:
  Node(const OrtApi& api, const OrtKernelInfo& info) : api_(api) {
    std::string error = configure(read_attributes(api, info), configuration_);
    if (error.empty()) kernel_ = CpuKernel::create(configuration_, {}, error);
    if (kernel_ == nullptr) throw Failure{api.CreateStatus(ORT_INVALID_ARGUMENT, error.c_str())};
  }

  OrtStatus* compute(OrtKernelContext& context) noexcept {
    return guarded(api_, [&] {
      Operands operands;
      std::size_t inputs = 0, outputs = 0;
      check(api_.KernelContext_GetInputCount(&context, &inputs));
      check(api_.KernelContext_GetOutputCount(&context, &outputs));
      for (std::size_t i = 0; i < inputs && i < kInputs; ++i) {
        const OrtValue* value = nullptr;
        check(api_.KernelContext_GetInput(&context, i, &value));
        if (value != nullptr) operands[i] = view(const_cast<OrtValue&>(*value));
      }
      // Outputs have the shapes of inputs; should those be wrong, the kernel's check says so.
      operands[kY] = output(context, kY, operands[kQ]);
      if (configuration_.mode == Mode::kUpdate) {
        operands[kStateOut] = output(context, kStateOut, operands[kState]);
        if (outputs > kStats - kY) {
          Tensor stats = operands[kQ];
          stats.rank = 3;
          stats.shape[2] = kStatCount;
          operands[kStats] = output(context, kStats, stats);
        }
      }
      Threads threads{api_, context};
      const std::string error = kernel_->run(operands, {&Threads::run, &threads});
      if (!error.empty()) throw Failure{api_.CreateStatus(ORT_INVALID_ARGUMENT, error.c_str())};
    });
  }

 private:
  Tensor view(OrtValue& value) const {
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    check(api_.GetTensorTypeAndShape(&value, &raw));
    const Handle<OrtTensorTypeAndShapeInfo> info(raw, api_.ReleaseTensorTypeAndShapeInfo);
    Tensor tensor;
    ONNXTensorElementDataType type;
    std::size_t rank = 0;
    check(api_.GetTensorElementType(raw, &type));
    check(api_.GetDimensionsCount(raw, &rank));
    tensor.dtype = dtype_of(type);
    tensor.rank = static_cast<int>(rank);
    if (rank <= tensor.shape.size()) check(api_.GetDimensions(raw, tensor.shape.data(), rank));
    check(api_.GetTensorMutableData(&value, &tensor.data));
    return tensor;
  }

  // Absent where the node does not want it.
  Tensor output(OrtKernelContext& context, Operand which, const Tensor& like) const {
    if (like.rank < 0 || like.rank > static_cast<int>(like.shape.size())) return {};
    OrtValue* value = nullptr;
    check(api_.KernelContext_GetOutput(&context, which - kY, like.shape.data(), static_cast<std::size_t>(like.rank),
                                       &value));
    if (value == nullptr) return {};
    Tensor tensor = like;
    tensor.dtype = DType::kFloat32;
    check(api_.GetTensorMutableData(value, &tensor.data));
    return tensor;
  }

  const OrtApi& api_;
  Configuration configuration_;
  std::unique_ptr<CpuKernel> kernel_;
};

class NeuralMemoryOp final : public OrtCustomOp {
 public:
  NeuralMemoryOp() : OrtCustomOp{} {
    version = ORT_API_VERSION;
    GetName = [](const OrtCustomOp*) { return "NeuralMemory"; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    GetInputTypeCount = [](const OrtCustomOp*) -> std::size_t { return kInputs; };
    GetInputType = [](const OrtCustomOp*, std::size_t input) {
      switch (input) {
        case kFill:
        case kValid:
        case kSlots:
          return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
        case kLearn:
          return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
        default:
          return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      }
    };
    GetInputCharacteristic = [](const OrtCustomOp*, std::size_t input) {
      return input <= kQ ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp*) -> std::size_t { return kOperands - kY; };
    GetOutputType = [](const OrtCustomOp*, std::size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
    GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t output) {
      return output == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    GetStartVersion = [](const OrtCustomOp*) { return kVersion; };
    GetEndVersion = [](const OrtCustomOp*) { return kVersion; };
    GetMayInplace = [](int** inputs, int** outputs) -> std::size_t {
      static int input = kState, output = kStateOutput;
      *inputs = &input;
      *outputs = &output;
      return 1;
    };
    ReleaseMayInplace = [](int*, int*) {};
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
      return guarded(*api, [&] { *kernel = new Node(*api, *info); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return static_cast<Node*>(kernel)->compute(*context);
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
  }
};

}  // namespace

const OrtCustomOp& neural_memory_op() {
  static const NeuralMemoryOp op;
  return op;
}

}  // namespace titans::plugins
