// The checked contents of manifest.json (docs/bundle.md).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/tensor.h"
#include "bundle/field_dtype.h"
#include "titans/titans.h"

namespace titans::core {

inline constexpr std::int64_t kSchemaVersion = 2;

// When a packed row's field is written, in a memory with chunks.
enum class Written : std::uint8_t {
  kToken,  // by every token
  kRow,    // row i by the i-th token of a chunk; nothing reads the row before
  kChunk,  // by the token that completes a chunk
};

// The kinds of fields that the runtime uses; other kinds are passed through.
namespace field_kinds {
inline constexpr std::string_view kWeights = "weights";
inline constexpr std::string_view kSurprise = "surprise";
inline constexpr std::string_view kGradientPoint = "gradient_point";
inline constexpr std::string_view kRoundingError = "rounding_error";
inline constexpr std::string_view kUpdateCount = "update_count";
}  // namespace field_kinds

// One field of a packed memory row.
struct MemoryField {
  std::string name;
  std::size_t offset;  // in 32-bit words within the last dimension
  Shape shape;
  FieldDtype dtype = FieldDtype::kFloat32;
  std::string kind = {};  // empty: unknown
  Written written = Written::kToken;
  std::string of = {};                           // rounding error: the rounded field
  std::optional<float> at_start = std::nullopt;  // written by every token: the value at a chunk start
};

std::string_view written_name(Written written);

// True for the fields whose norm shows whether the memory diverges.
inline bool has_norm(const MemoryField& field) {
  return field.kind == field_kinds::kWeights || field.kind == field_kinds::kSurprise;
}

// The policy of that name, as in titans_guard_policy: "off", "raise", "freeze", "skip", "rewind", "decay", "restart".
std::optional<std::int32_t> guard_policy_named(std::string_view name);
std::string_view guard_policy_name(std::int32_t policy);

// Counts the rows of a stream. Each token adds one row. The last token of each `segment` adds `longterm` more.
struct StreamRows {
  std::uint64_t segment = 1;
  std::uint64_t longterm = 0;

