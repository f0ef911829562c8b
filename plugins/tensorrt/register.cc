// The entry points of a plugin library for TensorRT's registry.
#include <exception>
#include <memory>
#include <string>

#include <NvInferRuntime.h>

#include "plugins/tensorrt/logging.h"
#include "plugins/tensorrt/neural_memory_plugin.h"
#include "plugins/tensorrt/plugin_attributes.h"

#define TITANS_EXPORT extern "C" __attribute__((visibility("default")))

namespace titans::plugins {
namespace {

// Without a device, the workspace is computed for the smallest device of the oldest architecture.
constexpr kernels::CudaDevice kNoDevice{80, 1, 48 * 1024};

class NeuralMemoryCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  nvinfer1::IPluginV3* createPlugin(const char* /*name*/, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    try {
      PluginAttributes attributes;
      const std::string problem = fields == nullptr
                                      ? kernels::failure("NeuralMemory", "E0703", "missing attribute: no plugin fields",
                                                         "give the node's attributes")
                                      : read_fields(*fields, attributes);
      if (!problem.empty()) {
        log_error(problem.c_str());
        return nullptr;
      }
      if (phase == nvinfer1::TensorRTPhase::kBUILD && !kernels::CudaDevice::current(attributes.built_for).empty()) {
        attributes.built_for = kNoDevice;
      }
      return std::make_unique<NeuralMemoryPlugin>(attributes).release();
    } catch (const std::exception& error) {
      log_error(error.what());
    } catch (...) {
      log_error(kernels::failure("NeuralMemory", "E1003", "internal error: an unknown exception", "report it").c_str());
    }
    return nullptr;
  }

  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &PluginFields::names(); }
  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
};

}  // namespace
}  // namespace titans::plugins

TITANS_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
  static titans::plugins::NeuralMemoryCreator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}

TITANS_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { titans::plugins::set_logger_finder(finder); }
