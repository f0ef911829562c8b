#include "backends/onnxruntime/graph_nodes.h"

#include "backends/onnxruntime/wire_format.h"
#include "base/error.h"

namespace titans::core {
namespace {

// Field numbers from onnx.proto.
constexpr std::uint64_t kModelGraph = 7;
constexpr std::uint64_t kModelFunctions = 25;
constexpr std::uint64_t kFunctionNode = 7;
constexpr std::uint64_t kGraphNode = 1;
constexpr std::uint64_t kGraphOutput = 12;
constexpr std::uint64_t kValueName = 1;
constexpr std::uint64_t kNodeInput = 1;
constexpr std::uint64_t kNodeOutput = 2;
constexpr std::uint64_t kNodeOpType = 4;
constexpr std::uint64_t kNodeAttribute = 5;
constexpr std::uint64_t kNodeDomain = 7;
constexpr std::uint64_t kAttributeName = 1;
constexpr std::uint64_t kAttributeText = 4;
constexpr std::uint64_t kAttributeGraph = 6;
constexpr std::uint64_t kAttributeGraphs = 11;

// Deeper than ONNX parsers accept: they stop at 100 nested messages, and a subgraph takes three.
constexpr int kDeepest = 40;

std::string_view value_name(WireMessage value) {
  std::string_view name;
  while (value.next()) {
    if (value.is_bytes(kValueName)) name = value.bytes();
  }
  return name;
}

// Reads the nodes inside a node's subgraphs or a function, and all names that they use.
class InnerReader {
 public:
  InnerReader(std::vector<Node>& nodes, std::vector<std::string_view>& used) : nodes_(nodes), used_(used) {}

  Node read_node(WireMessage message) {
    Node node;
    while (message.next()) {
      if (message.is_bytes(kNodeInput)) node.inputs.push_back(message.bytes());
      if (message.is_bytes(kNodeOutput)) node.outputs.push_back(message.bytes());
      if (message.is_bytes(kNodeOpType)) node.op_type = message.bytes();
      if (message.is_bytes(kNodeDomain)) node.domain = message.bytes();
      if (message.is_bytes(kNodeAttribute)) node.attributes.push_back(read_attribute(message.message()));
    }
    return node;
  }

  void add_inner(WireMessage message) {
    Node node = read_node(message);
    used_.insert(used_.end(), node.inputs.begin(), node.inputs.end());
    nodes_.push_back(std::move(node));
  }

 private:
  std::pair<std::string_view, std::string_view> read_attribute(WireMessage message) {
    std::pair<std::string_view, std::string_view> attribute;
    while (message.next()) {
      if (message.is_bytes(kAttributeName)) attribute.first = message.bytes();
      if (message.is_bytes(kAttributeText)) attribute.second = message.bytes();
      if (message.is_bytes(kAttributeGraph) || message.is_bytes(kAttributeGraphs)) read_subgraph(message.message());
    }
    return attribute;
  }

  void read_subgraph(WireMessage message) {
    if (++depth_ > kDeepest) message.fail(text("graphs nested deeper than ", kDeepest));
    while (message.next()) {
      if (message.is_bytes(kGraphNode)) add_inner(message.message());
      if (message.is_bytes(kGraphOutput)) used_.push_back(value_name(message.message()));
    }
    --depth_;
  }

  std::vector<Node>& nodes_;
  std::vector<std::string_view>& used_;
  int depth_ = 0;
};

void read_graph(WireMessage message, GraphNodes& found) {
  while (message.next()) {
    if (message.is_bytes(kGraphOutput)) found.outputs.push_back(value_name(message.message()));
    if (!message.is_bytes(kGraphNode)) continue;
    std::vector<std::string_view> captured;
    Node node = InnerReader(found.inner, captured).read_node(message.message());
    node.captured = std::move(captured);
    found.nodes.push_back(std::move(node));
  }
}

void read_function(WireMessage message, GraphNodes& found) {
  std::vector<std::string_view> local;
  InnerReader reader(found.inner, local);
  while (message.next()) {
    if (message.is_bytes(kFunctionNode)) reader.add_inner(message.message());
  }
}

}  // namespace

GraphNodes read_nodes(std::string_view model, std::string_view file_name) {
  GraphNodes found;
  for (WireMessage root(model, file_name); root.next();) {
    if (root.is_bytes(kModelGraph)) read_graph(root.message(), found);
    if (root.is_bytes(kModelFunctions)) read_function(root.message(), found);
  }
  return found;
}

}  // namespace titans::core
