#include "bundle/manifest.h"

#include <algorithm>
#include <array>
#include <limits>
#include <set>
#include <utility>

#include "base/error.h"
#include "base/json_reader.h"
#include "base/names.h"
#include "bundle/manifest_engines.h"
#include "bundle/schedule.h"

namespace titans::core {
namespace {

constexpr std::string_view kWhere = "manifest.json";
// Limits memory: parsed JSON is many times larger. A model of a hundred layers needs a tenth of this.
constexpr std::size_t kLongest = std::size_t{16} << 20;
constexpr std::int64_t kLargestSize = std::numeric_limits<std::int32_t>::max();

void require(const JsonReader& field, std::string_view value) {
  if (field.string() != value) field.fail(text('"', value, '"'));
}

std::optional<WrittenRows> read_written(const JsonReader& state, const Shape& shape) {
  const std::optional<JsonReader> entry = state.find("written");
  if (!entry) return std::nullopt;
  WrittenRows written{};
  written.axis = static_cast<std::size_t>(entry->at("axis").integer(0, static_cast<std::int64_t>(shape.size()) - 1));
  const std::int64_t rows = shape[written.axis];
  const std::int64_t period = entry->at("period").integer(1, rows);
  written.period = static_cast<std::uint64_t>(period);
  std::int64_t least = 0;
  for (const JsonReader& first : entry->at("first").items()) {
    written.first.push_back(static_cast<std::size_t>(first.integer(least, rows - period)));
    least = static_cast<std::int64_t>(written.first.back()) + period;
  }
  return written;
}

StreamRows read_rows(const JsonReader& state) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  const std::optional<JsonReader> entry = state.find("rows");
  if (!entry) return {};
  return {static_cast<std::uint64_t>(entry->at("segment").integer(1, kMost)),
          static_cast<std::uint64_t>(entry->at("longterm").integer(0, kMost))};
}

StateTensor read_state(const JsonReader& entry) {
  StateTensor state;
  state.name = entry.at("name").name();
  state.input = entry.at("input").name();
  state.output = entry.at("output").name();
  const JsonReader dtype = entry.at("dtype");
  const std::optional<DType> known = dtype_named(dtype.string(), &DTypeInfo::name);
  if (!known) dtype.fail("an element type such as float32");
  state.dtype = *known;
  const JsonReader shape = entry.at("shape");
  state.shape = shape.shape(1);
  const std::optional<std::size_t> bytes = tensor_bytes(state.shape, state.dtype);
  if (state.shape.empty() || state.shape[0] != 1 || !bytes) shape.fail("a shape [1, ...] for one stream");
  state.bytes = *bytes;
  state.role = entry.at("role").name();
  state.layout = read_layout(entry, state.shape);
  state.written = read_written(entry, state.shape);
  if (const std::optional<JsonReader> chunk = entry.find("chunk")) {
    state.chunk = static_cast<std::uint64_t>(chunk->integer(1, std::numeric_limits<std::int32_t>::max()));
    if (state.role != "memory") chunk->fail("no chunk, as role is not memory");
  }
  state.rows = read_rows(entry);
  if (const std::optional<JsonReader> op = entry.find("operator")) state.op = op->name();
  if (state.role == "memory" && state.dtype != DType::kFloat32) dtype.fail("float32, as its role is memory");
  return state;
}

Graph read_graph(const JsonReader& entry) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  Graph graph{entry.at("name").name(),
              entry.at("file").file_name(),
              entry.at("tokens").integer(1, kMost),
              entry.at("stride").integer(1, kMost),
              {}};
  for (const JsonReader& weight : entry.at("weights").items()) graph.weights.push_back(weight.string());
  const std::optional<JsonReader> offsets = entry.find("offsets");
  if (!offsets) return graph;
  graph.offsets.clear();
  for (const JsonReader& offset : offsets->items()) {
    const std::int64_t value = offset.integer(0);
    const bool ascends = graph.offsets.empty() || value > graph.offsets.back();
    if (!ascends || value >= graph.stride)
      offset.fail(text("above the offset before it and below stride, ", graph.stride));
    graph.offsets.push_back(value);
  }
  if (graph.offsets.empty()) offsets->fail("at least one of the positions modulo stride");
  return graph;
}

// The tokenizer's file; empty if it has none.
std::string read_tokenizer_file(const JsonReader& tokenizer) {
  if (!tokenizer.raw().is_object()) return {};
  const std::optional<JsonReader> kind = tokenizer.find("kind");
  return kind && kind->raw() == "file" ? tokenizer.at("file").file_name() : std::string();
}

// The scheduler takes the first graph that fits, so graphs are sorted by descending tokens.
void sort_graphs(const JsonReader& field, std::vector<Graph>& graphs) {
  std::stable_sort(graphs.begin(), graphs.end(), [](const Graph& a, const Graph& b) { return a.tokens > b.tokens; });
  const std::string missing = missing_of_schedule(graphs);
  if (!missing.empty()) field.fail(missing);
}

