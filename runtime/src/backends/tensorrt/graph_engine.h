// One graph of the bundle as a deserialised engine with weights and kernels on the device.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backends/tensorrt/vendor.h"
#include "bundle/bundle.h"

namespace titans::core {

class GraphEngine {
 public:
  // Checks names, types and shapes of inputs and outputs against the manifest. All arguments must outlive the engine.
  GraphEngine(nvinfer1::IRuntime& runtime, const Bundle& bundle, const EngineGraph& graph);

  const Graph& graph() const { return graph_; }
  // True if the engine reads this input from host memory to compute shapes while it enqueues work. Such work cannot be
  // captured.
  bool on_host(const std::string& input) const;
  bool any_on_host() const { return !on_host_.empty(); }

  // Makes a context with its scratch memory. Each context is for one thread at a time.
  std::unique_ptr<nvinfer1::IExecutionContext> make_context();

 private:
  const Graph& graph_;
  std::string file_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<std::string> on_host_;
};

}  // namespace titans::core
