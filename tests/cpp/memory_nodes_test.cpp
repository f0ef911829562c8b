#include "backends/onnxruntime/memory_nodes.h"

#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "plugins/kernels/chunk_neural_memory.h"
#include "plugins/kernels/neural_memory.h"
#include "test_bundle.h"
#include "wire.h"

namespace titans::test {
namespace {

using Names = std::vector<std::string>;

// Attribute fields: 1 is the name, 4 a string, 6 a graph.
std::string text_attribute(const std::string& name, const std::string& value) {
  return field(5, field(1, name) + field(4, value));
}
std::string graph_attribute(const std::string& name, const std::string& graph) {
  return field(5, field(1, name) + field(6, graph));
}

std::string node(const std::string& domain, const std::string& kind, const Names& inputs, const Names& outputs,
                 const std::string& attributes = {}) {
  std::string bytes;
  for (const std::string& input : inputs) bytes += field(1, input);
  for (const std::string& output : outputs) bytes += field(2, output);
  return field(1, bytes + field(4, kind) + attributes + field(7, domain));
}

std::string plain(const std::string& kind, const Names& inputs, const Names& outputs,
                  const std::string& attributes = {}) {
  return node("", kind, inputs, outputs, attributes);
}

std::string update(const std::string& state, const std::string& q, const std::string& y, const std::string& next) {
  return node("ai.titans", "NeuralMemory", {state, q}, {y, next, "stats_of_" + y}, text_attribute("mode", "update"));
}

std::string read(const std::string& state, const std::string& q, const std::string& y) {
  return node("ai.titans", "NeuralMemory", {state, q}, {y}, text_attribute("mode", "read"));
}

std::string outputs(const Names& names) {
  std::string bytes;
  for (const std::string& name : names) bytes += field(12, field(1, name));
  return bytes;
}

std::string model(const std::string& graph) { return number(1, 10) + field(7, graph); }

// Whether `state` and `next` may share a buffer in a graph with these nodes.
bool in_place(const std::string& nodes, const Names& graph_outputs = {"logits", "next"}) {
  const std::string bytes = model(nodes + outputs(graph_outputs));
  const core::GraphNodes found = core::read_nodes(bytes, "m.onnx");
  return core::StateFlow(found).in_place("state", "next");
}

TEST(StateFlow, OneUpdate) {
  EXPECT_TRUE(in_place(update("state", "x", "y", "next") + plain("Relu", {"y"}, {"logits"})));
}

TEST(StateFlow, SeveralUpdatesInARow) {
  const std::string first = update("state", "x", "y0", "state1");
  const std::string second = update("state1", "y0", "y1", "state2");
  const std::string third = update("state2", "y1", "logits", "next");
  EXPECT_TRUE(in_place(first + second + third));
  EXPECT_TRUE(in_place(third + second + first)) << "in whichever order the file has them";
  EXPECT_FALSE(in_place(third + second));
}

TEST(StateFlow, AReaderThatTheUpdateNeeds) {
  const std::string before = read("state", "x", "h") + plain("Softmax", {"h"}, {"attended"});
  EXPECT_TRUE(in_place(before + update("state", "attended", "logits", "next")));
  const std::string chunks = before + update("state", "attended", "y", "state1") + read("state1", "y", "h1");
  EXPECT_TRUE(in_place(chunks + update("state1", "h1", "logits", "next")));
}

TEST(StateFlow, AReaderThatTheUpdateNeedsThroughHyperConnections) {
  const auto connect = [](const std::string& domain) {
    return node(domain, "HyperConnection", {"streams", "p", "b", "h", "weights"}, {"q", "streams_out", "beta"});
  };
  const std::string reader = read("state", "x", "h");
  const std::string rest = update("state", "q", "y", "next") + plain("Relu", {"y"}, {"logits"});
  EXPECT_TRUE(in_place(reader + connect("ai.titans") + rest));
  EXPECT_FALSE(in_place(reader + connect("com.example") + rest)) << "nothing is known of somebody else's";
}

TEST(StateFlow, AMemoryThatReadsTheWeightsBeforeAnothersChunks) {
  const auto chunk = [](const Names& inputs, const std::string& y, const std::string& next, const std::string& before) {
    return node("ai.titans", "ChunkNeuralMemory", inputs, {y, next, "", before}, text_attribute("schedule", "any"));
  };
  const std::string first = chunk({"other", "x"}, "y", "other_next", "before");
  const std::string second = chunk({"state", "y", "before"}, "logits", "next", "");
  EXPECT_TRUE(in_place(first + second));
  // The initial weights are not a view of the state.
  EXPECT_TRUE(in_place(chunk({"state", "x"}, "y", "next", "before") + plain("Add", {"y", "before"}, {"logits"})));
  EXPECT_FALSE(in_place(first + second + read("state", "x", "h"), {"logits", "next", "h"}));
}

TEST(StateFlow, AReaderThatMayComeLater) {
  const std::string writer = update("state", "x", "y", "next");
  EXPECT_FALSE(in_place(writer + read("state", "x", "h") + plain("Add", {"y", "h"}, {"logits"})));
  EXPECT_FALSE(in_place(read("state", "y", "logits") + writer));
  EXPECT_FALSE(in_place(writer + plain("Add", {"y", "state"}, {"logits"})));
  // It depends on the first update, but the second one writes.
  const std::string two = update("state", "x", "y", "state1") + update("state1", "x", "logits", "next");
  EXPECT_TRUE(in_place(two));
  EXPECT_FALSE(in_place(two + read("state", "x", "h") + plain("Add", {"y", "h"}, {"unused"})));
}

TEST(StateFlow, AnotherOperatorsReaderMayKeepAView) {
  const std::string writer = update("state", "q", "y", "next");
  const std::string last = plain("Relu", {"y"}, {"logits"});
  EXPECT_TRUE(in_place(writer + last));
  EXPECT_FALSE(in_place(plain("Reshape", {"state", "shape"}, {"q"}) + writer + last));
  EXPECT_FALSE(in_place(plain("Reshape", {"state", "shape"}, {"view"}) + plain("Relu", {"view"}, {"q"}) + writer +
                        plain("Add", {"y", "view"}, {"logits"})));
  EXPECT_FALSE(in_place(plain("Identity", {"state"}, {"view"}) + update("view", "x", "logits", "next")));
  EXPECT_FALSE(in_place(update("state", "state", "logits", "next")));
  EXPECT_FALSE(in_place(update("state", "x", "y", "state1") + update("state1", "state", "logits", "next")));
}

TEST(StateFlow, WhatASubgraphCaptures) {
  const std::string writer = update("state", "q", "logits", "next");
  const auto branches = [](const std::string& nodes, const std::string& output) {
    return graph_attribute("then_branch", nodes + outputs({output})) +
           graph_attribute("else_branch", plain("Constant", {}, {"zero"}) + outputs({"zero"}));
  };
  const std::string inner = branches(read("state", "x", "h") + plain("Relu", {"h"}, {"r"}), "r");
  const std::string deep = branches(plain("If", {"b"}, {"r"}, inner), "r");
  for (const std::string& body : {inner, deep, branches("", "state")}) {
    EXPECT_FALSE(in_place(plain("If", {"c"}, {"q"}, body) + writer));
    EXPECT_FALSE(in_place(update("state", "x", "logits", "next") + plain("If", {"c"}, {"z"}, body)));
  }
  EXPECT_TRUE(in_place(plain("If", {"c"}, {"q"}, branches(plain("Relu", {"x"}, {"r"}), "r")) + writer));
  // The update depends on the reader only through a branch. That proves nothing, because the branch may be dropped.
  const std::string needs_reader = branches(plain("Relu", {"h"}, {"r"}), "r");
  EXPECT_FALSE(in_place(read("state", "x", "h") + plain("If", {"c"}, {"q"}, needs_reader) + writer));
  EXPECT_TRUE(in_place(read("state", "x", "h") + plain("If", {"h"}, {"q"}, needs_reader) + writer));
}

TEST(StateFlow, AShapeProvesNoOrder) {
  for (const char* kind : {"Shape", "Size", "CastLike", "Dropout"}) {
    EXPECT_FALSE(in_place(read("state", "x", "h") + plain(kind, {"h"}, {"s"}) + plain("Expand", {"x", "s"}, {"q"}) +
                          update("state", "q", "y", "next") + plain("Add", {"y", "h"}, {"logits"})))
        << kind;
  }
  EXPECT_FALSE(in_place(read("state", "x", "h") + node("somebody", "Shape2", {"h"}, {"q"}) +
                        update("state", "q", "y", "next") + plain("Add", {"y", "h"}, {"logits"})));
}

TEST(StateFlow, WhatIsNoUpdateOfThatState) {
  const std::string last = plain("Relu", {"x"}, {"logits"});
  EXPECT_FALSE(in_place(last + plain("Relu", {"state"}, {"next"})));
  EXPECT_FALSE(in_place(last + node("", "NeuralMemory", {"state"}, {"y", "next"}, text_attribute("mode", "update"))));
  EXPECT_FALSE(
      in_place(last + node("ai.titans", "Memory", {"state"}, {"y", "next"}, text_attribute("mode", "update"))));
  EXPECT_FALSE(in_place(last + node("ai.titans", "NeuralMemory", {"state"}, {"y", "next"})));
  EXPECT_FALSE(in_place(last + node("ai.titans", "NeuralMemory", {}, {"y", "next"}, text_attribute("mode", "update"))));
  EXPECT_FALSE(in_place(last + update("state", "x", "next", "other")));
  EXPECT_FALSE(in_place(last + update("other", "x", "y", "next")));
  EXPECT_FALSE(in_place(last + update("state", "x", "y", "state1") + plain("Relu", {"state1"}, {"next"})));
  EXPECT_FALSE(in_place(last + update("state", "x", "y", "state1") + update("y", "x", "z", "next")));
  EXPECT_FALSE(in_place(last));
  EXPECT_FALSE(in_place(last + update("state", "x", "y", "next"), {"logits"}));
  EXPECT_FALSE(in_place(last + update("state", "x", "y", "next"), {"logits", "next", "state"}));
}

class StateFlowOfAScatter : public testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(StateFlow, StateFlowOfAScatter, testing::Values("ScatterElements", "ScatterND"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(StateFlowOfAScatter, WritesOverItsInput) {
  const auto scatter = [](const std::string& from, const std::string& new_rows, const std::string& to) {
    return plain(GetParam(), {from, "places", new_rows}, {to});
  };
  const std::string last = plain("MatMul", {"q", "next"}, {"logits"});
  EXPECT_TRUE(in_place(scatter("state", "k", "next") + last));
  EXPECT_TRUE(in_place(scatter("state", "k", "one") + plain("MatMul", {"q", "one"}, {"k2"}) +
                       scatter("one", "k2", "next") + last));
  EXPECT_FALSE(in_place(scatter("state", "k", "next") + plain("MatMul", {"q", "state"}, {"logits"})));
  EXPECT_FALSE(in_place(plain("Slice", {"state"}, {"k"}) + scatter("state", "k", "next") + last));
  EXPECT_FALSE(in_place(scatter("k", "state", "next") + last));
  EXPECT_FALSE(in_place(scatter("state", "state", "next") + last));
  EXPECT_FALSE(in_place(node("somebody", GetParam(), {"state", "places", "k"}, {"next"}) + last));
  EXPECT_FALSE(in_place(plain("Concat", {"state", "k"}, {"next"}) + last));
}

TEST(StateFlow, OperatorsThatOwnTheirState) {
  const std::string last = plain("Relu", {"y"}, {"logits"});
  const auto attend = [](const std::string& keys, const std::string& values) {
    return node("ai.titans", "CachedAttention", {keys, values, "q", "k", "v", "position"}, {"y", "keys_out", "next"});
  };
  EXPECT_TRUE(in_place(attend("keys", "state") + last, {"logits", "next", "keys_out"}));
  EXPECT_FALSE(in_place(attend("state", "values") + last, {"logits", "next", "keys_out"})) << "it updates the values";
  EXPECT_FALSE(in_place(attend("state", "state") + last, {"logits", "next", "keys_out"}));
  const std::string convolve = node("ai.titans", "CausalConvolution", {"state", "x", "weight"}, {"y", "next"});
  EXPECT_TRUE(in_place(convolve + last));
  EXPECT_FALSE(in_place(convolve + plain("Add", {"y", "state"}, {"logits"})));
  const std::string second = node("ai.titans", "CausalConvolution", {"state1", "y1", "weight"}, {"y", "next"});
  EXPECT_TRUE(
      in_place(node("ai.titans", "CausalConvolution", {"state", "x", "weight"}, {"y1", "state1"}) + second + last));
}

// Slots of a pool: rows are gathered, changed and written back.
TEST(StateFlow, AGatherThatComesBeforeTheScatter) {
  const std::string gather = plain("Gather", {"state", "slots"}, {"row"}) + plain("Relu", {"row"}, {"new_row"});
  const std::string scatter = plain("ScatterND", {"state", "slots", "new_row"}, {"next"});
  const std::string last = plain("Relu", {"new_row"}, {"logits"});
  EXPECT_TRUE(in_place(gather + scatter + last));
  EXPECT_TRUE(in_place(scatter + last + gather));
  EXPECT_FALSE(in_place(gather + scatter + last + plain("Gather", {"state", "slots"}, {"late"})));
  EXPECT_FALSE(in_place(node("somebody", "Gather", {"state", "slots"}, {"new_row"}) + scatter + last));
}

TEST(StateFlow, FilesThatMakeNoSense) {
  EXPECT_FALSE(in_place(update("b", "x", "y", "a") + update("a", "x", "z", "b") + update("a", "x", "u", "next")));
  EXPECT_FALSE(in_place(update("state", "x", "y", "next") + update("state", "x", "z", "next")));
  EXPECT_FALSE(in_place(update("", "x", "y", "next")));
  const std::string strange = text_attribute("mode", "update") + graph_attribute("mode", read("state", "x", "h"));
  EXPECT_FALSE(in_place(node("ai.titans", "NeuralMemory", {"state", "x"}, {"y", "next"}, strange)));
  EXPECT_FALSE(in_place(read("state", "a", "b") + read("state", "b", "a") + update("state", "x", "y", "next")));
  EXPECT_FALSE(in_place(""));
}

TEST(GraphNodes, WhatIsNoModel) {
  const std::string whole = model(update("state", "x", "y", "next") + outputs({"y", "next"}));
  core::read_nodes(whole, "m.onnx");
  for (std::size_t length = 1; length < whole.size(); ++length) {
    try {
      core::read_nodes(whole.substr(0, length), "m.onnx");
    } catch (const core::Error& error) {
      EXPECT_NE(std::string(error.what()).find("[m.onnx] not an ONNX model"), std::string::npos);
    }
  }
  for (std::size_t place = 0; place < whole.size(); ++place) {
    for (const char byte : {'\x00', '\x7f', '\xff'}) {
      std::string spoilt = whole;
      spoilt[place] = byte;
      try {
        const core::GraphNodes found = core::read_nodes(spoilt, "m.onnx");
        core::StateFlow(found).in_place("state", "next");
      } catch (const core::Error&) {
      }
    }
  }
}

TEST(GraphNodes, SubgraphsWithinEachOther) {
  const auto nest = [](int depth) {
    std::string graph = plain("Relu", {"state"}, {"z"});
    for (int i = 0; i < depth; ++i) graph = plain("If", {"c"}, {"z"}, graph_attribute("then_branch", graph));
    return model(graph);
  };
  const std::string fits = nest(32);
  const core::GraphNodes found = core::read_nodes(fits, "m.onnx");
  EXPECT_EQ(found.nodes[0].captured.front(), "state");
  EXPECT_EQ(found.inner.size(), 32U);
  const std::string deep = nest(200);
  expect_error(TITANS_FAILED, {"m.onnx", "deep"}, [&] { core::read_nodes(deep, "m.onnx"); });
}

TEST(MemoryAttributes, UnknownOnesAreRefusedWhereverTheyStand) {
  const std::string good = update("state", "x", "y", "next");
  const std::string bad = node("ai.titans", "NeuralMemory", {"state"}, {"y"},
                               text_attribute("mode", "read") + text_attribute("network", "swiglu"));
  const std::string within = plain("If", {"c"}, {"z"}, graph_attribute("then_branch", bad));
  const auto check = [](const std::string& bytes) {
    core::check_memory_attributes(core::read_nodes(bytes, "m.onnx"), "m.onnx");
  };
  check(model(good + plain("Softmax", {"x"}, {"z"}, text_attribute("axis", "1"))));
  const auto check_all = [&](const char* op, const auto& table) {
    std::string known;
    for (const auto& row : table) known += text_attribute(row.name, "1");
    check(model(node("ai.titans", op, {"state"}, {"y"}, known)));
    return known;
  };
  check_all("NeuralMemory", kernels::kAttributes);
  const std::string of_chunks = check_all("ChunkNeuralMemory", kernels::kChunkAttributes);
  const std::string other = node("ai.titans", "NeuralMemory", {"state"}, {"y"}, of_chunks);
  expect_error(TITANS_UNSUPPORTED, {"m.onnx", "NeuralMemory", "batch_size"}, [&] { check(model(other)); });
  for (const std::string& bytes :
       {model(good + bad), model(good + within), model(good) + field(25, field(7, bad.substr(2)))}) {
    expect_error(TITANS_UNSUPPORTED,
                 {"m.onnx", "NeuralMemory", "mode, schedule, widths", "unknown attribute \"network\"",
                  "export the bundle again"},
                 [&] { check(bytes); });
  }
}

}  // namespace
}  // namespace titans::test
