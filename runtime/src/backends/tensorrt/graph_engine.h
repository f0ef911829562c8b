// One graph of the bundle as the vendor's compiler made it, deserialised: weights and kernels on the device.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backends/tensorrt/vendor.h"
#include "bundle/bundle.h"

namespace titans::core {

class GraphEngine {
 public:
  // Compares names, types and shapes of inputs and outputs with the manifest. All of it outlives the engine.
  GraphEngine(nvinfer1::IRuntime& runtime, const Bundle& bundle, const EngineGraph& graph);

  const Graph& graph() const { return graph_; }
  // Whether the tokens or vectors, the position or the flag is wanted in host memory: the vendor computes shapes from
  // it while work is enqueued, so such work cannot be recorded.
  bool on_host(const std::string& input) const;
  bool any_on_host() const { return !on_host_.empty(); }

  // With the scratch memory that it needs. Any number of them, each for one thread at a time.
  std::unique_ptr<nvinfer1::IExecutionContext> make_context();

 private:
  const Graph& graph_;
  std::string file_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<std::string> on_host_;
};

}  // namespace titans::core
