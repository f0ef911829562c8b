// Finds the nodes of a graph that may update a state in place, and checks the kernel's nodes.
#pragma once

#include <cstddef>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "backends/onnxruntime/graph_nodes.h"

namespace titans::core {

// Throws an Error, naming `file_name`, if any NeuralMemory node has an attribute that the kernel lacks. ONNX Runtime
// drops such attributes silently.
void check_memory_attributes(const GraphNodes& graph, std::string_view file_name);

// The number of NeuralMemory nodes in a session that runs them on the kernel.
std::size_t count_memory_nodes(const GraphNodes& graph);

// Decides whether a graph input and output may share a buffer.
//
// Our operators that own a part of the state may write over it, and ScatterElements and ScatterND, for which ONNX
// Runtime itself allows it. In addition, no other node may read the old state after it is overwritten.
class StateFlow {
 public:
  // `graph` must outlive this object. `caches`: the session has kernels of CachedAttention and CausalConvolution. Their
  // function bodies may read a cache after they have written to it.
  explicit StateFlow(const GraphNodes& graph, bool caches = true);

  // True if `input` and `output` may share a buffer in every execution order.
  bool in_place(std::string_view input, std::string_view output) const;

 private:
  using Users = std::unordered_map<std::string_view, std::vector<const Node*>>;
  using Nodes = std::unordered_set<const Node*>;

  const Node* producer(std::string_view value) const;
  bool leads_to(std::string_view input, const Node& writer, std::size_t state) const;
  Nodes before(const Node& writer) const;
  bool readers_come_first(std::string_view input, const Node& writer, std::size_t state) const;

  bool caches_;
  std::vector<std::string_view> outputs_;
  Users makers_;
  Users readers_;
};

}  // namespace titans::core
