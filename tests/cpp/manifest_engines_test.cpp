// The manifest's engines: accepted and rejected entries.
#include <gtest/gtest.h>

#include "engine_json.h"
#include "session/engine_choice.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

using nlohmann::json;

core::Manifest parse(const json& engine) {
  json manifest = manifest_json();
  manifest["engines"] = {engine};
  return core::Manifest::parse(manifest.dump());
}

TEST(ManifestEngines, AreRead) {
  json engine = engine_json("orin", "tensorrt", 87);
  engine["graphs"].push_back({{"graph", "prefill"}, {"file", "orin.prefill.engine"}});
  const core::EngineRecord record = parse(engine).engines.at(0);
  EXPECT_EQ(record.driver, 12060);
  EXPECT_EQ(record.plugin->name_space, "ai.titans");
  EXPECT_EQ(record.state_in_place, (std::vector<bool>{true, false}));
  ASSERT_EQ(record.graphs.size(), 2U);
  EXPECT_EQ(record.graphs[0].file, "orin.prefill.engine");  // most tokens first
  EXPECT_EQ(record.graphs[1].graph, 2U);
}

// Engines of unknown compilers only need the right form.
TEST(ManifestEngines, NewerOnesDoNotHarm) {
  json engine = engine_json("npu", "somebody", 1);
  engine.update({{"device", "npu"}, {"sm", nullptr}, {"alias", "someway"}});
  const core::Manifest manifest = parse(engine);
  const core::EngineChoice choice =
      core::choose_engine(manifest, {"cpu", "", "linux-x86_64", 0, 0, {}}, {"m", "cpu", "", "", "auto"}, "onnxruntime");
  EXPECT_EQ(choice.engine, nullptr);
}

TEST(ManifestEngines, HaveGraphsForEveryPhase) {
  json manifest = manifest_json();
  manifest["graphs"].push_back(manifest["graphs"][0]);
  manifest["graphs"][0].update({{"stride", 4}, {"offsets", {0, 1, 2}}});
  manifest["graphs"][3].update({{"name", "last"}, {"stride", 4}, {"offsets", {3}}});
  manifest["engines"] = {engine_json("orin", "tensorrt", 87)};
  expect_error(TITANS_FAILED, {"engines[0].graphs", "also at 3 modulo 4"},
               [&] { core::Manifest::parse(manifest.dump()); });
  manifest["engines"][0]["graphs"].push_back({{"graph", "last"}, {"file", "orin.last.engine"}});
  EXPECT_EQ(core::Manifest::parse(manifest.dump()).engines.at(0).graphs.size(), 2U);
}

struct Wrong {
  const char* pointer;
  json value;
};

void PrintTo(const Wrong& wrong, std::ostream* out) { *out << wrong.pointer << " = " << wrong.value; }

class WrongEngine : public testing::TestWithParam<Wrong> {};

TEST_P(WrongEngine, IsNamed) {
  json engine = engine_json("orin", "tensorrt", 87);
  const json::json_pointer pointer(GetParam().pointer);
  if (GetParam().value == "erased") {
    engine[pointer.parent_pointer()].erase(pointer.back());
  } else {
    engine[pointer] = GetParam().value;
  }
  expect_error(TITANS_FAILED, {"manifest.json", "engines[0]"}, [&] { parse(engine); });
}

INSTANTIATE_TEST_SUITE_P(
    Manifest, WrongEngine,
    testing::Values(Wrong{"/name", ""}, Wrong{"/name", "none"}, Wrong{"/name", "erased"}, Wrong{"/target", "erased"},
                    Wrong{"/compiler", 3}, Wrong{"/compiler_version", "new"}, Wrong{"/compiler_version", "10"},
                    Wrong{"/device", "erased"}, Wrong{"/platform", "erased"}, Wrong{"/sm", json::array()},
                    Wrong{"/sm", {-1}}, Wrong{"/sm", "87"}, Wrong{"/driver", "12.6"}, Wrong{"/driver", 0},
                    Wrong{"/memory", "standard-operators"}, Wrong{"/plugin", nullptr},
                    Wrong{"/plugin/version", "erased"}, Wrong{"/alias", nullptr}, Wrong{"/alias", "two-buffers"},
                    Wrong{"/state_in_place", {"other"}}, Wrong{"/graphs", json::array()},
                    Wrong{"/graphs/0/graph", "chunk"}, Wrong{"/graphs/0/graph", "other"},
                    Wrong{"/graphs/0/file", "../decode.engine"}, Wrong{"/graphs/0/file", "erased"}));

TEST(ManifestEngines, NamesAndGraphsAreUnique) {
  json manifest = manifest_json();
  manifest["engines"] = {engine_json("orin", "tensorrt", 87), engine_json("orin", "tensorrt", 87)};
  expect_error(TITANS_FAILED, {"engines[1].name"}, [&] { core::Manifest::parse(manifest.dump()); });
  json engine = engine_json("orin", "tensorrt", 87);
  engine["graphs"].push_back(engine["graphs"][0]);
  expect_error(TITANS_FAILED, {"engines[0].graphs[1].graph"}, [&] { parse(engine); });
}

}  // namespace
}  // namespace titans::test
