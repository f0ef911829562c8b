// What manifest.json says (docs/bundle.md), checked.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tensor.h"

namespace titans::core {

inline constexpr std::int64_t kSchemaVersion = 1;

// One field of a packed memory row.
struct MemoryField {
  std::string name;
  std::size_t offset;  // in elements, within the last dimension
  Shape shape;
};

// What a token writes of a cache: the rows first[i] + position % period along `axis`, and nothing else.
struct WrittenRows {
  std::size_t axis;
  std::vector<std::size_t> first;
  std::uint64_t period;
};

struct StateTensor {
  std::string name;
  std::string input;   // graph input that takes it
  std::string output;  // graph output that gives its successor
  DType dtype;
  Shape shape;
  std::size_t bytes;
  std::string role;
  std::vector<MemoryField> layout;
  std::optional<WrittenRows> written = std::nullopt;
};

// What people call a field: "layers.0.memory.W0".
inline std::string field_name(const StateTensor& state, const MemoryField& field) {
  return state.name + "." + field.name;
}

struct Graph {
  std::string name;
  std::string file;
  std::int64_t tokens;
  std::int64_t align;
  std::vector<std::string> weights;  // initialisers that the runtime hands over
};

// One graph of an engine, in a file of its own.
struct EngineGraph {
  std::size_t graph;  // index into the manifest's graphs
  std::string file;
  std::vector<std::string> weights;  // initialisers that the runtime hands over, of those that the file does not hold
};

// The library that an engine calls for the memory, under these names.
struct EnginePlugin {
  std::string name;
  std::string name_space;
  std::string version;
};

// The bundle's graphs, compiled for a kind of device.
struct EngineRecord {
  std::string name;
  std::string target;            // as `titans-export build --target` takes it
  std::string compiler;          // that is, the backend: "tensorrt", "tensorrt_rtx", "onnxruntime"
  std::string compiler_version;  // "10.3.0"
  std::string precision;
  std::string device;  // "cpu" or "cuda"
  std::vector<int> sm;
  std::string platform;  // "linux-aarch64"
  std::string cuda;      // that it was made with, empty on a cpu
  int driver;            // the least cuDriverGetVersion, 0: any
  std::string memory;    // "plugin", "standard-operators", "either"
  std::optional<EnginePlugin> plugin;
  std::string alias;                 // "declared", "undeclared", "two-buffers", empty without a plugin
  std::vector<bool> state_in_place;  // for each of the manifest's state, whether one buffer serves
  std::vector<EngineGraph> graphs;   // most tokens first; the last consumes one token anywhere
};

struct FileRecord {
  std::uint64_t bytes;
  std::string hash;
};

struct Manifest {
  std::string model;           // JSON text, for people
  std::string tokenizer;       // JSON text, for people
  std::string tokenizer_file;  // empty: none
  std::string tokens_input;
  std::string position_input;
  std::string learn_input;
  std::string logits_output;
  std::int32_t vocab_size;
  std::vector<StateTensor> state;
  std::vector<Graph> graphs;  // most tokens first; the last consumes one token anywhere
  std::vector<EngineRecord> engines;
  std::string weights_file;
  std::string initial_state_file;
  std::map<std::string, FileRecord> files;

  static Manifest parse(std::string_view source);
};

}  // namespace titans::core