void read_input(const JsonReader& input, Manifest& manifest) {
  const JsonReader kind = input.at("kind");
  const std::string name = kind.string();
  if (name == input_kind_name(InputKind::kVectors)) {
    manifest.input_kind = InputKind::kVectors;
  } else if (name != input_kind_name(InputKind::kTokens)) {
    kind.fail("\"tokens\" or \"vectors\"");
  }
  const bool tokens = manifest.input_kind == InputKind::kTokens;
  require(input.at("dtype"), dtype_info(manifest.input_dtype()).name);
  manifest.input = input.at("name").name();
  manifest.input_size = input.at(tokens ? "vocab_size" : "size").integer(1, kLargestSize);
}

void read_output(const JsonReader& output, Manifest& manifest) {
  const bool tokens = manifest.input_kind == InputKind::kTokens;
  require(output.at("kind"), tokens ? "logits" : "vectors");
  require(output.at("dtype"), "float32");
  manifest.output = output.at("name").name();
  const JsonReader size = output.at("size");
  manifest.output_size =
      tokens ? size.integer(manifest.input_size, manifest.input_size) : size.integer(1, kLargestSize);
}

// Names bound by graphs must be unique.
void check_names(const JsonReader& document, const Manifest& manifest) {
  std::set<std::string> inputs{manifest.input, manifest.position_input, manifest.learn_input};
  std::size_t controls = 3;
  for (const std::string& optional : {manifest.valid_input, manifest.slots_input}) {
    if (optional.empty()) continue;
    inputs.insert(optional);
    ++controls;
  }
  std::set<std::string> outputs{manifest.output};
  std::set<std::string> names;
  std::set<std::string> memories;
  const auto fail = [&](const std::string& name) {
    document.at("state").fail(text("unique names of tensors and fields, but ", name, " repeats"));
  };
  if (inputs.size() != controls) document.at("controls").fail("different names for the input and all controls");
  for (const StateTensor& state : manifest.state) {
    if (!names.insert(state.name).second || !inputs.insert(state.input).second ||
        !outputs.insert(state.output).second) {
      fail(state.name);
    }
    if (state.layout.empty() && !memories.insert(state.name).second) fail(state.name);
    for (const MemoryField& field : state.layout) {
      const std::string full = field_name(state, field);
      if (!memories.insert(full).second) fail(full);
    }
  }
  for (const std::string& output : outputs) {
    if (inputs.count(output) != 0) {
      document.at("state").fail(text("outputs that are not inputs, but ", output, " is both"));
    }
  }
}

constexpr std::array<std::string_view, 3> kWrittenNames{"token", "row", "chunk"};

// Reads a field's kind and when it is written. Defaults: no kind, written by every token.
void read_kind(const JsonReader& entry, MemoryField& field) {
  if (const std::optional<JsonReader> kind = entry.find("kind")) field.kind = kind->name();
  if (const std::optional<JsonReader> of = entry.find("of")) field.of = of->name();
  if (const std::optional<JsonReader> written = entry.find("written")) {
    const auto* const found = std::find(kWrittenNames.begin(), kWrittenNames.end(), written->string());
    if (found == kWrittenNames.end()) written->fail("token, row or chunk");
    field.written = static_cast<Written>(found - kWrittenNames.begin());
  }
  if (const std::optional<JsonReader> start = entry.find("at_start")) {
    field.at_start = static_cast<float>(start->integer(0, 1));
  }
}

constexpr std::array<std::string_view, 7> kPolicyNames{"off", "raise", "freeze", "skip", "rewind", "decay", "restart"};

// True for a field of a memory whose norm a guard limits: weights, surprise, or a memory without a layout.
bool names_norm(const Manifest& manifest, std::string_view name) {
  return std::any_of(manifest.state.begin(), manifest.state.end(), [&](const StateTensor& state) {
    if (state.role != "memory") return false;
    if (state.layout.empty()) return state.name == name;
    return std::any_of(state.layout.begin(), state.layout.end(),
                       [&](const MemoryField& field) { return has_norm(field) && field_name(state, field) == name; });
  });
}

GuardRecord read_guard(const JsonReader& entry, const Manifest& manifest) {
  GuardRecord guard;
  if (const std::optional<JsonReader> policy = entry.find("policy")) {
    const std::optional<std::int32_t> known = guard_policy_named(policy->string());
    if (!known) policy->fail("off, raise, freeze, skip, rewind, decay or restart");
    guard.policy = *known;
  }
  if (const std::optional<JsonReader> every = entry.find("restart_every")) {
    guard.restart_every = static_cast<std::uint64_t>(every->integer(0));
  }
  for (const auto& [name, field] : entry.at("fields").members()) {
    if (!names_norm(manifest, name)) field.fail("the name of a memory's weights or surprise as key");
    GuardField& added = guard.fields.emplace_back();
    added.name = name;
    if (const std::optional<JsonReader> seen = field.find("seen")) added.seen = seen->number();
    if (const std::optional<JsonReader> limit = field.find("limit")) added.limit = limit->number(true);
  }
  return guard;
}

