#include "bundle/manifest.h"

#include <functional>

#include <gtest/gtest.h>

#include "test_bundle.h"

namespace titans::test {
namespace {

using nlohmann::json;

core::Manifest parse(const json& manifest) { return core::Manifest::parse(manifest.dump()); }

TEST(Manifest, GraphsComeWithMostTokensFirst) {
  const core::Manifest manifest = parse(manifest_json());
  EXPECT_EQ(manifest.graphs[0].name, "prefill");
  EXPECT_EQ(manifest.graphs[1].name, "chunk");
  EXPECT_EQ(manifest.graphs[2].name, "decode");
}

TEST(Manifest, UnknownKeysAreIgnored) {
  json manifest = manifest_json();
  manifest["new"] = 1;
  manifest["graphs"][0]["new"] = {1, 2};
  EXPECT_NO_THROW(parse(manifest));
}

TEST(Manifest, NotJson) {
  for (const char* source : {"", "{", "\xff\xfe", "[1]", "null"}) {
    expect_error(TITANS_FAILED, {"manifest.json", "JSON object"}, [&] { core::Manifest::parse(source); });
  }
}

TEST(Manifest, DepthIsLimited) {
  // Deep enough to overflow the stack of a recursive parser.
  const std::string deep = std::string(300000, '[') + std::string(300000, ']');
  expect_error(TITANS_FAILED, {"manifest.json", "levels"}, [&] { core::Manifest::parse(deep); });
  expect_error(TITANS_FAILED, {"levels"}, [&] { core::Manifest::parse("{\"model\": " + deep + "}"); });
}

json written(std::int64_t axis, const std::vector<std::int64_t>& first, std::int64_t period) {
  return {{"axis", axis}, {"first", first}, {"period", period}};
}

TEST(Manifest, TheRowsThatATokenWrites) {
  json manifest = manifest_json();
  EXPECT_FALSE(parse(manifest).state[0].written);
  const std::int64_t rows = manifest["state"][0]["shape"].back();
  manifest["state"][0]["written"] = written(2, {0, rows - 1}, 1);
  const core::StateTensor state = parse(manifest).state[0];
  ASSERT_TRUE(state.written);
  EXPECT_EQ(state.written->axis, 2U);
  EXPECT_EQ(state.written->first, (std::vector<std::size_t>{0, static_cast<std::size_t>(rows) - 1}));
  EXPECT_EQ(state.written->period, 1U);
}

TEST(Manifest, WhatARowOfTheStreamIs) {
  json manifest = manifest_json();
  core::StateTensor state = parse(manifest).state[0];
  EXPECT_FALSE(state.chunk);
  EXPECT_EQ(state.rows.before(1000), 1000U);
  manifest["state"][0]["chunk"] = 4;
  manifest["state"][0]["rows"] = {{"segment", 32}, {"longterm", 5}};
  state = parse(manifest).state[0];
  EXPECT_EQ(state.chunk, 4U);
  EXPECT_EQ(state.rows.before(31), 31U);
  EXPECT_EQ(state.rows.before(32), 37U);
  EXPECT_EQ(state.rows.before(64), 74U);
}

TEST(Manifest, Phases) {
  json manifest = manifest_json();
  EXPECT_EQ(parse(manifest).graphs[0].offsets, (std::vector<std::int64_t>{0}));
  json last = manifest["graphs"][0];
  manifest["graphs"][0].update({{"stride", 4}, {"offsets", {0, 1, 2}}});
  expect_error(TITANS_FAILED, {"manifest.json", "graphs", "also at 3 modulo 4"}, [&] { parse(manifest); });
  last.update({{"name", "last"}, {"stride", 4}, {"offsets", {3}}});
  manifest["graphs"].push_back(last);
  const core::Manifest read = parse(manifest);
  EXPECT_EQ(read.graphs[2].offsets, (std::vector<std::int64_t>{0, 1, 2}));
  EXPECT_EQ(read.graphs[3].offsets, (std::vector<std::int64_t>{3}));
  const std::vector<json> wrong{json::array(), {4}, {3, 3}, {3, 2}, {-1},           {2, 3},
                                {1.5},         3,   {"3"},  {{3}},  {{"offset", 3}}};
  for (const json& offsets : wrong) {
    manifest["graphs"][3]["offsets"] = offsets;
    expect_error(TITANS_FAILED, {"manifest.json", "graphs"}, [&] { parse(manifest); });
  }
}

TEST(Manifest, Vectors) {
  const core::Manifest manifest = parse(vectors_json());
  EXPECT_EQ(manifest.input_kind, core::InputKind::kVectors);
  EXPECT_EQ(manifest.input, "x");
  EXPECT_EQ(manifest.output, "y");
  EXPECT_EQ(manifest.input_shape(manifest.graphs[0]), (core::Shape{1, 4, kFakeInputs}));
  EXPECT_EQ(manifest.output_shape(manifest.graphs[0]), (core::Shape{1, 4, kFakeOutputs}));
  EXPECT_EQ(manifest.input_dtype(), core::DType::kFloat32);
  EXPECT_EQ(manifest.input_row_bytes(), kFakeInputs * sizeof(float));
  const core::Manifest tokens = parse(manifest_json());
  EXPECT_EQ(tokens.input_kind, core::InputKind::kTokens);
  EXPECT_EQ(tokens.input_shape(tokens.graphs[0]), (core::Shape{1, 4}));
  EXPECT_EQ(tokens.output_shape(tokens.graphs[0]), (core::Shape{1, 4, 8}));
  EXPECT_EQ(tokens.input_row_bytes(), sizeof(std::int64_t));
}

TEST(Manifest, VectorsThatAreWrong) {
  const std::vector<std::pair<const char*, json>> changes{{"/input/kind", "floats"},
                                                          {"/input/kind", "tokens"},
                                                          {"/input/dtype", "int64"},
                                                          {"/input/dtype", "float16"},
                                                          {"/input/size", 0},
                                                          {"/input/size", "2"},
                                                          {"/output/kind", "logits"},
                                                          {"/output/dtype", "float64"},
                                                          {"/output/size", 0},
                                                          {"/output/size", nullptr},
                                                          {"/input/name", "position"},
                                                          {"/output/name", "x"},
                                                          {"/input/size", std::int64_t{1} << 31}};
  for (const auto& [pointer, value] : changes) {
    json manifest = vectors_json();
    manifest[json::json_pointer(pointer)] = value;
    expect_error(TITANS_FAILED, {"manifest.json"}, [&] { parse(manifest); });
  }
  json manifest = vectors_json();
  manifest["input"].erase("size");
  expect_error(TITANS_FAILED, {"input.size"}, [&] { parse(manifest); });
}

TEST(Manifest, AGuardsLimits) {
  json manifest = manifest_json();
  EXPECT_EQ(parse(manifest).guard.policy, TITANS_GUARD_OFF);
  manifest["guard"] = nullptr;
  EXPECT_TRUE(parse(manifest).guard.fields.empty());
  manifest["guard"] = {{"policy", "decay"},
                       {"restart_every", 4096},
                       {"fields", {{"layers.0.memory.S0", {{"seen", 1.5}, {"limit", 6}}}}}};
  const core::GuardRecord guard = parse(manifest).guard;
  EXPECT_EQ(guard.policy, TITANS_GUARD_DECAY);
  EXPECT_EQ(guard.restart_every, 4096U);
  ASSERT_EQ(guard.fields.size(), 1U);
  EXPECT_EQ(guard.fields[0].name, "layers.0.memory.S0");
  EXPECT_EQ(guard.fields[0].seen, 1.5);
  EXPECT_EQ(guard.fields[0].limit, 6.0);
  for (std::int32_t policy = TITANS_GUARD_OFF; policy <= TITANS_GUARD_RESTART; ++policy) {
    EXPECT_EQ(core::guard_policy_named(core::guard_policy_name(policy)), policy);
  }
}

TEST(Manifest, AnOutputIsNoInput) {
  json manifest = manifest_json();
  manifest["state"][0]["output"] = manifest["state"][0]["input"];
  expect_error(TITANS_FAILED, {"state"}, [&] { parse(manifest); });
}

TEST(Manifest, FieldsOfTheMemoryHaveDifferentNames) {
  json manifest = manifest_json();
  for (json& state : manifest["state"]) {
    if (!state.contains("layout")) continue;
    state["layout"].push_back(state["layout"][0]);
    expect_error(TITANS_FAILED, {"state", "repeats"}, [&] { parse(manifest); });
    return;
  }
  FAIL() << "no state with a layout in the test's manifest";
}

TEST(Manifest, ANewerSchemaIsUnsupportedWhateverElseItSays) {
  expect_error(TITANS_UNSUPPORTED, {"schema_version 2", "got 7"},
               [] { parse({{"format", "titans-bundle"}, {"schema_version", 7}}); });
}

// Each required field, by its JSON pointer. If it is missing, the error names it.
class MissingField : public testing::TestWithParam<const char*> {};

TEST_P(MissingField, IsNamed) {
  const json::json_pointer pointer(GetParam());
  json manifest = manifest_json();
  manifest[pointer.parent_pointer()].erase(pointer.back());
  expect_error(TITANS_FAILED, {"manifest.json", pointer.back()}, [&] { parse(manifest); });
}

INSTANTIATE_TEST_SUITE_P(Manifest, MissingField,
                         testing::Values("/format", "/schema_version", "/model", "/input", "/input/kind", "/input/name",
                                         "/input/dtype", "/input/vocab_size", "/output", "/output/kind", "/output/name",
                                         "/output/dtype", "/output/size", "/controls", "/controls/position",
                                         "/controls/learn", "/state", "/state/0/name", "/state/0/input",
                                         "/state/0/output", "/state/0/dtype", "/state/0/shape", "/state/0/role",
                                         "/state/0/layout/0/name", "/state/0/layout/0/offset",
                                         "/state/0/layout/0/shape", "/graphs", "/graphs/0/name", "/graphs/0/file",
                                         "/graphs/0/tokens", "/graphs/0/stride", "/graphs/0/weights", "/weights",
                                         "/weights/file", "/initial_state", "/initial_state/file", "/files"));

struct Change {
  const char* pointer;
  json value;
};

void PrintTo(const Change& change, std::ostream* out) { *out << change.pointer << " = " << change.value; }

json guard(json keys) {
  if (!keys.contains("fields")) keys["fields"] = json::object();
  return keys;
}

json guard_of(const char* name, const json& field) { return {{"fields", {{name, field}}}}; }

// Invalid values. The error names the field.
class WrongField : public testing::TestWithParam<Change> {};

TEST_P(WrongField, IsNamed) {
  const json::json_pointer pointer(GetParam().pointer);
  json manifest = manifest_json();
  manifest[pointer] = GetParam().value;
  expect_error(TITANS_FAILED, {"manifest.json"}, [&] { parse(manifest); });
}

INSTANTIATE_TEST_SUITE_P(
    Manifest, WrongField,
    testing::Values(
        Change{"/format", "other"}, Change{"/format", 1}, Change{"/schema_version", 0}, Change{"/schema_version", "1"},
        Change{"/schema_version", 1.5}, Change{"/input/dtype", "int32"}, Change{"/input/vocab_size", 0},
        Change{"/input/vocab_size", std::uint64_t{1} << 63}, Change{"/output/size", 9},
        Change{"/output/dtype", "float16"}, Change{"/controls/learn", "position"}, Change{"/controls/valid", "valid"},
        Change{"/controls/slots", ""}, Change{"/controls/slots", "learn"}, Change{"/controls/slots", 1},
        Change{"/state/0/dtype", "float33"}, Change{"/state/0/dtype", "int32"}, Change{"/state/0/shape", json::array()},
        Change{"/state/0/shape", {2, 1, 4}}, Change{"/state/0/shape", {1, 0, 4}},
        Change{"/state/0/shape", {1, std::int64_t{1} << 62, 64}}, Change{"/state/0/layout/0/offset", 3},
        Change{"/state/0/layout/0/offset", -1}, Change{"/state/0/layout/0/shape", {5}},
        Change{"/state/0/layout/0/shape", {std::int64_t{1} << 62, 8}},
        // State 0 has shape [1, 1, 4].
        Change{"/state/0/written", 3}, Change{"/state/0/written", written(3, {0}, 4)},
        Change{"/state/0/written", written(-1, {0}, 4)}, Change{"/state/0/written", written(2, {0}, 0)},
        Change{"/state/0/written", written(2, {0}, 99)}, Change{"/state/0/written", written(2, {5}, 99)},
        Change{"/state/0/written", written(2, {0, 1}, 2)}, Change{"/state/0/written", written(2, {-1}, 2)},
        Change{"/state/0/written", {{"axis", 2}, {"period", 1}}}, Change{"/state/0/chunk", 0},
        Change{"/state/0/chunk", "4"}, Change{"/state/0/rows", 4}, Change{"/state/0/rows", {{"segment", 4}}},
        Change{"/state/0/rows", {{"segment", 0}, {"longterm", 1}}},
        Change{"/state/0/rows", {{"segment", 1}, {"longterm", -1}}}, Change{"/state/1/name", "layers.0.memory"},
        Change{"/state/1/input", "tokens"}, Change{"/state/1/output", "memory.next"}, Change{"/graphs", json::array()},
        Change{"/graphs", json::object()}, Change{"/graphs/0/tokens", 3}, Change{"/graphs/0/tokens", 0},
        Change{"/graphs/0/stride", 2}, Change{"/graphs/0/stride", 0}, Change{"/graphs/0/weights", "E"},
        Change{"/graphs/0/file", "../decode.onnx"}, Change{"/graphs/0/file", "a/b"}, Change{"/graphs/0/file", "a\\b"},
        Change{"/graphs/0/file", ".."}, Change{"/graphs/0/file", "."}, Change{"/graphs/0/file", ""},
        Change{"/graphs/0/file", std::string("a\0b", 3)}, Change{"/weights/file", "/etc/passwd"},
        Change{"/initial_state/file", "../state"}, Change{"/files", 3}, Change{"/guard", 3},
        Change{"/guard", json::object()}, Change{"/guard", guard({{"policy", "stop"}})},
        Change{"/guard", guard({{"policy", 1}})}, Change{"/guard", guard({{"restart_every", -1}})},
        Change{"/guard", guard({{"restart_every", 1.5}})}, Change{"/guard", guard({{"fields", json::array()}})},
        Change{"/guard", guard_of("layers.0.memory", json::object())},
        Change{"/guard", guard_of("layers.0.memory.W1", json::object())},
        Change{"/guard", guard_of("layers.0.memory.W0", 3)},
        Change{"/guard", guard_of("layers.0.memory.W0", {{"limit", 0}})},
        Change{"/guard", guard_of("layers.0.memory.W0", {{"limit", "1"}})},
        Change{"/guard", guard_of("layers.0.memory.W0", {{"limit", nullptr}})},
        Change{"/guard", guard_of("layers.0.memory.W0", {{"seen", -1}})},
        Change{"/files", {{"a", {{"bytes", -1}, {"xxh3_128", ""}}}}}));

}  // namespace
}  // namespace titans::test
