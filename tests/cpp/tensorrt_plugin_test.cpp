// The plugin's answers to TensorRT's builder, through the plugin's own interface. Runs on the library with the test
// double and, if TITANS_TENSORRT_PLUGIN names it, on the one with the CUDA kernel. No test needs a GPU.
#include <cstdlib>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "tensorrt_plugin_runner.h"

namespace {

using namespace titans::plugin_host;
using namespace titans::kernels;
using nvinfer1::DataType;
using nvinfer1::TensorRTPhase;

const std::vector<DataType> kTypes{DataType::kFLOAT, DataType::kHALF, DataType::kINT8,
                                   DataType::kINT32, DataType::kBOOL, DataType::kUINT8,
                                   DataType::kFP8,   DataType::kBF16, DataType::kINT64};

std::vector<std::string> libraries() {
  std::vector<std::string> paths{TITANS_PLUGIN_DOUBLE};
  if (const char* path = std::getenv("TITANS_TENSORRT_PLUGIN")) paths.emplace_back(path);
  return paths;
}

class PluginLibrary : public testing::TestWithParam<std::string> {
 protected:
  PluginLibrary() : library(GetParam()) {}
  void TearDown() override { EXPECT_EQ(library.messages(), ""); }

  Fields fields(const std::string& alias = "undeclared") const {
    return Fields(problem.attributes, kInputNames, kOutputNames, alias);
  }
  Built built(Fields from) const { return build(library, std::move(from), ranges(problem), false); }
  Plugin create(Fields& from, TensorRTPhase phase = TensorRTPhase::kBUILD) const {
    return Plugin(library.creator().createPlugin("layer", &from.collection(), phase));
  }
  static nvinfer1::IPluginV3OneBuildV2& build_side(const Plugin& plugin) {
    return *static_cast<nvinfer1::IPluginV3OneBuildV2*>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
  }
  void expect_message(const std::string& words) {
    const std::string messages = library.messages();
    EXPECT_NE(messages.find(words), std::string::npos) << "expected: " << words << "\ngot: " << messages;
    EXPECT_TRUE(is_one_error(messages)) << messages;
    EXPECT_EQ(messages.rfind("[NeuralMemory] ", 0), 0U) << messages;
  }

