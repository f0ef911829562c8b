#include "plugins/tensorrt/neural_memory_plugin.h"

#include <exception>
#include <utility>

#include <cuda_runtime_api.h>

#include "plugins/tensorrt/logging.h"
#include "plugins/tensorrt/tensors.h"

namespace titans::plugins {
namespace {

using namespace titans::kernels;
using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr const char* kOperator = Configuration::kOperator;
constexpr std::int32_t kDone = 0, kFailed = 1;
constexpr std::int64_t kStateRank = 3, kValuesRank = 4;

// Runs `body`, which returns an error or an empty string, and catches exceptions, because TensorRT does not.
template <typename Body>
std::int32_t guarded(Body&& body) noexcept {
  try {
    const std::string problem = body();
    if (problem.empty()) return kDone;
    log_error(problem.c_str());
  } catch (const std::exception& error) {
    log_error(error.what());
  } catch (...) {
    log_error(failure(kOperator, "E1003", "internal error: an unknown exception", "report it").c_str());
  }
  return kFailed;
}

bool concrete(const PluginTensorDesc& description) {
  for (std::int32_t i = 0; i < description.dims.nbDims; ++i) {
    if (description.dims.d[i] < 0) return false;
  }
  return true;
}

bool same(const CudaDevice& a, const CudaDevice& b) {
  return a.sm == b.sm && a.multiprocessors == b.multiprocessors && a.shared_bytes == b.shared_bytes;
}

std::string name_of(const CudaDevice& device) {
  return "sm_" + std::to_string(device.sm) + " with " + std::to_string(device.multiprocessors) + " multiprocessors";
}

}  // namespace

NeuralMemoryPlugin::NeuralMemoryPlugin(const PluginAttributes& attributes)
    : attributes_(attributes), fields_(attributes_) {}

nvinfer1::IPluginCapability* NeuralMemoryPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* NeuralMemoryPlugin::clone() noexcept {
  NeuralMemoryPlugin* copy = nullptr;
  guarded([&] {
    auto made = std::make_unique<NeuralMemoryPlugin>(attributes_);
    made->kernel_ = kernel_;
    made->values_ = values_;
    copy = made.release();
    return std::string();
  });
  return copy;
}

nvinfer1::IPluginV3* NeuralMemoryPlugin::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept {
  return clone();
}

// ---- building ----

std::int32_t NeuralMemoryPlugin::getNbOutputs() const noexcept {
  return static_cast<std::int32_t>(attributes_.outputs.size());
}

std::int32_t NeuralMemoryPlugin::getAliasedInput(std::int32_t output) noexcept {
  if (attributes_.alias != Alias::kDeclared || output < 0 || output != attributes_.output(kStateOut)) return -1;
  return attributes_.input(kState);
}

std::int32_t NeuralMemoryPlugin::getOutputDataTypes(DataType* out, std::int32_t out_count, const DataType* in,
                                                    std::int32_t in_count) const noexcept {
  return guarded([&] {
    std::string problem = check_counts(in_count, out_count);
    if (!problem.empty()) return problem;
    const DataType q = in[attributes_.input(kQ)];
    if (!type_fits(kQ, q, q)) {
      return failure(kOperator, "E0705", "wrong dtype of q: expected float32, float16 or bfloat16, got another type",
                     "cast it");
    }
    for (std::size_t i = 0; i < attributes_.outputs.size(); ++i)
      out[i] = attributes_.outputs[i] == kY ? q : DataType::kFLOAT;
    return std::string();
  });
}

std::int32_t NeuralMemoryPlugin::getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t in_count,
                                                 const nvinfer1::DimsExprs*, std::int32_t, nvinfer1::DimsExprs* out,
                                                 std::int32_t out_count, nvinfer1::IExprBuilder& builder) noexcept {
  return guarded([&] {
    std::string problem = check_counts(in_count, out_count);
    if (!problem.empty()) return problem;
    const nvinfer1::DimsExprs &state = in[attributes_.input(kState)], &q = in[attributes_.input(kQ)];
    const auto expect = [&](const char* what, std::int64_t wanted, std::int64_t got) {
      if (!problem.empty() || wanted == got) return;
      problem = failure(kOperator, "E0706",
                        std::string("wrong ") + what + ": " + expected(std::to_string(wanted), std::to_string(got)),
                        "check the model's sizes");
    };
    const auto expect_last = [&](const char* what, const nvinfer1::DimsExprs& dims, std::int64_t wanted) {
      if (!problem.empty()) return;
      const nvinfer1::IDimensionExpr& last = *dims.d[dims.nbDims - 1];
      if (last.isConstant()) expect(what, wanted, last.getConstantValue());
    };
    expect("rank of state", kStateRank, state.nbDims);
    expect("rank of q", kValuesRank, q.nbDims);
    expect_last("row size of state", state, RowLayout(attributes_.configuration).size);
    expect_last("width of q", q, attributes_.configuration.widths[0]);
    if (!problem.empty()) return problem;
    for (std::size_t i = 0; i < attributes_.outputs.size(); ++i) {
      switch (attributes_.outputs[i]) {
        case kY:
          out[i] = q;
          break;
        case kStateOut:
          out[i] = state;
          break;
        default:  // stats
          out[i].nbDims = 3;
          out[i].d[0] = q.d[0];
          out[i].d[1] = q.d[1];
          out[i].d[2] = builder.constant(kStatCount);
      }
    }
    return std::string();
  });
}