// The manifest's section about low-precision memories.
std::string read_memory(const JsonReader& document) {
  const std::optional<JsonReader> quantization = document.find("quantization");
  const bool listed = quantization && quantization->raw().is_object();
  const std::optional<JsonReader> memory = listed ? quantization->find("memory") : std::nullopt;
  return memory ? memory->raw().dump() : R"({"dtype":"float32","rounding":"nearest","seed":0})";
}

}  // namespace

std::optional<std::int32_t> guard_policy_named(std::string_view name) {
  const auto* const found = std::find(kPolicyNames.begin(), kPolicyNames.end(), name);
  if (found == kPolicyNames.end()) return std::nullopt;
  return static_cast<std::int32_t>(found - kPolicyNames.begin());
}

std::string_view guard_policy_name(std::int32_t policy) { return kPolicyNames.at(static_cast<std::size_t>(policy)); }

std::string_view written_name(Written written) { return kWrittenNames[static_cast<std::size_t>(written)]; }

std::vector<MemoryField> read_layout(const JsonReader& state, const Shape& shape) {
  std::vector<MemoryField> layout;
  const std::optional<JsonReader> fields = state.find("layout");
  if (!fields || shape.empty()) return layout;
  for (const JsonReader& field : fields->items()) {
    MemoryField memory{field.at("name").name(), 0, field.at("shape").shape(1)};
    if (const std::optional<JsonReader> dtype = field.find("dtype")) {
      const std::optional<FieldDtype> known = field_dtype_named(dtype->string());
      if (!known) dtype->fail("a dtype that this runtime knows: " + field_dtype_names());
      memory.dtype = *known;
    }
    read_kind(field, memory);
    const std::optional<std::size_t> bytes = tensor_bytes(memory.shape, DType::kFloat32);
    const auto row = static_cast<std::size_t>(shape.back());
    const std::size_t words = bytes ? field_words(memory.dtype, memory.shape) : row + 1;
    if (words > row) field.fail(text("a field of at most ", row, " elements"));
    memory.offset = static_cast<std::size_t>(field.at("offset").integer(0, static_cast<std::int64_t>(row - words)));
    layout.push_back(std::move(memory));
  }
  return layout;
}

Manifest Manifest::parse(std::string_view source) {
  if (source.size() > kLongest) {
    throw Error(TITANS_FAILED, "E0205", kWhere, text("expected at most ", kLongest, " bytes, got ", source.size()),
                "export the bundle again");
  }
  const nlohmann::json json = JsonReader::parse(source, kWhere);
  const JsonReader document(json, kWhere);
  require(document.at("format"), "titans-bundle");
  // Checked first, because a newer version may define other fields differently.
  const std::int64_t version = document.at("schema_version").integer(1);
  if (version > kSchemaVersion) {
    throw Error(TITANS_UNSUPPORTED, "E0202", kWhere,
                text("bundle of a newer schema: expected schema_version ", kSchemaVersion, ", got ", version),
                "install a newer titans runtime");
  }
  if (version < kSchemaVersion) {
    throw Error(TITANS_UNSUPPORTED, "E0203", kWhere,
                text("bundle of an older schema: expected schema_version ", kSchemaVersion, ", got ", version),
                "export the checkpoint again: titans-export export CHECKPOINT -o NAME.titans");
  }

  Manifest manifest{};
  manifest.model = document.at("model").raw().dump();
  manifest.memory = read_memory(document);
  const std::optional<JsonReader> tokenizer = document.find("tokenizer");
  manifest.tokenizer = tokenizer ? tokenizer->raw().dump() : "null";
  if (tokenizer) manifest.tokenizer_file = read_tokenizer_file(*tokenizer);

  read_input(document.at("input"), manifest);
  read_output(document.at("output"), manifest);

  const JsonReader controls = document.at("controls");
  manifest.position_input = controls.at("position").name();
  manifest.learn_input = controls.at("learn").name();
  const auto read_optional = [&](const char* key, std::string& name) {
    const std::optional<JsonReader> control = controls.find(key);
    if (!control) return;
    name = control->name();
    if (manifest.slots_input.empty()) control->fail("no name, as there are no slots");
  };
  read_optional("slots", manifest.slots_input);
  read_optional("valid", manifest.valid_input);

  for (const JsonReader& entry : document.at("state").items()) manifest.state.push_back(read_state(entry));
  const JsonReader graphs = document.at("graphs");
  for (const JsonReader& entry : graphs.items()) manifest.graphs.push_back(read_graph(entry));
  sort_graphs(graphs, manifest.graphs);
  check_names(document, manifest);

  const std::optional<JsonReader> engines = document.find("engines");
  if (engines) manifest.engines = read_engines(*engines, manifest);

  const std::optional<JsonReader> guard = document.find("guard");
  if (guard && !guard->raw().is_null()) manifest.guard = read_guard(*guard, manifest);

  manifest.weights_file = document.at("weights").at("file").file_name();
  manifest.initial_state_file = document.at("initial_state").at("file").file_name();
  for (const auto& [name, record] : document.at("files").members()) {
    if (!is_plain(name)) record.fail("a plain file name as its key");
    manifest.files[name] = {static_cast<std::uint64_t>(record.at("bytes").integer(0)), record.at("xxh3_128").string()};
  }
  return manifest;
}

}  // namespace titans::core
