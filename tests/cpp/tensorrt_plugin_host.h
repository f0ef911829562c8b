// Loads a plugin library and calls the plugin like TensorRT's builder and runtime do.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "tensorrt_plugin_fields.h"

namespace titans::plugin_host {

using Plugin = std::unique_ptr<nvinfer1::IPluginV3>;

// A library in the registry's hands: loaded, given a logger, and queried for its creators.
class Library {
 public:
  // Throws if the library does not load or lacks ai.titans' NeuralMemory.
  explicit Library(const std::string& path);
  ~Library();
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  nvinfer1::IPluginCreatorV3One& creator() const { return *creator_; }
  // A symbol of the library. symbol() throws if it is missing, find() returns null.
  void* symbol(const char* name) const;
  void* find(const char* name) const;
  // The messages logged since the last call, one per line.
  std::string messages() const;

 private:
  struct Logger;
  void* handle_ = nullptr;
  std::unique_ptr<Logger> logger_;
  nvinfer1::IPluginCreatorV3One* creator_ = nullptr;
};

// The result of building: the engine's fields, and the properties that the builder learned.
struct Built {
  Fields engine;
  std::vector<nvinfer1::DataType> output_types;
  std::vector<std::vector<std::int64_t>> most_outputs;  // shapes for the largest inputs
  std::vector<std::int32_t> aliases;                    // per output
  std::size_t workspace = 0;
  std::string timing_cache_id;
};

// Runs the builder's calls: create, capabilities, clone, types, shapes, formats, configure, workspace, the typical
// shape, serialize. Throws with the failed step and the logged messages. `device`: whether a device is present. Without
// one, no plugin can be prepared to run.
Built build(const Library& library, Fields fields, const std::vector<Range>& inputs, bool device);

// An engine's execution context: creates the plugin from the engine's fields and attaches a copy.
class Context {
 public:
  Context(const Library& library, Fields engine);

  // Makes a shape change, unless `in` and `out` are unchanged. Returns the plugin's result.
  std::int32_t prepare(const std::vector<nvinfer1::PluginTensorDesc>& in,
                       const std::vector<nvinfer1::PluginTensorDesc>& out);
  // Prepares and enqueues.
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