  // The number of rows before the token at `position`.
  std::uint64_t before(std::uint64_t position) const { return position + longterm * (position / segment); }
};

// The cache rows that one stream row writes: first[i] + row % period along `axis`, and no others.
struct WrittenRows {
  std::size_t axis;
  std::vector<std::size_t> first;
  std::uint64_t period;
};

struct StateTensor {
  std::string name;
  std::string input;   // graph input
  std::string output;  // graph output with its next value
  DType dtype;
  Shape shape;
  std::size_t bytes;
  std::string role;
  std::vector<MemoryField> layout;
  std::optional<WrittenRows> written = std::nullopt;
  // Rows per chunk of a memory. Within a chunk, only fields written by every token and rows of the open chunk change.
  std::optional<std::uint64_t> chunk = std::nullopt;
  StreamRows rows = {};  // the rows counted by `written` and `chunk`
  std::string op = {};   // the operator that updates a memory; empty: unknown
};

// The field's public name: "layers.0.memory.W0".
inline std::string field_name(const StateTensor& state, const MemoryField& field) {
  return state.name + "." + field.name;
}

struct Graph {
  std::string name;
  std::string file;
  std::int64_t tokens;
  std::int64_t stride;
  std::vector<std::string> weights;         // initialisers that the runtime provides
  std::vector<std::int64_t> offsets = {0};  // the graph may start if position % stride is one of these; ascending
};

// A stream's input: token ids, or vectors of floats. A vector counts as one token.
enum class InputKind : std::uint8_t { kTokens, kVectors };

inline std::string_view input_kind_name(InputKind kind) { return kind == InputKind::kTokens ? "tokens" : "vectors"; }

// One graph of an engine, with its file.
struct EngineGraph {
  std::size_t graph;  // index into the manifest's graphs
  std::string file;
  std::vector<std::string> weights;  // initialisers outside the file, which the runtime provides
};

// The plugin that an engine calls for the memory.
struct EnginePlugin {
  std::string name;
  std::string name_space;
  std::string version;
};

// The bundle's graphs compiled for a kind of device.
struct EngineRecord {
  std::string name;
  std::string target;            // as in `titans-export build --target`
  std::string compiler;          // also the backend: "tensorrt", "tensorrt_rtx", "onnxruntime"
  std::string compiler_version;  // "10.3.0"
  std::string precision;
  std::string device;  // "cpu" or "cuda"
  std::vector<int> sm;
  std::string platform;  // "linux-aarch64"
  std::string cuda;      // CUDA version of the build; empty for a CPU
  int driver;            // minimum cuDriverGetVersion; 0: any
  std::string memory;    // "plugin", "standard-operators", "either"
  std::optional<EnginePlugin> plugin;
  std::string alias;                 // "declared", "undeclared", "two-buffers"; empty without a plugin
  std::vector<bool> state_in_place;  // per state tensor of the manifest: updated in place
  std::string weights_file;          // a file with the engine's own weights; empty: none
  std::vector<EngineGraph> graphs;   // most tokens first; at every position one with a single token may start
};

struct FileRecord {
  std::uint64_t bytes;
  std::string hash;
};

// The norm of a memory field, over all its elements, as the bundle's calibration saw it.
struct GuardField {
  std::string name;                            // "layers.0.memory.W0"
  std::optional<double> seen = std::nullopt;   // the largest of all heads
  std::optional<double> limit = std::nullopt;  // of a healthy memory
};

// What a bundle gives its streams: norms for their health, and a guard.
struct GuardRecord {
  std::int32_t policy = TITANS_GUARD_OFF;
  std::uint64_t restart_every = 0;  // tokens; 0: never
  std::vector<GuardField> fields;
};

class JsonReader;

// Reads the layout of a state tensor of that shape from the manifest's `state` or a state file. Empty if there is none.
std::vector<MemoryField> read_layout(const JsonReader& state, const Shape& shape);

struct Manifest {
  std::string model;           // JSON text, for users
  std::string memory;          // JSON text, for users: dtype, rounding and seed of low-precision memories
  std::string tokenizer;       // JSON text, for users
  std::string tokenizer_file;  // empty: none
  std::string position_input;
  std::string learn_input;
  std::string valid_input;  // empty: graphs have none
  std::string slots_input;  // empty: graphs take one stream
  InputKind input_kind = InputKind::kTokens;
  std::string input;         // graph input for tokens or vectors
  std::int64_t input_size;   // floats per vector, or the vocabulary size
  std::string output;        // graph output with logits or vectors
  std::int64_t output_size;  // floats per output row
  std::vector<StateTensor> state;
  std::vector<Graph> graphs;  // most tokens first; at every position one with a single token may start
  std::vector<EngineRecord> engines;
  GuardRecord guard;
  std::string weights_file;
  std::string initial_state_file;
  std::map<std::string, FileRecord> files;

  DType input_dtype() const { return input_kind == InputKind::kTokens ? DType::kInt64 : DType::kFloat32; }
  // Bytes per token or vector in the graph's input.
  std::size_t input_row_bytes() const {
    const std::size_t elements = input_kind == InputKind::kTokens ? 1 : static_cast<std::size_t>(input_size);
    return elements * dtype_info(input_dtype()).bytes;
  }
  // True if a graph call may take several streams, whose state lies in pools.
  bool takes_streams() const { return !slots_input.empty(); }
  Shape input_shape(const Graph& graph, std::int64_t streams = 1) const {
    return input_kind == InputKind::kTokens ? Shape{streams, graph.tokens} : Shape{streams, graph.tokens, input_size};
  }
  Shape output_shape(const Graph& graph, std::int64_t streams = 1) const {
    return {streams, graph.tokens, output_size};
  }

  static Manifest parse(std::string_view source);
};

// The runnable graphs of an engine, or of a bundle without one.
inline std::vector<Graph> listed_graphs(const Manifest& manifest, const std::vector<EngineGraph>& listed) {
  std::vector<Graph> graphs;
  for (const EngineGraph& graph : listed) graphs.push_back(manifest.graphs[graph.graph]);
  return graphs;
}

}  // namespace titans::core