  Library library;
  Problem problem;
};

INSTANTIATE_TEST_SUITE_P(All, PluginLibrary, testing::ValuesIn(libraries()),
                         [](const auto& info) { return info.index == 0 ? "Double" : "Cuda"; });

TEST_P(PluginLibrary, NamesTheFieldsThatTheParserShallPass) {
  std::set<std::string> names;
  const nvinfer1::PluginFieldCollection* known = library.creator().getFieldNames();
  for (std::int32_t i = 0; i < known->nbFields; ++i) names.insert(known->fields[i].name);
  std::set<std::string> expected{"alias", "inputs", "outputs"};
  for (const auto& row : kAttributes) expected.emplace(row.name);
  EXPECT_EQ(names, expected);
}

TEST_P(PluginLibrary, GivesTypesAndShapesWithSizesLeftOpen) {
  const Built b = built(fields());
  EXPECT_EQ(b.output_types, (std::vector<DataType>(3, DataType::kFLOAT)));
  const std::int64_t row = RowLayout(problem.configuration).size;
  EXPECT_EQ(b.most_outputs, (std::vector<std::vector<std::int64_t>>{
                                {2, 3, kMostTokens, Problem::kWidth}, {2, 3, row}, {2, 3, kStatCount}}));
}

TEST_P(PluginLibrary, GivesTheShapeOfThePoolToTheStateAlone) {
  // More slots than streams, and any number of streams.
  Fields with_slots(problem.attributes, "state,q,k,v,step_size,momentum,forget_gate,fill,slots", "y,state_out,stats",
                    "undeclared");
  std::vector<Range> inputs = ranges(problem);
  inputs[0].least[0] = inputs[0].typical[0] = inputs[0].most[0] = 7;
  inputs[8] = {DataType::kINT64, {2}, {2}, {2}};
  for (std::size_t i = 1; i < inputs.size(); ++i) {
    inputs[i].least[0] = 1;
    inputs[i].most[0] = 5;
  }
  const Built b = build(library, with_slots, inputs, false);
  EXPECT_EQ(b.most_outputs[0][0], 5);
  EXPECT_EQ(b.most_outputs[1][0], 7);
  EXPECT_EQ(b.most_outputs[2][0], 5);
}

TEST_P(PluginLibrary, ReadsWithoutUpdating) {
  Attributes a = problem.attributes;
  a.mode = "read";
  const std::vector<Range> all = ranges(problem, DataType::kHALF);
  const Built b = build(library, Fields(a, "state,q", "y", "declared"), {all[0], all[1]}, false);
  EXPECT_EQ(b.output_types, std::vector<DataType>{DataType::kHALF});
  EXPECT_EQ(b.aliases, std::vector<std::int32_t>{-1});
}

TEST_P(PluginLibrary, AliasesTheStateOnlyWhereItIsDeclared) {
  EXPECT_EQ(built(fields("declared")).aliases, (std::vector<std::int32_t>{-1, 0, -1}));
  EXPECT_EQ(built(fields("undeclared")).aliases, (std::vector<std::int32_t>{-1, -1, -1}));
  EXPECT_EQ(built(fields("two-buffers")).aliases, (std::vector<std::int32_t>{-1, -1, -1}));
  Fields left_out = fields();
  left_out.remove("alias");
  const Built without = built(left_out);
  EXPECT_EQ(without.aliases, (std::vector<std::int32_t>{-1, -1, -1}));
  EXPECT_NE(without.timing_cache_id.find("alias=two-buffers "), std::string::npos) << without.timing_cache_id;
}

TEST_P(PluginLibrary, TakesTheTypesOfTheOperatorAndNoOthers) {
  Fields from = fields();
  const Plugin plugin = create(from);
  ASSERT_NE(plugin, nullptr);
  const std::vector<Range> inputs = ranges(problem);
  const std::set<DataType> values{DataType::kFLOAT, DataType::kHALF, DataType::kBF16}, f32{DataType::kFLOAT},
      i64{DataType::kINT64}, flags{DataType::kBOOL, DataType::kINT32, DataType::kINT64};
  for (const DataType q : values) {
    std::vector<nvinfer1::DynamicPluginTensorDesc> tensors;
    for (const Range& input : ranges(problem, q)) tensors.push_back(open_tensor(input));
    tensors.push_back(tensors[1]);
    tensors.push_back(tensors[0]);
    tensors.push_back(open_tensor({DataType::kFLOAT, {2, 3, 4}, {2, 3, 4}, {2, 3, 4}}));
    const std::vector<std::set<DataType>> expected{f32, values, {q}, {q}, f32, f32, f32, i64, flags, {q}, f32, f32};
    for (std::size_t at = 0; at < tensors.size(); ++at) {
      for (const DataType type : kTypes) {
        std::vector<nvinfer1::DynamicPluginTensorDesc> asked(tensors.begin(),
                                                             tensors.begin() + static_cast<std::ptrdiff_t>(at) + 1);
        asked[at].desc.type = type;
        // The vector ends with the queried tensor, because the plugin may not look at later ones.
        const auto supports = [&] {
          return build_side(plugin).supportsFormatCombination(static_cast<std::int32_t>(at), asked.data(), 9, 3);
        };
        EXPECT_EQ(supports(), expected[at].count(type) == 1) << at << " of type " << static_cast<int>(type);
        asked[at].desc.format = nvinfer1::TensorFormat::kCHW4;
        EXPECT_FALSE(supports()) << at;
      }
    }
  }
}

TEST_P(PluginLibrary, AsksForMoreWorkspaceForMore) {
  std::size_t last = 0;
  for (const std::int64_t tokens : {1, 16, 256, 4096}) {
    const Built b = build(library, fields(), ranges(problem, DataType::kFLOAT, DataType::kINT64, tokens), false);
    EXPECT_GE(b.workspace, last) << tokens;
    last = b.workspace;
  }
  EXPECT_GT(last, 0U);
}

TEST_P(PluginLibrary, AnEngineKeepsAllThatTheNodeIs) {
  Attributes a = problem.attributes;
  a.activation = "gelu";
  a.memory_dtype = "bfloat16";
  a.residual = a.layer_norm = 1;
  const std::string names = std::string(kInputNames) + ",norm_scale";
  Problem other;
  other.attributes = a;
  configure(a, other.configuration);
  std::vector<Range> inputs = ranges(other);
  inputs.push_back({DataType::kFLOAT, {3, 6}, {3, 6}, {3, 6}});
  const Built b = build(library, Fields(a, names, "y,state_out", "declared"), inputs, false);
  for (const char* part :
       {"mode=update", "schedule=any", "activation=gelu", "memory_dtype=bfloat16", "rounding=nearest", "widths=6x10x6",
        "residual=1", "layer_norm=1", "chunk_size=4", "alias=declared",
        "inputs=state,q,k,v,step_size,momentum,forget_gate,fill,learn,norm_scale", "outputs=y,state_out "}) {
    EXPECT_NE((b.timing_cache_id + " ").find(part), std::string::npos) << b.timing_cache_id;
  }
  // A written and reread plugin is unchanged, also in the second generation.
  Fields kept = b.engine;
  for (int generation = 0; generation < 2; ++generation) {
    const Plugin plugin = create(kept, TensorRTPhase::kRUNTIME);
    ASSERT_NE(plugin, nullptr);
    auto* runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
    kept = Fields(*runtime->getFieldsToSerialize());
    EXPECT_EQ(build_side(plugin).getTimingCacheID(), b.timing_cache_id);
    EXPECT_TRUE(kept.has("built_for"));
  }
}

TEST_P(PluginLibrary, TakesFieldsAsOthersWriteThem) {
  Fields other = fields();
  other.set_int64("widths", {6, 10, 6});
  other.set_int64("chunk_size", {4});
  other.set_text("mode", "update", false);
  for (const char* name : {"memory_dtype", "rounding", "seed", "residual", "layer_norm"}) other.remove(name);
  EXPECT_EQ(built(other).timing_cache_id, built(fields()).timing_cache_id);
}

TEST_P(PluginLibrary, TheSeedHas32BitsHoweverItComes) {
  Fields given = fields();
  given.set_text("memory_dtype", "int8");
  given.set_text("rounding", "stochastic");
  const auto described = [&] {
    const Plugin plugin = create(given);
    return plugin == nullptr ? std::string() : std::string(build_side(plugin).getTimingCacheID());
  };
  given.set_int32("seed", {-2});
  const std::string as_int32 = described();
  for (const char* part : {"memory_dtype=int8 ", "rounding=stochastic ", "seed=-2 "}) {
    EXPECT_NE(as_int32.find(part), std::string::npos) << as_int32;
  }
  given.set_int64("seed", {4294967294});
  EXPECT_EQ(described(), as_int32);
  given.set_int64("seed", {2});
  EXPECT_NE(described().find("seed=2 "), std::string::npos) << described();
}

TEST_P(PluginLibrary, RefusesWrongFieldsByName) {
  const auto expect = [&](const std::string& words, const std::function<void(Fields&)>& change) {
    Fields from = fields();
    change(from);
    EXPECT_EQ(create(from), nullptr) << words;
    expect_message(words);
  };
  expect("missing attribute: mode", [](Fields& f) { f.remove("mode"); });
  expect("missing attribute: widths", [](Fields& f) { f.remove("widths"); });
  expect("missing attribute: plugin field inputs", [](Fields& f) { f.remove("inputs"); });
  expect("invalid plugin field mode: expected characters, got field type 5",
         [](Fields& f) { f.set_int32("mode", {1}); });
  expect("invalid plugin field widths: expected int32 or int64, got field type 6",
         [](Fields& f) { f.set_text("widths", "6,6"); });
  expect("invalid plugin field chunk_size: expected int32 or int64, got field type 1",
         [](Fields& f) { f.set_float("chunk_size", 4.0F); });
  expect("invalid plugin field chunk_size: expected one value, got 2",
         [](Fields& f) { f.set_int32("chunk_size", {4, 4}); });
  expect("invalid attribute mode: expected \"update\" or \"read\", got \"write\"",
         [](Fields& f) { f.set_text("mode", "write"); });
  expect("invalid attribute widths: expected 2 to 4 values, got 1", [](Fields& f) { f.set_int32("widths", {6}); });
  expect("invalid attribute chunk_size: expected [1,", [](Fields& f) { f.set_int32("chunk_size", {0}); });
  expect("invalid attribute residual: expected 0 or 1, got 2", [](Fields& f) { f.set_int32("residual", {2}); });
  expect("invalid attribute memory_dtype: expected", [](Fields& f) { f.set_text("memory_dtype", "int4"); });
  expect("invalid attribute rounding: expected \"nearest\" or \"stochastic\"",
         [](Fields& f) { f.set_text("rounding", "up"); });
  expect("memory_dtype \"float32\" needs rounding \"nearest\"",
         [](Fields& f) { f.set_text("rounding", "error_feedback"); });
  expect("seed needs rounding \"stochastic\", got \"nearest\"", [](Fields& f) { f.set_int32("seed", {3}); });
  expect("invalid plugin field seed: expected one value, got 2", [](Fields& f) { f.set_int32("seed", {4, 4}); });
  expect("invalid plugin field alias: expected \"declared\" or \"undeclared\" or \"two-buffers\", got \"both\"",
         [](Fields& f) { f.set_text("alias", "both"); });
  expect("invalid plugin field \"loss_scale\"", [](Fields& f) { f.set_float("loss_scale", 0.5F); });
  expect("invalid plugin field \"gates\"", [](Fields& f) { f.set_text("gates", "chunk"); });
  expect("invalid plugin field inputs: expected names of operands, separated by commas, got \"modulation\"",
         [](Fields& f) { f.set_text("inputs", "state,q,k,v,step_size,momentum,forget_gate,fill,modulation"); });
  expect("invalid plugin field inputs: expected names of operands, separated by commas, got \"w\"",
         [](Fields& f) { f.set_text("inputs", "state,q,w"); });
  expect("invalid plugin field outputs: expected names of operands, separated by commas, got \"state\"",
         [](Fields& f) { f.set_text("outputs", "y,state"); });
  expect("invalid plugin field inputs: expected names of operands, separated by commas, got \"\"",
         [](Fields& f) { f.set_text("inputs", ""); });
  expect("invalid plugin field inputs: expected operands in the operator's order, each once",
         [](Fields& f) { f.set_text("inputs", "q,state"); });
  expect("invalid plugin field outputs: expected operands in the operator's order, each once",
         [](Fields& f) { f.set_text("outputs", "y,y"); });
  expect("missing operand: fill in field inputs",
         [](Fields& f) { f.set_text("inputs", "state,q,k,v,step_size,momentum,forget_gate"); });
  expect("missing operand: state_out in field outputs", [](Fields& f) { f.set_text("outputs", "y"); });
  expect("unexpected operand: fill in field inputs with mode \"update\", schedule \"aligned\"",
         [](Fields& f) { f.set_text("schedule", "aligned"); });
  expect("unexpected operand: k in field inputs with mode \"read\"", [](Fields& f) { f.set_text("mode", "read"); });
  expect("missing operand: norm_scale in field inputs", [](Fields& f) { f.set_int32("layer_norm", {1}); });
  expect("invalid plugin field built_for: expected 3 values, got 1", [](Fields& f) { f.set_int32("built_for", {87}); });
  EXPECT_EQ(library.creator().createPlugin("layer", nullptr, TensorRTPhase::kBUILD), nullptr);
  expect_message("missing attribute: no plugin fields");
}

TEST_P(PluginLibrary, RefusesWrongTensorsAtBuildTime) {
  const auto expect = [&](const std::string& words, const std::function<void(std::vector<Range>&)>& change) {
    std::vector<Range> inputs = ranges(problem);
    change(inputs);
    try {
      build(library, fields(), inputs, false);
      ADD_FAILURE() << "built, although it should say: " << words;
    } catch (const std::runtime_error& error) {
      EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
    }
  };
  const auto all = [](Range& range, std::vector<std::int64_t> shape) {
    range.least = range.typical = range.most = shape;
  };
  expect("expected 8 and 3 names, got 9 and 3", [](auto& inputs) { inputs.pop_back(); });
  expect("wrong rank of state: expected 3, got 2", [&](auto& inputs) { all(inputs[0], {2, 3}); });
  expect("wrong rank of q: expected 4, got 3", [&](auto& inputs) { all(inputs[1], {2, 3, 6}); });
  expect("wrong width of q: expected 6, got 5", [&](auto& inputs) { all(inputs[1], {2, 3, 9, 5}); });
  expect("wrong row size of state: expected 384, got 368", [&](auto& inputs) { all(inputs[0], {2, 3, 368}); });
  expect("supportsFormatCombination failed", [](auto& inputs) { inputs[2].type = DataType::kHALF; });
  expect("wrong dtype of q: expected float32, float16 or bfloat16",
         [](auto& inputs) { inputs[1].type = DataType::kINT8; });
  // Without dynamic sizes, all shapes are compared.
  expect("wrong shape of k: expected (2, 3, 9, 6), got (2, 3, 8, 6)", [&](auto& inputs) {
    for (Range& input : inputs) input.least = input.most;
    all(inputs[2], {2, 3, 8, 6});
  });
  expect("wrong shape of momentum: expected (2, 3, 9), got (2, 2, 9)", [&](auto& inputs) {
    for (Range& input : inputs) input.least = input.most;
    all(inputs[5], {2, 2, 9});
  });
}

TEST_P(PluginLibrary, AnEngineNamesWhatItsFieldsLack) {
  Fields kept = built(fields()).engine;
  kept.remove("inputs");
  EXPECT_EQ(create(kept, TensorRTPhase::kRUNTIME), nullptr);
  expect_message("missing attribute: plugin field inputs");
}

}  // namespace
