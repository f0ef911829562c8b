#include "bundle/manifest_engines.h"

#include <algorithm>
#include <limits>
#include <set>

#include "base/error.h"
#include "base/versions.h"
#include "bundle/schedule.h"

namespace titans::core {
namespace {

// Unknown devices, compilers and aliases are accepted here. They matter only if the engine is chosen.

// An optional field; null counts as absent.
std::optional<JsonReader> present(const JsonReader& entry, const std::string& key) {
  std::optional<JsonReader> field = entry.find(key);
  if (field && field->raw().is_null()) return std::nullopt;
  return field;
}

int driver_version(const JsonReader& field) {
  return static_cast<int>(field.integer(1, std::numeric_limits<int>::max()));
}

void read_device(const JsonReader& entry, EngineRecord& engine) {
  engine.device = entry.at("device").name();
  engine.platform = entry.at("platform").name();
  constexpr std::int64_t kMostSm = 999;
  const std::optional<JsonReader> sm = present(entry, "sm");
  if (sm) {
    for (const JsonReader& one : sm->items()) engine.sm.push_back(static_cast<int>(one.integer(1, kMostSm)));
  }
  if (engine.device == "cuda" && engine.sm.empty()) entry.at("sm").fail("the compute capabilities of the engine");
  const std::optional<JsonReader> cuda = present(entry, "cuda");
  if (cuda) engine.cuda = cuda->name();
  const std::optional<JsonReader> driver = present(entry, "driver");
  engine.driver = driver ? driver_version(*driver) : 0;
}

void read_memory(const JsonReader& entry, const Manifest& manifest, EngineRecord& engine) {
  engine.memory = entry.at("memory").name();
  const std::optional<JsonReader> plugin = present(entry, "plugin");
  if (plugin) {
    engine.plugin = {plugin->at("name").name(), plugin->at("namespace").name(), plugin->at("version").name()};
  }
  if (plugin.has_value() != (engine.memory == "plugin")) {
    entry.at("memory").fail("\"plugin\" if, and only if, the engine names a plugin");
  }
  const std::optional<JsonReader> alias = present(entry, "alias");
  if (alias) engine.alias = alias->name();
  engine.state_in_place.assign(manifest.state.size(), false);
  const std::optional<JsonReader> in_place = present(entry, "state_in_place");
  if (!in_place) return;
  for (const JsonReader& name : in_place->items()) {
    const std::string wanted = name.name();
    const auto found = std::find_if(manifest.state.begin(), manifest.state.end(),
                                    [&](const StateTensor& state) { return state.name == wanted; });
    if (found == manifest.state.end()) name.fail("the name of a state tensor");
    engine.state_in_place[static_cast<std::size_t>(found - manifest.state.begin())] = true;
  }
  const bool any =
      std::find(engine.state_in_place.begin(), engine.state_in_place.end(), true) != engine.state_in_place.end();
  // Updating in place is safe only if a plugin performs the whole read-modify-write.
  if (any && (!engine.plugin || engine.alias.empty() || engine.alias == "two-buffers")) {
    in_place->fail("[], as no plugin updates this state in one buffer");
  }
}

std::vector<EngineGraph> read_graphs(const JsonReader& field, const Manifest& manifest) {
  std::vector<EngineGraph> graphs;
  for (const JsonReader& entry : field.items()) {
    const JsonReader name = entry.at("graph");
    const std::string wanted = name.name();
    const auto found = std::find_if(manifest.graphs.begin(), manifest.graphs.end(),
                                    [&](const Graph& graph) { return graph.name == wanted; });
    if (found == manifest.graphs.end()) name.fail("the name of a graph");
    const auto index = static_cast<std::size_t>(found - manifest.graphs.begin());
    const bool twice =
        std::any_of(graphs.begin(), graphs.end(), [&](const EngineGraph& other) { return other.graph == index; });
    if (twice) name.fail("a graph that the engine has once");
    EngineGraph graph{index, entry.at("file").file_name(), {}};
    const std::optional<JsonReader> weights = present(entry, "weights");
    if (weights) {
      for (const JsonReader& weight : weights->items()) graph.weights.push_back(weight.string());
    }
    graphs.push_back(std::move(graph));
  }
  std::sort(graphs.begin(), graphs.end(), [](const auto& a, const auto& b) { return a.graph < b.graph; });
  const std::string missing = missing_of_schedule(listed_graphs(manifest, graphs));
  if (!missing.empty()) field.fail(missing);
  return graphs;
}

}  // namespace

std::vector<EngineRecord> read_engines(const JsonReader& engines, const Manifest& manifest) {
  std::vector<EngineRecord> records;
  std::set<std::string> names;
  for (const JsonReader& entry : engines.items()) {
    EngineRecord engine{};
    const JsonReader name = entry.at("name");
    engine.name = name.name();
    if (engine.name.empty() || engine.name == kNoEngine) name.fail("a name other than none");
    if (!names.insert(engine.name).second) name.fail("a name that no other engine has");
    engine.target = entry.at("target").name();
    engine.compiler = entry.at("compiler").name();
    const JsonReader version = entry.at("compiler_version");
    engine.compiler_version = version.name();
    if (!Version::parse(engine.compiler_version)) version.fail("a version such as 10.3.0");
    engine.precision = entry.at("precision").name();
    read_device(entry, engine);
    read_memory(entry, manifest, engine);
    const std::optional<JsonReader> weights = present(entry, "weights");
    if (weights) engine.weights_file = weights->at("file").file_name();
    engine.graphs = read_graphs(entry.at("graphs"), manifest);
    records.push_back(std::move(engine));
  }
  return records;
}

}  // namespace titans::core
