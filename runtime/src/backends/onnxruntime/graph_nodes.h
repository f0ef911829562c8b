// The nodes of a graph file with the values that they read and write.
#pragma once

#include <string_view>
#include <utility>
#include <vector>

namespace titans::core {

struct Node {
  std::string_view domain;
  std::string_view op_type;
  std::vector<std::string_view> inputs;  // empty name: absent
  std::vector<std::string_view> outputs;
  std::vector<std::string_view> captured;  // all names used in its subgraphs
  std::vector<std::pair<std::string_view, std::string_view>>
      attributes;  // name and string value; empty for other types
};

// Views of the file's bytes, which must outlive them.
struct GraphNodes {
  std::vector<Node> nodes;                // of the main graph
  std::vector<std::string_view> outputs;  // of the main graph
  std::vector<Node> inner;                // of subgraphs and functions, without captured names
};

// Throws an Error, naming `file_name`, if `model` is not an ONNX model.
GraphNodes read_nodes(std::string_view model, std::string_view file_name);

}  // namespace titans::core
