// What TensorRT's registry looks for in a library of plugins.
#include <exception>
#include <memory>
#include <string>

#include <NvInferRuntime.h>

#include "plugins/tensorrt/logging.h"
#include "plugins/tensorrt/neural_memory_plugin.h"
#include "plugins/tensorrt/node.h"

#define TITANS_EXPORT extern "C" __attribute__((visibility("default")))

namespace titans::plugins {
namespace {

// Stands for the device where there is none, so that a plugin can be asked about its workspace: the least that any
// device of the least architecture has.
constexpr kernels::CudaDevice kNoDevice{80, 1, 48 * 1024};

class NeuralMemoryCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  nvinfer1::IPluginV3* createPlugin(const char* /*name*/, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    try {
      Node node;
      const std::string problem =
          fields == nullptr ? wrong("fields", "none", "give the node's attributes") : read_fields(*fields, node);
      if (!problem.empty()) {
        log_error(problem.c_str());
        return nullptr;
      }
      if (phase == nvinfer1::TensorRTPhase::kBUILD && !kernels::CudaDevice::current(node.built_for).empty()) {
        node.built_for = kNoDevice;
      }
      return std::make_unique<NeuralMemoryPlugin>(node).release();
    } catch (const std::exception& error) {
      log_error(error.what());
    } catch (...) {
      log_error("[NeuralMemory] expected no exception but got one of an unknown type; do report it");
    }
    return nullptr;
  }

  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &NodeFields::names(); }
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
