// A fake plugin library. It lists a creator of NeuralMemory that creates nothing.
#include <NvInferRuntime.h>

#ifndef FAKE_PLUGIN_VERSION
#define FAKE_PLUGIN_VERSION "1"
#endif

namespace {

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection*,
                                    nvinfer1::TensorRTPhase) noexcept override {
    return nullptr;
  }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return nullptr; }
  const char* getPluginName() const noexcept override { return "NeuralMemory"; }
  const char* getPluginVersion() const noexcept override { return FAKE_PLUGIN_VERSION; }
  const char* getPluginNamespace() const noexcept override { return "ai.titans"; }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    std::int32_t& count) {
  static Creator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}