bool NeuralMemoryPlugin::supportsFormatCombination(std::int32_t position, const DynamicPluginTensorDesc* in_out,
                                                   std::int32_t in_count, std::int32_t out_count) noexcept {
  bool fits = false;
  guarded([&] {
    std::string problem = check_counts(in_count, out_count);
    if (!problem.empty() || position < 0 || position >= in_count + out_count) return problem;
    const auto at = static_cast<std::size_t>(position);
    const Operand operand =
        position < in_count ? attributes_.inputs[at] : attributes_.outputs[at - static_cast<std::size_t>(in_count)];
    const PluginTensorDesc& tensor = in_out[position].desc;
    // Tensors after `position` are not set. q comes before all tensors that must have its dtype.
    const DataType q = operand < kQ ? DataType::kFLOAT : in_out[attributes_.input(kQ)].desc.type;
    fits = tensor.format == nvinfer1::TensorFormat::kLINEAR && type_fits(operand, tensor.type, q);
    return std::string();
  });
  return fits;
}

std::int32_t NeuralMemoryPlugin::configurePlugin(const DynamicPluginTensorDesc* in, std::int32_t in_count,
                                                 const DynamicPluginTensorDesc* out, std::int32_t out_count) noexcept {
  return guarded([&] {
    std::string problem = check_counts(in_count, out_count);
    if (!problem.empty()) return problem;
    std::vector<PluginTensorDesc> tensors;
    for (std::int32_t i = 0; i < in_count; ++i) tensors.push_back(in[i].desc);
    for (std::int32_t i = 0; i < out_count; ++i) tensors.push_back(out[i].desc);
    // Dynamic sizes are checked once they are known.
    for (const PluginTensorDesc& tensor : tensors) {
      if (!concrete(tensor)) return std::string();
    }
    return check_descriptions(tensors.data(), tensors.data() + in_count);
  });
}

std::size_t NeuralMemoryPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, std::int32_t in_count,
                                                 const DynamicPluginTensorDesc* /*out*/,
                                                 std::int32_t out_count) const noexcept {
  std::size_t bytes = 0;
  guarded([&] {
    std::string problem = check_counts(in_count, out_count);
    if (!problem.empty()) return problem;
    const DynamicPluginTensorDesc& q = in[attributes_.input(kQ)];
    const std::unique_ptr<CudaKernel> kernel =
        CudaKernel::create(attributes_.configuration, dtype_of(q.desc.type), attributes_.built_for, problem);
    if (kernel == nullptr) return problem;
    bytes = kernel->workspace_bytes(q.max.d[0], q.max.d[1], q.max.d[2]);
    const int learn = attributes_.input(kLearn);
    if (learn >= 0) bytes += learn_bytes(in[learn].desc.type, q.max.d[0]);
    // TensorRT does not guarantee alignment.
    if (bytes > 0) bytes += kAlignment;
    return std::string();
  });
  return bytes;
}

// ---- running ----

std::int32_t NeuralMemoryPlugin::onShapeChange(const PluginTensorDesc* in, std::int32_t in_count,
                                               const PluginTensorDesc* out, std::int32_t out_count) noexcept {
  return guarded([&] {
    std::string problem = check_counts(in_count, out_count);
    if (problem.empty()) problem = check_descriptions(in, out);
    if (problem.empty()) problem = prepare(in[attributes_.input(kQ)]);
    return problem;
  });
}

