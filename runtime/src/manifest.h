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
  std::string weights_file;
  std::string initial_state_file;
  std::map<std::string, FileRecord> files;

  static Manifest parse(std::string_view source);
};

}  // namespace titans::core
