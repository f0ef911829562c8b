#include "backends/onnxruntime/memory_nodes.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <unordered_set>

#include "base/error.h"
#include "plugins/kernels/chunk_neural_memory.h"
#include "plugins/kernels/neural_memory.h"

namespace titans::core {
namespace {

constexpr std::size_t kStateOutput = 1;  // numbered in docs/operator.md

bool is_standard(const Node& node) { return node.domain.empty() || node.domain == "ai.onnx"; }
bool is_token_memory(const Node& node) {
  return node.domain == "ai.titans" && node.op_type == kernels::Configuration::kOperator;
}
bool is_chunk_memory(const Node& node) {
  return node.domain == "ai.titans" && node.op_type == kernels::ChunkConfiguration::kOperator;
}
bool is_memory(const Node& node) { return is_token_memory(node) || is_chunk_memory(node); }
bool is_cached_attention(const Node& node) { return node.domain == "ai.titans" && node.op_type == "CachedAttention"; }
bool is_convolution(const Node& node) { return node.domain == "ai.titans" && node.op_type == "CausalConvolution"; }
// All its outputs depend on the values of all its inputs.
bool is_hyper_connection(const Node& node) { return node.domain == "ai.titans" && node.op_type == "HyperConnection"; }

// An input and the output that may share its buffer.
struct Update {
  std::size_t input;
  std::string_view output;
};

// What the node may write over; empty if it needs two buffers. `caches`: as in StateFlow.
std::vector<Update> updates(const Node& node, bool caches) {
  const auto listed = [&](std::size_t states, std::size_t first_output) {
    std::vector<Update> found;
    for (std::size_t state = 0; state < states; ++state) {
      const std::size_t output = first_output + state;
      if (state < node.inputs.size() && output < node.outputs.size()) found.push_back({state, node.outputs[output]});
    }
    return found;
  };
  const auto is_set_to = [&](std::string_view name, std::string_view value) {
    return std::any_of(node.attributes.begin(), node.attributes.end(),
                       [&](const auto& attribute) { return attribute.first == name && attribute.second == value; });
  };
  if (is_memory(node)) {
    if (is_chunk_memory(node) || is_set_to("mode", "update")) return listed(1, kStateOutput);
    return {};
  }
  if (is_cached_attention(node)) return listed(caches ? 2 : 0, 1);  // keys and values
  if (is_convolution(node)) return listed(caches ? 1 : 0, 1);       // the last inputs
  const bool scatters = node.op_type == "ScatterElements" || node.op_type == "ScatterND";
  return scatters && is_standard(node) && node.outputs.size() == 1 ? listed(1, 0) : std::vector<Update>{};
}

// The input whose buffer that output may share.
std::optional<std::size_t> written_over(const Node& node, std::string_view output, bool caches) {
  for (const Update& update : updates(node, caches)) {
    if (update.output == output) return update.input;
  }
  return std::nullopt;
}

// True for a standard operator that copies the rows that it reads and so keeps no view of its input.
bool copies_rows(const Node& node) { return is_standard(node) && node.op_type == "Gather" && !node.inputs.empty(); }

// True if the outputs may not depend on the values of the inputs. ONNX Runtime infers shapes and types before it runs
// and removes nodes that need nothing else. Nonstandard operators and functions are assumed to be such nodes.
bool may_ignore_values(const Node& node) {
  constexpr std::array<std::string_view, 7> kIgnorant{
      "Shape", "Size", "CastLike", "EyeLike", "RandomNormalLike", "RandomUniformLike", "Dropout"};
  if (is_memory(node) || is_hyper_connection(node) || is_cached_attention(node) || is_convolution(node)) return false;
  return !is_standard(node) || std::find(kIgnorant.begin(), kIgnorant.end(), node.op_type) != kIgnorant.end();
}

template <class Table>
void check_attributes(const Node& node, const Table& table, std::string_view file_name) {
  for (const auto& [name, value] : node.attributes) {
    if (kernels::has_attribute(table, name)) continue;
    std::string known;
    for (const auto& row : table) known += text(known.empty() ? "" : ", ", row.name);
    throw Error(TITANS_UNSUPPORTED, "E0608", file_name,
                text("unknown attribute ", quoted(name), " of ", node.op_type, "; known are ", known),
                "export the bundle again, or install a newer titans runtime");
  }
}

}  // namespace

void check_memory_attributes(const GraphNodes& graph, std::string_view file_name) {
  for (const auto* nodes : {&graph.nodes, &graph.inner}) {
    for (const Node& node : *nodes) {
      if (is_token_memory(node)) check_attributes(node, kernels::kAttributes, file_name);
      if (is_chunk_memory(node)) check_attributes(node, kernels::kChunkAttributes, file_name);
    }
  }
}

std::size_t count_memory_nodes(const GraphNodes& graph) {
  return static_cast<std::size_t>(std::count_if(graph.nodes.begin(), graph.nodes.end(), is_memory) +
                                  std::count_if(graph.inner.begin(), graph.inner.end(), is_memory));
}

StateFlow::StateFlow(const GraphNodes& graph, bool caches) : caches_(caches), outputs_(graph.outputs) {
  const auto add = [](Users& users, const std::vector<std::string_view>& values, const Node& node) {
    for (const std::string_view value : values) {
      if (!value.empty()) users[value].push_back(&node);
    }
  };
  for (const Node& node : graph.nodes) {
    add(makers_, node.outputs, node);
    add(readers_, node.inputs, node);
    add(readers_, node.captured, node);
  }
}

bool StateFlow::in_place(std::string_view input, std::string_view output) const {
  const bool named_right = std::count(outputs_.begin(), outputs_.end(), output) == 1 &&
                           std::count(outputs_.begin(), outputs_.end(), input) == 0;
  const Node* writer = producer(output);
  if (!named_right || writer == nullptr) return false;
  const std::optional<std::size_t> state = written_over(*writer, output, caches_);
  return state && leads_to(input, *writer, *state) && readers_come_first(input, *writer, *state);
}

const Node* StateFlow::producer(std::string_view value) const {
  const auto makers = makers_.find(value);
  return makers != makers_.end() && makers->second.size() == 1 ? makers->second.front() : nullptr;
}

// True if that state of the writer is the input, possibly updated by other nodes before it.
bool StateFlow::leads_to(std::string_view input, const Node& writer, std::size_t state) const {
  std::unordered_set<const Node*> passed;  // a malformed graph may have a cycle
  const Node* node = &writer;
  while (passed.insert(node).second) {
    const std::string_view before = node->inputs[state];
    if (before == input) return true;
    node = producer(before);
    if (node == nullptr) return false;
    const std::optional<std::size_t> earlier = written_over(*node, before, caches_);
    if (!earlier) return false;
    state = *earlier;
  }
  return false;
}

// The nodes that the writer depends on, which therefore run before it.
StateFlow::Nodes StateFlow::before(const Node& writer) const {
  Nodes found;
  std::vector<const Node*> open{&writer};
  while (!open.empty()) {
    const Node* node = open.back();
    open.pop_back();
    // Captured values are left out: ONNX Runtime removes an If branch that is never taken.
    for (const std::string_view value : node->inputs) {
      const Node* maker = producer(value);
      if (maker == nullptr || !found.insert(maker).second) continue;
      if (!may_ignore_values(*maker)) open.push_back(maker);
    }
  }
  return found;
}

// True if every reader of the old state runs before the writer starts. Nodes of other operators may return a view of
// the state, such as a Reshape, that is read later.
bool StateFlow::readers_come_first(std::string_view input, const Node& writer, std::size_t state) const {
  const auto readers = readers_.find(input);
  if (readers == readers_.end()) return true;
  const Nodes earlier = before(writer);
  return std::all_of(readers->second.begin(), readers->second.end(), [&](const Node* reader) {
    const bool keeps_no_view = is_memory(*reader) || !updates(*reader, caches_).empty() || copies_rows(*reader);
    if (!keeps_no_view || !reader->captured.empty()) return false;
    if (reader != &writer) return earlier.count(reader) != 0;
    return reader->inputs[state] == input && std::count(reader->inputs.begin(), reader->inputs.end(), input) == 1;
  });
}

}  // namespace titans::core
