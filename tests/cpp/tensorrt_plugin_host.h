// Plays TensorRT to a plugin library: loads it, and calls the plugin as the builder and then the runtime do.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "tensorrt_plugin_fields.h"

namespace titans::plugin_host {

using Plugin = std::unique_ptr<nvinfer1::IPluginV3>;

// A library as the registry holds it: opened, given a logger, asked for its creators.
class Library {
 public:
  // Throws where it does not load or has no NeuralMemory of ai.titans.
  explicit Library(const std::string& path);
  ~Library();
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  nvinfer1::IPluginCreatorV3One& creator() const { return *creator_; }
  // What the library exports. Throws where it does not; find returns null.
  void* symbol(const char* name) const;
  void* find(const char* name) const;
  // What was logged since the last time, one line each.
  std::string messages() const;

 private:
  struct Logger;
  void* handle_ = nullptr;
  std::unique_ptr<Logger> logger_;
  nvinfer1::IPluginCreatorV3One* creator_ = nullptr;
};

// What comes out of building: what an engine would hold and what the builder was told.
struct Built {
  Fields engine;
  std::vector<nvinfer1::DataType> output_types;
  std::vector<std::vector<std::int64_t>> most_outputs;  // shapes, for the inputs' most
  std::vector<std::int32_t> aliases;                    // of each output
  std::size_t workspace = 0;
  std::string timing_cache_id;
};

// Goes through the builder's calls: create, capabilities, clone, types, shapes, formats, configure, workspace, the
// typical shape, serialise. Throws with the step that failed and what was logged. `device`: whether there is one,
// without which no plugin can be prepared to run.
Built build(const Library& library, Fields fields, const std::vector<Range>& inputs, bool device);

// An execution context of an engine: creates the plugin from the engine's fields and attaches a copy.
class Context {
 public:
  Context(const Library& library, Fields engine);

  // A shape change, unless `in` and `out` are those of the last one. Returns what the plugin returned.
  std::int32_t prepare(const std::vector<nvinfer1::PluginTensorDesc>& in,
                       const std::vector<nvinfer1::PluginTensorDesc>& out);
  // That and enqueue.
  std::int32_t run(const std::vector<nvinfer1::PluginTensorDesc>& in,
                   const std::vector<nvinfer1::PluginTensorDesc>& out, const std::vector<const void*>& inputs,
                   const std::vector<void*>& outputs, void* workspace, cudaStream_t stream);
  nvinfer1::IPluginV3OneRuntime& runtime() const { return *runtime_; }

 private:
  Plugin plugin_, attached_;
  nvinfer1::IPluginV3OneRuntime* runtime_ = nullptr;
  std::vector<nvinfer1::PluginTensorDesc> last_;
};

}  // namespace titans::plugin_host
