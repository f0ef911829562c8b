// The nodes of a graph that write a state: which of them are right on one buffer, and what our kernel takes of its own.
#pragma once

#include <cstddef>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "backends/onnxruntime/graph_nodes.h"

namespace titans::core {

// Throws an Error that names `file_name` where a NeuralMemory node, wherever it stands, has an attribute that the
// kernel does not know: ONNX Runtime drops such attributes without a word.
void check_memory_attributes(const GraphNodes& graph, std::string_view file_name);

// How many NeuralMemory nodes a session on the graph has, when it runs them on the kernel.
std::size_t count_memory_nodes(const GraphNodes& graph);

// Answers whether one buffer may be input and output of a graph. Two operators are right on one buffer: the kernel's,
// and ScatterElements, which ONNX Runtime itself lets write over its input. What is left to prove is that nobody else
// looks at the old state after it has been written.
class StateFlow {
 public:
  // `graph` outlives this.
  explicit StateFlow(const GraphNodes& graph);

  // Whether one buffer is right for graph input `input` and graph output `output`, whichever order the nodes run in.
  bool in_place(std::string_view input, std::string_view output) const;

 private:
  using Users = std::unordered_map<std::string_view, std::vector<const Node*>>;
  using Nodes = std::unordered_set<const Node*>;

  const Node* producer(std::string_view value) const;
  bool leads_to(std::string_view input, const Node& writer) const;
  Nodes before(const Node& writer) const;
  bool readers_come_first(std::string_view input, const Node& writer) const;

  std::vector<std::string_view> outputs_;
  Users makers_;
  Users readers_;
};

}  // namespace titans::core
