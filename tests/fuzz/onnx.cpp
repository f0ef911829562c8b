// Fuzzes the ONNX Runtime backend's own inspection of graph files.
#include <set>

#include "backends/onnxruntime/external_data.h"
#include "backends/onnxruntime/graph_check.h"
#include "backends/onnxruntime/graph_nodes.h"
#include "backends/onnxruntime/initializers.h"
#include "backends/onnxruntime/memory_nodes.h"
#include "fuzz.h"

namespace titans::fuzz {
namespace {

template <typename Action>
void attempt(Action&& action) {
  try {
    action();
  } catch (const core::Error& error) {
    check_error(error);
  }
}

void ask_flow(const core::GraphNodes& graph) {
  constexpr std::size_t kMostNames = 24;  // limits the number of checked pairs
  std::set<std::string_view> inputs, outputs(graph.outputs.begin(), graph.outputs.end());
  for (const core::Node& node : graph.nodes) inputs.insert(node.inputs.begin(), node.inputs.end());
  if (inputs.size() > kMostNames || outputs.size() > kMostNames) return;
  const core::StateFlow flow(graph);
  for (const std::string_view input : inputs) {
    for (const std::string_view output : outputs) {
      check(!flow.in_place(input, input), "an input to be no output in place");
      flow.in_place(input, output);
    }
  }
}

}  // namespace
}  // namespace titans::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace titans;
  const std::string_view model(reinterpret_cast<const char*>(data), size);
  fuzz::attempt([&] { core::read_initializers(model, "graph.onnx"); });
  fuzz::attempt([&] { core::check_external_data(model, "graph.onnx", {"weights.safetensors"}); });
  fuzz::attempt([&] {
    core::check_encoding(model, "graph.onnx");
    core::check_operators(model, "graph.onnx", size % 2 == 0);
  });
  fuzz::attempt([&] {
    const core::GraphNodes graph = core::read_nodes(model, "graph.onnx");
    core::count_memory_nodes(graph);
    fuzz::ask_flow(graph);
    core::check_memory_attributes(graph, "graph.onnx");
  });
  return 0;
}
