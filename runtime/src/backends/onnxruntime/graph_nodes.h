// The nodes of a graph file: who reads and who makes which value.
#pragma once

#include <string_view>
#include <utility>
#include <vector>

namespace titans::core {

struct Node {
  std::string_view domain;
  std::string_view op_type;
  std::vector<std::string_view> inputs;  // an absent one has an empty name
  std::vector<std::string_view> outputs;
  std::vector<std::string_view> captured;  // every name that the nodes and outputs of its subgraphs use
  std::vector<std::pair<std::string_view, std::string_view>> attributes;  // name, and text where it is a text
};

// Views of the file's bytes, which outlive them.
struct GraphNodes {
  std::vector<Node> nodes;                // of the main graph
  std::vector<std::string_view> outputs;  // of the main graph
  std::vector<Node> inner;                // of subgraphs and of functions, captured names left out
};

// Throws an Error that names `file_name` where `model` is no ONNX model.
GraphNodes read_nodes(std::string_view model, std::string_view file_name);

}  // namespace titans::core
