// Graph files that parsers could read differently, and operators that this project does not write.
// tests/export/test_untrusted.py checks the same of titans-export's reader.
#include "backends/onnxruntime/graph_check.h"

#include <gtest/gtest.h>

#include "test_bundle.h"
#include "wire.h"

namespace titans::test {
namespace {

std::string opset(const std::string& domain, std::size_t version) {
  return (domain.empty() ? "" : field(1, domain)) + number(2, version);
}

std::string node(const std::string& name, const std::string& domain = "", const std::string& attribute = "") {
  return field(1, "x") + field(2, "y") + field(4, name) + (attribute.empty() ? "" : field(5, attribute)) +
         (domain.empty() ? "" : field(7, domain));
}

// An attribute with a graph of one node.
std::string branch(const std::string& node) { return field(1, "body") + field(6, field(1, node)) + number(20, 5); }

std::string function(const std::string& domain, const std::string& name, const std::string& node) {
  return field(1, name) + field(4, "x") + field(5, "y") + field(7, node) + field(9, opset("", 20)) + field(10, domain);
}

// A model with one graph.
std::string model(const std::string& graph, const std::string& sets = field(8, opset("", 20)),
                  const std::string& functions = "") {
  return number(1, 10) + field(7, graph) + sets + functions;
}

void check(const std::string& bytes, bool compiled = false) {
  core::check_encoding(bytes, "g.onnx");
  core::check_operators(bytes, "g.onnx", compiled);
}

void refuse_operator(const std::string& bytes, const std::string& name, bool compiled = false) {
  EXPECT_NO_THROW(core::check_encoding(bytes, "g.onnx"));
  expect_error(TITANS_FAILED, {"g.onnx", name, "TITANS-E0210"},
               [&] { core::check_operators(bytes, "g.onnx", compiled); });
}

void refuse_encoding(const std::string& bytes, const std::string& word = "not an ONNX model") {
  expect_error(TITANS_FAILED, {"g.onnx", word, "TITANS-E0209"}, [&] { core::check_encoding(bytes, "g.onnx"); });
}

TEST(GraphCheck, OperatorsOfThisProject) {
  EXPECT_NO_THROW(check(model(field(1, node("Add")))));
  const std::string own = field(8, opset("", 21)) + field(8, opset("ai.titans", 1));
  for (const char* name : {"NeuralMemory", "ChunkNeuralMemory", "CachedAttention", "CausalConvolution"}) {
    EXPECT_NO_THROW(
        check(model(field(1, node(name, "ai.titans")), own, field(25, function("ai.titans", name, node("MatMul"))))));
  }
  EXPECT_NO_THROW(check(model(field(1, node("Loop", "", branch(node("If", "", branch(node("Mul")))))))));
  const std::string fused =
      field(8, opset("", 20)) + field(8, opset("com.microsoft", 1)) + field(8, opset("ai.titans", 1000));
  EXPECT_NO_THROW(check(model(field(1, node("FusedMatMul", "com.microsoft")), fused), true));
}

TEST(GraphCheck, OperatorsOfOthers) {
  const std::pair<const char*, const char*> cases[] = {{"com.microsoft", "GroupQueryAttention"},
                                                       {"com.microsoft", "CropAndResize"},
                                                       {"ai.onnx.ml", "LinearRegressor"},
                                                       {"", "MaxUnpool"},
                                                       {"", "add"},
                                                       {"ai.onnx", "Add"},
                                                       {"ai.titans", "Other"},
                                                       {"evil", "Add"}};
  for (const auto& [domain, name] : cases) {
    const std::string bad = node(name, domain);
    for (const bool compiled : {false, true}) refuse_operator(model(field(1, bad)), name, compiled);
    refuse_operator(model(field(1, node("If", "", branch(bad)))), name);
    refuse_operator(model(field(1, node("Loop", "", branch(node("If", "", branch(bad)))))), name);
    refuse_operator(
        model(field(1, node("Add")), field(8, opset("", 20)), field(25, function("ai.titans", "NeuralMemory", bad))),
        name);
  }
  refuse_operator(model(field(1, node("FusedMatMul", "com.microsoft"))), "FusedMatMul");
}

TEST(GraphCheck, SetsAndFunctionsOfOthers) {
  const std::pair<const char*, std::size_t> sets[] = {
      {"", 17}, {"", 22}, {"ai.titans", 2}, {"ai.titans", 1000}, {"ai.onnx.ml", 3}, {"com.microsoft", 1}};
  for (const auto& [domain, version] : sets) {
    refuse_operator(model(field(1, node("Add")), field(8, opset(domain, version))), "operator set");
  }
  const std::pair<const char*, const char*> functions[] = {{"", "Add"}, {"pkg", "NeuralMemory"}, {"ai.titans", "Mine"}};
  for (const auto& [domain, name] : functions) {
    const std::string bytes =
        model(field(1, node("Add")), field(8, opset("", 20)), field(25, function(domain, name, node("Add"))));
    refuse_operator(bytes, "function");
  }
}

TEST(GraphCheck, TagsOfMoreThan32Bits) {
  // Parsers of protocol buffers drop the upper bits and read field 6.
  refuse_encoding(model("") + varint((6U << 3 | 2U) | std::size_t{1} << 34) + varint(1) + "x", "more than 32 bits");
}

TEST(GraphCheck, FieldsTwiceOutOfOrderOrUnknown) {
  const std::string good = model(field(1, node("Add")));
  refuse_encoding(good + field(7, field(1, node("Add"))), "twice or out of order");
  refuse_encoding(number(1, 10) + number(1, 10) + good.substr(2), "twice or out of order");
  refuse_encoding(good + varint(1000U << 3) + varint(1), "does not write");
  refuse_encoding(std::string("\x88\x00\x0a", 3) + good.substr(2), "longer than necessary");
  refuse_encoding(good + field(20, ""), "does not write");  // training
  refuse_encoding(number(7, 3), "wrong wire type");
  refuse_encoding(std::string(1, '\0'), "without a number");
  refuse_encoding(good.substr(0, good.size() - 1));
  refuse_encoding(model(field(1, node("Add") + field(8, "\xff"))), "UTF-8");
  const std::string axis = field(1, "axis") + number(3, 1) + number(20, 2);
  refuse_encoding(model(field(1, field(4, "Add") + field(5, axis) + field(5, axis))), "twice");
  refuse_encoding(model(field(1, field(4, "Add") + field(5, field(1, "a") + number(20, 99)))), "unknown value");
  std::string deep = node("Add");
  for (int i = 0; i < 100; ++i) deep = node("If", "", branch(deep));
  refuse_encoding(model(field(1, deep)), "deeper than 90");
}

TEST(GraphCheck, DataInTwoPlaces) {
  const auto entry = [](const std::string& key, const std::string& value) {
    return field(13, field(1, key) + field(2, value));
  };
  const std::string start = number(1, 1) + number(2, 1) + field(8, "w");
  const std::string place = entry("location", "weights.safetensors") + entry("offset", "0") + entry("length", "4");
  const auto with = [&](const std::string& rest) { return model(field(1, node("Add")) + field(5, start + rest)); };
  EXPECT_NO_THROW(check(with(place + number(14, 1))));
  EXPECT_NO_THROW(check(with(field(9, "1234"))));
  for (const std::string& rest :
       {place, number(14, 1), field(9, "1234") + place + number(14, 1),
        place + entry("location", "other") + number(14, 1), place + entry("basepath", "/") + number(14, 1),
        entry("offset", "0") + number(14, 1), entry("location", "w") + entry("offset", "-1") + number(14, 1),
        entry("location", "w") + entry("offset", "1e3") + number(14, 1),
        entry("location", "w") + entry("length", std::string(30, '9')) + number(14, 1)}) {
    refuse_encoding(with(rest));
  }
}

}  // namespace
}  // namespace titans::test