std::int32_t NeuralMemoryPlugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out,
                                         const void* const* inputs, void* const* outputs, void* workspace,
                                         cudaStream_t stream) noexcept {
  return guarded([&] {
    const PluginTensorDesc& q = in[attributes_.input(kQ)];
    if (kernel_ == nullptr || values_ != dtype_of(q.type)) {
      std::string problem = prepare(q);
      if (!problem.empty()) return problem;
    }
    Operands operands;
    for (std::size_t i = 0; i < attributes_.inputs.size(); ++i) {
      operands[attributes_.inputs[i]] = tensor_of(in[i], const_cast<void*>(inputs[i]));
    }
    for (std::size_t i = 0; i < attributes_.outputs.size(); ++i)
      operands[attributes_.outputs[i]] = tensor_of(out[i], outputs[i]);
    if (attributes_.alias == Alias::kTwoBuffers && operands[kStateOut].present() &&
        operands[kStateOut].data == operands[kState].data) {
      return failure(kOperator, "E0708", "overlapping buffers: state and state_out with alias \"two-buffers\"",
                     "bind two buffers, or build the engine with alias \"declared\" or \"undeclared\"");
    }
    auto* free = reinterpret_cast<char*>(align_up(reinterpret_cast<std::uintptr_t>(workspace)));
    const int learn = attributes_.input(kLearn);
    if (learn >= 0 && in[learn].type != DataType::kBOOL) {
      operands[kLearn].dtype = DType::kBool;
      const std::int64_t streams = q.dims.d[0];
      if (const std::size_t bytes = learn_bytes(in[learn].type, streams); bytes > 0) {
        operands[kLearn].data = free;
        free += bytes;
        const cudaError_t copied =
            cudaMemcpy2DAsync(operands[kLearn].data, sizeof(bool), inputs[learn], learn_pitch(in[learn].type),
                              sizeof(bool), static_cast<std::size_t>(streams), cudaMemcpyDeviceToDevice, stream);
        if (copied != cudaSuccess) {
          return failure(kOperator, "E0713",
                         std::string("CUDA call failed: copy of learn: ") + cudaGetErrorString(copied),
                         "look for an earlier call that failed");
        }
      }
    }
    return kernel_->run(operands, free, nullptr, stream);
  });
}

// ---- checks ----

std::string NeuralMemoryPlugin::check_counts(std::int32_t in_count, std::int32_t out_count) const {
  const auto inputs = static_cast<std::int32_t>(attributes_.inputs.size()), outputs = getNbOutputs();
  if (in_count == inputs && out_count == outputs) return {};
  return failure(kOperator, "E0714",
                 "invalid plugin field inputs or outputs: " +
                     expected(std::to_string(in_count) + " and " + std::to_string(out_count) + " names",
                              std::to_string(inputs) + " and " + std::to_string(outputs)),
                 "connect the tensors that the fields name");
}

std::string NeuralMemoryPlugin::check_descriptions(const PluginTensorDesc* in, const PluginTensorDesc* out) const {
  Operands operands;
  std::uintptr_t address = kAlignment;
  const auto place = [&](Operand operand, const PluginTensorDesc& description) {
    Tensor& tensor = operands[operand];
    tensor = tensor_of(description, reinterpret_cast<void*>(address));
    if (operand == kLearn && type_fits(kLearn, description.type, description.type)) tensor.dtype = DType::kBool;
    // 8 bytes per element, the largest size of any dtype.
    if (tensor.rank <= static_cast<int>(tensor.shape.size())) {
      address += align_up(static_cast<std::size_t>(tensor.elements()) * 8) + kAlignment;
    }
  };
  for (std::size_t i = 0; i < attributes_.inputs.size(); ++i) place(attributes_.inputs[i], in[i]);
  for (std::size_t i = 0; i < attributes_.outputs.size(); ++i) place(attributes_.outputs[i], out[i]);
  const DataType q = in[attributes_.input(kQ)].type;
  return check_operands(attributes_.configuration, operands, type_fits(kQ, q, q) ? dtype_of(q) : DType::kFloat32);
}

std::string NeuralMemoryPlugin::prepare(const PluginTensorDesc& q) {
  CudaDevice device;
  std::string problem = CudaDevice::current(device);
  if (!problem.empty()) return problem;
  const DType values = dtype_of(q.type);
  std::shared_ptr<const CudaKernel> kernel = kernel_;
  if (kernel == nullptr || values_ != values) {
    kernel = CudaKernel::create(attributes_.configuration, values, device, problem);
    if (kernel == nullptr) return problem;
  }
  // An engine may be opened on another device than it was built for, and the kernel's plan depends on the device.
  if (attributes_.built_for.sm != 0 && !same(attributes_.built_for, device)) {
    const std::unique_ptr<CudaKernel> builder =
        CudaKernel::create(attributes_.configuration, values, attributes_.built_for, problem);
    if (builder == nullptr) return problem;
    const auto need = [&](const CudaKernel& it) { return it.workspace_bytes(q.dims.d[0], q.dims.d[1], q.dims.d[2]); };
    if (need(*kernel) > need(*builder)) {
      return failure(kOperator, "E0712",
                     "not supported on this device: " + name_of(device) + " needs " + std::to_string(need(*kernel)) +
                         " bytes of workspace, the engine has " + std::to_string(need(*builder)) + " for " +
                         name_of(attributes_.built_for),
                     "build the engine on this device");
    }
  }
  kernel_ = std::move(kernel);
  values_ = values;
  return {};
}

}  // namespace titans::plugins
