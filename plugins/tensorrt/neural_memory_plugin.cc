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

constexpr std::int32_t kDone = 0, kFailed = 1;
constexpr std::int64_t kStateRank = 3, kValuesRank = 4;

// Runs `body`, which returns what is wrong: nothing may be thrown into TensorRT.
template <typename Body>
std::int32_t guarded(Body&& body) noexcept {
  try {
    const std::string problem = body();
    if (problem.empty()) return kDone;
    log_error(problem.c_str());
  } catch (const std::exception& error) {
    log_error(error.what());
  } catch (...) {
    log_error("[NeuralMemory] expected no exception but got one of an unknown type; do report it");
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

NeuralMemoryPlugin::NeuralMemoryPlugin(const Node& node) : node_(node), fields_(node_) {}

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
    auto made = std::make_unique<NeuralMemoryPlugin>(node_);
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

// ---- what the builder asks ----

std::int32_t NeuralMemoryPlugin::getNbOutputs() const noexcept {
  return static_cast<std::int32_t>(node_.outputs.size());
}

std::int32_t NeuralMemoryPlugin::getAliasedInput(std::int32_t output) noexcept {
  if (node_.alias != Alias::kDeclared || output < 0 || output != node_.output(kStateOut)) return -1;
  return node_.input(kState);
}

std::int32_t NeuralMemoryPlugin::getOutputDataTypes(DataType* out, std::int32_t out_count, const DataType* in,
                                                    std::int32_t in_count) const noexcept {
  return guarded([&] {
    std::string problem = check_counts(in_count, out_count);
    if (!problem.empty()) return problem;
    const DataType q = in[node_.input(kQ)];
    if (!type_fits(kQ, q, q)) return wrong("q of float32, float16 or bfloat16", "another type", "cast it");
    for (std::size_t i = 0; i < node_.outputs.size(); ++i) out[i] = node_.outputs[i] == kY ? q : DataType::kFLOAT;
    return std::string();
  });
}

std::int32_t NeuralMemoryPlugin::getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t in_count,
                                                 const nvinfer1::DimsExprs*, std::int32_t, nvinfer1::DimsExprs* out,
                                                 std::int32_t out_count, nvinfer1::IExprBuilder& builder) noexcept {
  return guarded([&] {
    std::string problem = check_counts(in_count, out_count);
    if (!problem.empty()) return problem;
    const nvinfer1::DimsExprs &state = in[node_.input(kState)], &q = in[node_.input(kQ)];
    const auto expect = [&](const char* what, std::int64_t expected, std::int64_t got) {
      if (problem.empty() && expected != got) {
        problem = wrong(std::string(what) + " " + std::to_string(expected), std::to_string(got),
                        "check the model's widths, heads and chunk size");
      }
    };
    const auto expect_last = [&](const char* what, const nvinfer1::DimsExprs& dims, std::int64_t expected) {
      if (!problem.empty()) return;
      const nvinfer1::IDimensionExpr& last = *dims.d[dims.nbDims - 1];
      if (last.isConstant()) expect(what, expected, last.getConstantValue());
    };
    expect("state of rank", kStateRank, state.nbDims);
    expect("q of rank", kValuesRank, q.nbDims);
    expect_last("state of rows of", state, RowLayout(node_.configuration).size);
    expect_last("q of width", q, node_.configuration.widths[0]);
    if (!problem.empty()) return problem;
    for (std::size_t i = 0; i < node_.outputs.size(); ++i) {
      switch (node_.outputs[i]) {
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
        position < in_count ? node_.inputs[at] : node_.outputs[at - static_cast<std::size_t>(in_count)];
    const PluginTensorDesc& tensor = in_out[position].desc;
    // What stands behind `position` is not set; q stands before all that are to be as it is.
    const DataType q = operand < kQ ? DataType::kFLOAT : in_out[node_.input(kQ)].desc.type;
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
    // With sizes left open they are checked when they are known.
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
    const DynamicPluginTensorDesc& q = in[node_.input(kQ)];
    const std::unique_ptr<CudaKernel> kernel =
        CudaKernel::create(node_.configuration, dtype_of(q.desc.type), node_.built_for, problem);
    if (kernel == nullptr) return problem;
    bytes = kernel->workspace_bytes(q.max.d[0], q.max.d[1], q.max.d[2]);
    const int learn = node_.input(kLearn);
    if (learn >= 0) bytes += learn_bytes(in[learn].desc.type, q.max.d[0]);
    // TensorRT promises no alignment.
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
    if (problem.empty()) problem = prepare(in[node_.input(kQ)]);
    return problem;
  });
}

std::int32_t NeuralMemoryPlugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out,
                                         const void* const* inputs, void* const* outputs, void* workspace,
                                         cudaStream_t stream) noexcept {
  return guarded([&] {
    const PluginTensorDesc& q = in[node_.input(kQ)];
    if (kernel_ == nullptr || values_ != dtype_of(q.type)) {
      std::string problem = prepare(q);
      if (!problem.empty()) return problem;
    }
    Operands operands;
    for (std::size_t i = 0; i < node_.inputs.size(); ++i) {
      operands[node_.inputs[i]] = tensor_of(in[i], const_cast<void*>(inputs[i]));
    }
    for (std::size_t i = 0; i < node_.outputs.size(); ++i) operands[node_.outputs[i]] = tensor_of(out[i], outputs[i]);
    if (node_.alias == Alias::kTwoBuffers && operands[kStateOut].present() &&
        operands[kStateOut].data == operands[kState].data) {
      return wrong("state and state_out in two buffers", "one",
                   "bind two, or build the engine with alias \"declared\" or \"undeclared\"");
    }
    auto* free = reinterpret_cast<char*>(align_up(reinterpret_cast<std::uintptr_t>(workspace)));
    const int learn = node_.input(kLearn);
    if (learn >= 0 && in[learn].type != DataType::kBOOL) {
      operands[kLearn].dtype = DType::kBool;
      const std::int64_t streams = q.dims.d[0];
      if (const std::size_t bytes = learn_bytes(in[learn].type, streams); bytes > 0) {
        operands[kLearn].data = free;
        free += bytes;
        const cudaError_t failure =
            cudaMemcpy2DAsync(operands[kLearn].data, sizeof(bool), inputs[learn], learn_pitch(in[learn].type),
                              sizeof(bool), static_cast<std::size_t>(streams), cudaMemcpyDeviceToDevice, stream);
        if (failure != cudaSuccess) {
          return wrong("to copy learn", cudaGetErrorString(failure), "look for the call before this one that failed");
        }
      }
    }
    return kernel_->run(operands, free, nullptr, stream);
  });
}

// ---- checks ----

std::string NeuralMemoryPlugin::check_counts(std::int32_t in_count, std::int32_t out_count) const {
  const auto inputs = static_cast<std::int32_t>(node_.inputs.size()), outputs = getNbOutputs();
  if (in_count == inputs && out_count == outputs) return {};
  return wrong(std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs, as its fields say",
               std::to_string(in_count) + " and " + std::to_string(out_count), "connect what its fields name");
}

std::string NeuralMemoryPlugin::check_descriptions(const PluginTensorDesc* in, const PluginTensorDesc* out) const {
  Operands operands;
  std::uintptr_t address = kAlignment;
  const auto place = [&](Operand operand, const PluginTensorDesc& description) {
    Tensor& tensor = operands[operand];
    tensor = tensor_of(description, reinterpret_cast<void*>(address));
    if (operand == kLearn && type_fits(kLearn, description.type, description.type)) tensor.dtype = DType::kBool;
    // Of 8 bytes each, the most that any type has.
    if (tensor.rank <= static_cast<int>(tensor.shape.size())) {
      address += align_up(static_cast<std::size_t>(tensor.elements()) * 8) + kAlignment;
    }
  };
  for (std::size_t i = 0; i < node_.inputs.size(); ++i) place(node_.inputs[i], in[i]);
  for (std::size_t i = 0; i < node_.outputs.size(); ++i) place(node_.outputs[i], out[i]);
  const DataType q = in[node_.input(kQ)].type;
  return check_operands(node_.configuration, operands, type_fits(kQ, q, q) ? dtype_of(q) : DType::kFloat32);
}

std::string NeuralMemoryPlugin::prepare(const PluginTensorDesc& q) {
  CudaDevice device;
  std::string problem = CudaDevice::current(device);
  if (!problem.empty()) return problem;
  const DType values = dtype_of(q.type);
  std::shared_ptr<const CudaKernel> kernel = kernel_;
  if (kernel == nullptr || values_ != values) {
    kernel = CudaKernel::create(node_.configuration, values, device, problem);
    if (kernel == nullptr) return problem;
  }
  // An engine may be opened on another device than it was built on, and a kernel spreads its work by the device.
  if (node_.built_for.sm != 0 && !same(node_.built_for, device)) {
    const std::unique_ptr<CudaKernel> builder =
        CudaKernel::create(node_.configuration, values, node_.built_for, problem);
    if (builder == nullptr) return problem;
    const auto need = [&](const CudaKernel& it) { return it.workspace_bytes(q.dims.d[0], q.dims.d[1], q.dims.d[2]); };
    if (need(*kernel) > need(*builder)) {
      return wrong("a device that needs no more than the " + std::to_string(need(*builder)) +
                       " bytes of workspace that the engine has for " + name_of(node_.built_for),
                   name_of(device) + ", which needs " + std::to_string(need(*kernel)),
                   "build the engine on this device");
    }
  }
  kernel_ = std::move(kernel);
  values_ = values;
  return {};
}

}  // namespace titans::plugins
