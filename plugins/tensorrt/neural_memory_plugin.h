// ai.titans::NeuralMemory as a TensorRT plugin: describes the operator to the builder and passes tensors to the CUDA
// kernel. See docs/tensorrt-plugin.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include <NvInferRuntime.h>

#include "plugins/kernels/neural_memory_cuda.h"
#include "plugins/tensorrt/plugin_attributes.h"

namespace titans::plugins {

inline constexpr const char* kPluginName = "NeuralMemory";
inline constexpr const char* kPluginNamespace = "ai.titans";
inline constexpr const char* kPluginVersion = "1";

class NeuralMemoryPlugin final : public nvinfer1::IPluginV3,
                                 public nvinfer1::IPluginV3OneCore,
                                 public nvinfer1::IPluginV3OneBuildV2,
                                 public nvinfer1::IPluginV3OneRuntime {
 public:
  using PluginTensorDesc = nvinfer1::PluginTensorDesc;
  using DynamicPluginTensorDesc = nvinfer1::DynamicPluginTensorDesc;

  explicit NeuralMemoryPlugin(const PluginAttributes& attributes);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  std::int32_t configurePlugin(const DynamicPluginTensorDesc* in, std::int32_t in_count,
                               const DynamicPluginTensorDesc* out, std::int32_t out_count) noexcept override;
  std::int32_t getOutputDataTypes(nvinfer1::DataType* out, std::int32_t out_count, const nvinfer1::DataType* in,
                                  std::int32_t in_count) const noexcept override;
  std::int32_t getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t in_count,
                               const nvinfer1::DimsExprs* shape_inputs, std::int32_t shape_input_count,
                               nvinfer1::DimsExprs* out, std::int32_t out_count,
                               nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(std::int32_t position, const DynamicPluginTensorDesc* in_out, std::int32_t in_count,
                                 std::int32_t out_count) noexcept override;
  std::int32_t getNbOutputs() const noexcept override;
  std::size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, std::int32_t in_count,
                               const DynamicPluginTensorDesc* out, std::int32_t out_count) const noexcept override;
  const char* getTimingCacheID() noexcept override { return fields_.text().c_str(); }
  const char* getMetadataString() noexcept override { return fields_.text().c_str(); }
  std::int32_t getAliasedInput(std::int32_t output) noexcept override;

  std::int32_t onShapeChange(const PluginTensorDesc* in, std::int32_t in_count, const PluginTensorDesc* out,
                             std::int32_t out_count) noexcept override;
  std::int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* inputs,
                       void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &fields_.collection(); }

 private:
  std::string check_counts(std::int32_t in_count, std::int32_t out_count) const;
  // Checks ranks, shapes and dtypes, with placeholder addresses that are never read.
  std::string check_descriptions(const PluginTensorDesc* in, const PluginTensorDesc* out) const;
  // Makes the kernel for this device, and checks that the engine has reserved enough workspace.
  std::string prepare(const PluginTensorDesc& q);

  PluginAttributes attributes_;
  PluginFields fields_;
  // Shared by clones; the kernel is thread-safe.
  std::shared_ptr<const kernels::CudaKernel> kernel_;
  kernels::DType values_ = kernels::DType::kOther;
};

}  // namespace titans::plugins
