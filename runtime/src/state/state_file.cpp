#include "state/state_file.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <ctime>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/json_reader.h"
#include "base/safetensors.h"
#include "base/xxh3.h"
#include "state/state_convert.h"

namespace titans::core {
namespace {

using nlohmann::json;

constexpr std::string_view kFormat = "titans-state";
constexpr std::int64_t kStateSchema = 2;
constexpr std::string_view kEncrypted = "TITANSE1";
constexpr std::string_view kLastOutput = "last_output";
constexpr std::string_view kMetadata = "__metadata__";
constexpr std::string_view kHashKey = "xxh3_128";
constexpr std::size_t kHashDigits = 32;
constexpr std::size_t kLengthBytes = 8;
constexpr std::size_t kAlignment = 64;
constexpr std::size_t kEnvelope = kEncrypted.size() + kNonceBytes + kTagBytes;
constexpr std::size_t kBlock = std::size_t{1} << 20;  // bytes encrypted per call
// Limits a file's size beyond our tensors. A header may be as large as a manifest, which describes the same tensors. A
// memory in another dtype may be larger than ours by this factor.
constexpr std::uint64_t kMostHeader = std::uint64_t{16} << 20;
constexpr std::uint64_t kMostGrowth = 8;
constexpr std::string_view kRestore = "restore an older copy of the file";

std::string name_of(const std::filesystem::path& path) { return path.filename().string(); }

class Hash {
 public:
  Hash() : state_(1) { XXH3_128bits_reset(state_.data()); }

  void update(const void* data, std::size_t bytes) { XXH3_128bits_update(state_.data(), data, bytes); }
  std::string digits() const { return hex_digits(XXH3_128bits_digest(state_.data())); }

 private:
  // The hash state contains some of the hashed data.
  std::vector<XXH3_state_t, WipingAllocator<XXH3_state_t>> state_;
};

// ---- writing ----

std::string created_now() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  ::gmtime_r(&now, &utc);
  std::array<char, 32> buffer{};
  std::strftime(buffer.data(), buffer.size(), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return buffer.data();
}

json describe(const StateTensor& state) {
  json entry{
      {"name", state.name}, {"role", state.role}, {"dtype", dtype_info(state.dtype).name}, {"shape", state.shape}};
  for (const MemoryField& field : state.layout) {
    json one{{"name", field.name}, {"offset", field.offset}, {"shape", field.shape}};
    if (field.dtype != FieldDtype::kFloat32) one["dtype"] = field_dtype_name(field.dtype);
    if (!field.kind.empty()) one.update({{"kind", field.kind}, {"written", written_name(field.written)}});
    if (!field.of.empty()) one["of"] = field.of;
    entry["layout"].push_back(std::move(one));
  }
  if (!state.op.empty()) entry["operator"] = state.op;
  return entry;
}

json metadata_of(const StateSchema& schema, const StateView& state) {
  json states = json::array();
  for (const StateTensor& tensor : schema.tensors) states.push_back(describe(tensor));
  return {{"format", kFormat},
          {"schema_version", std::to_string(kStateSchema)},
          {"producer", "titans-runtime " TITANS_VERSION},
          {"created", created_now()},
          {"model", schema.model},
          {"position", std::to_string(state.position)},
          {"learning", state.learning ? "true" : "false"},
          {"memory", schema.memory},
          {"backend", schema.backend},
          {"device", schema.device},
          {"state", states.dump()},
          {kHashKey, std::string(kHashDigits, '0')}};
}

struct Part {
  const void* data;
  std::size_t bytes;
};

// Lists the tensors in file order and adds them to the header.
std::vector<Part> list_parts(const StateSchema& schema, const StateView& state, json& header) {
  struct Entry {
    std::string name;
    DType dtype;
    Shape shape;
    Part part;
  };
  std::vector<Entry> entries;
  for (std::size_t i = 0; i < schema.tensors.size(); ++i) {
    const StateTensor& tensor = schema.tensors[i];
    if (tensor.name == kLastOutput || tensor.name == kMetadata) {
      throw Error(TITANS_UNSUPPORTED, "E0410", "state", text("state files reserve the tensor name ", tensor.name),
                  "export the bundle with another name for the tensor");
    }
    entries.push_back({tensor.name, tensor.dtype, tensor.shape, {state.tensors[i], tensor.bytes}});
  }
  if (state.position > 0) {
    const std::size_t size = state.outputs;
    entries.push_back({std::string(kLastOutput),
                       DType::kFloat32,
                       {static_cast<std::int64_t>(size)},
                       {state.last_output, size * sizeof(float)}});
  }
  // Sorted by descending element size, so that all are aligned without gaps.
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return dtype_info(a.dtype).bytes > dtype_info(b.dtype).bytes;
  });
  std::vector<Part> parts;
  std::size_t at = 0;
  for (const Entry& entry : entries) {
    header[entry.name] = {{"dtype", dtype_info(entry.dtype).safetensors},
                          {"shape", entry.shape},
                          {"data_offsets", {at, at + entry.part.bytes}}};
    at += entry.part.bytes;
    parts.push_back(entry.part);
  }
  return parts;
}

// Offset of the hash digits, which follow their key in the first bytes of a file.
std::size_t find_digits(std::string_view content, std::string_view digits) {
  const std::string key = text('"', kHashKey, '"');
  const std::size_t named = content.find(key);
  return named == std::string_view::npos ? named : content.find(digits, named + key.size());
}

// The header with its length, padded to align the tensors and with the final hash.
std::string build_head(const json& header, const std::vector<Part>& parts) {
  std::string source = header.dump();
  source.resize((kLengthBytes + source.size() + kAlignment - 1) / kAlignment * kAlignment - kLengthBytes, ' ');
  std::string head(kLengthBytes, '\0');
  for (std::size_t i = 0; i < kLengthBytes; ++i) head[i] = static_cast<char>((source.size() >> (8 * i)) & 0xFF);
  head += source;
  Hash hash;
  hash.update(head.data(), head.size());
  for (const Part& part : parts) hash.update(part.data, part.bytes);
  head.replace(find_digits(head, std::string(kHashDigits, '0')), kHashDigits, hash.digits());
  return head;
}

void write_encrypted(FileAside& file, const std::vector<Part>& parts, const StateKey& key) {
  std::array<std::uint8_t, kNonceBytes> nonce{};
  fill_random(nonce.data(), nonce.size());
  Cipher cipher(Cipher::Direction::kEncrypt, key, nonce.data(), kEncrypted.data(), kEncrypted.size());
  file.append(kEncrypted.data(), kEncrypted.size());
  file.append(nonce.data(), nonce.size());
  // Most states are small, and the block is wiped afterwards, so it is no larger than needed.
  std::size_t largest = 0;
  for (const Part& part : parts) largest = std::max(largest, part.bytes);
  Bytes block(std::min(kBlock, largest));
  for (const Part& part : parts) {
    const auto* data = static_cast<const std::byte*>(part.data);
    for (std::size_t at = 0; at < part.bytes; at += kBlock) {
      const std::size_t now = std::min(kBlock, part.bytes - at);
      cipher.update(data + at, now, block.data());
      file.append(block.data(), now);
    }
  }
  const std::array<std::uint8_t, kTagBytes> tag = cipher.tag();
  file.append(tag.data(), tag.size());
}

// ---- reading ----

std::string_view text_of(const Bytes& content) {
  return {reinterpret_cast<const char*>(content.data()), content.size()};
}

// Decrypts the file if it is encrypted.
Bytes open_envelope(Bytes content, const StateKey* key, const std::string& name) {
  const bool encrypted = text_of(content).substr(0, kEncrypted.size()) == kEncrypted;
  if (!encrypted && key == nullptr) return content;
  if (!encrypted) {
    throw Error(TITANS_FAILED, "E0406", name, "a key was given for a file without encryption",
                "omit the key if you trust the origin of the file");
  }
  if (key == nullptr) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0406", name, "the state is encrypted, and no key was given",
                "give the 32-byte key that it was saved with");
  }
  if (content.size() < kEnvelope) {
    throw Error(TITANS_FAILED, "E0404", name,
                text("damaged state file: truncated, expected at least ", kEnvelope, " bytes, got ", content.size()),
                kRestore);
  }
  const auto* raw = reinterpret_cast<const std::uint8_t*>(content.data());
  const std::size_t start = kEncrypted.size() + kNonceBytes;
  Cipher cipher(Cipher::Direction::kDecrypt, *key, raw + kEncrypted.size(), kEncrypted.data(), kEncrypted.size());
  Bytes plain(content.size() - kEnvelope);
  cipher.update(content.data() + start, plain.size(), plain.data());
  if (!cipher.matches(raw + content.size() - kTagBytes)) {
    throw Error(TITANS_FAILED, "E0405", name, "wrong key, or altered file",
                text("give the key that it was saved with, or ", kRestore));
  }
  return plain;
}

// A verified state file in memory, before comparison with a model.
struct StateFile {
  Bytes content;
  json metadata;
  Tensors tensors;  // views into `content`
};

[[noreturn]] void fail_damaged(const std::string& name, std::string_view detail) {
  throw Error(TITANS_FAILED, "E0404", name, text("damaged state file: ", detail), kRestore);
}

// Rewords errors of the JSON and safetensors readers, whose fix is to export the bundle again.
template <typename Read>
auto read_header(const std::string& name, Read&& read) {
  try {
    return read();
  } catch (const Error& error) {
    fail_damaged(name, error.problem());
  }
}

void check_format(const JsonReader& metadata, const std::string& name) {
  const std::optional<JsonReader> format = metadata.find("format");
  if (!format || format->raw() != kFormat) {
    throw Error(TITANS_FAILED, "E0401", name, "not a state file, but another safetensors file",
                "give a file that a stream was saved to");
  }
  const std::string version = read_header(name, [&] {
    const JsonReader field = metadata.at("schema_version");
    const std::string digits = field.string();
    if (digits.empty() || digits.find_first_not_of("0123456789") != std::string::npos) field.fail("a whole number");
    return digits;
  });
  if (version == std::to_string(kStateSchema)) return;
  const bool older = version.size() == 1 && version[0] < '0' + kStateSchema;
  const std::string versions = text(" schema: expected schema_version ", kStateSchema, ", got ", version);
  if (older) {
    throw Error(TITANS_UNSUPPORTED, "E0403", name, text("state file of an older", versions),
                "feed the stream again and save it, or open the file with the runtime that wrote it");
  }
  throw Error(TITANS_UNSUPPORTED, "E0402", name, text("state file of a newer", versions),
              "install a newer titans runtime");
}

void check_size(const JsonReader& header, std::size_t head, std::size_t size, const std::string& name) {
  const std::uint64_t data = read_header(name, [&] {
    std::int64_t end = 0;
    for (const auto& [key, entry] : header.members()) {
      if (key == kMetadata) continue;
      for (const JsonReader& offset : entry.at("data_offsets").items()) end = std::max(end, offset.integer(0));
    }
    return static_cast<std::uint64_t>(end);
  });
  if (size == head + data) return;
  fail_damaged(
      name, text(size < head + data ? "truncated" : "extra bytes", ", expected ", head + data, " bytes, got ", size));
}

void check_hash(std::string_view content, const JsonReader& metadata, const std::string& name) {
  const std::string digits = read_header(name, [&] { return metadata.at(std::string(kHashKey)).string(); });
  const std::size_t at = digits.size() == kHashDigits ? find_digits(content, digits) : std::string_view::npos;
  if (at == std::string_view::npos)
    fail_damaged(name, text("expected ", kHashDigits, " digits as its ", kHashKey, ", got ", quoted(digits)));
  const std::string zeros(kHashDigits, '0');
  Hash hash;
  hash.update(content.data(), at);
  hash.update(zeros.data(), zeros.size());
  hash.update(content.data() + at + zeros.size(), content.size() - at - zeros.size());
  const std::string found = hash.digits();
  if (found != digits) fail_damaged(name, text("altered, expected hash ", digits, ", got ", found));
}

StateFile verify(Bytes content, const std::string& name) {
  StateFile file{std::move(content), {}, {}};
  const std::string_view whole = text_of(file.content);
  const std::string_view source = read_header(name, [&] { return safetensors_header(whole, name); });
  if (source.size() > kMostHeader)
    fail_damaged(name, text("expected a header of at most ", kMostHeader, " bytes, got ", source.size()));
  json header = read_header(name, [&] { return JsonReader::parse(source, name); });
  const auto metadata = header.find(kMetadata);
  const bool described = metadata != header.end() && metadata->is_object();
  file.metadata = described ? std::move(*metadata) : json::object();
  const JsonReader reader(header, name);
  // The format version is checked first, because a newer version may need other checks. The size is checked before the
  // hash, so that a truncated file is reported as truncated.
  check_format(JsonReader(file.metadata, name), name);
  check_size(reader, kLengthBytes + source.size(), whole.size(), name);
  check_hash(whole, JsonReader(file.metadata, name), name);
  file.tensors = read_header(name, [&] { return read_safetensors(whole, name); });
  return file;
}

std::uint64_t read_position(const JsonReader& metadata) {
  const JsonReader field = metadata.at("position");
  const std::string digits = field.string();
  std::uint64_t value = 0;
  // Graphs take the position as an int64.
  constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  bool good = !digits.empty() && digits.size() <= 19;
  for (const char digit : digits) {
    good = good && digit >= '0' && digit <= '9';
    value = value * 10 + static_cast<std::uint64_t>(digit - '0');
  }
  if (!good || value > kMost) field.fail("a count of tokens");
  return value;
}

bool read_learning(const JsonReader& metadata) {
  const JsonReader field = metadata.at("learning");
  if (field.raw() != "true" && field.raw() != "false") field.fail("\"true\" or \"false\"");
  return field.raw() == "true";
}

std::string title(const json& model) {
  const auto tell = [&](const char* key) {
    const auto found = model.find(key);
    return found != model.end() && found->is_string() ? found->get<std::string>() : std::string();
  };
  const std::string sha = tell("weights_sha256");
  const std::string weights = sha.empty() ? tell("weights_xxh3_128") : sha;
  return text(tell("name").empty() ? "unnamed" : tell("name"), " (weights ",
              weights.empty() ? "unknown" : weights.substr(0, 12), ")");
}

void check_model(const JsonReader& metadata, const StateSchema& schema, const std::string& name) {
  const json got = read_header(name, [&] { return JsonReader::parse(metadata.at("model").string(), name); });
  const json expected = json::parse(schema.model);
  const char* decides = expected["weights_sha256"].is_string() ? "weights_sha256" : "weights_xxh3_128";
  const auto found = got.find(decides);
  const auto wanted = expected.find(decides);
  const bool same = found != got.end() && wanted != expected.end() && found->is_string() && *found == *wanted;
  if (same) return;
  throw Error(TITANS_FAILED, "E0407", name,
              text("state of another model: expected ", title(expected), ", got ", title(got)),
              "restore it with a bundle of its own checkpoint");
}

std::vector<StateTensor> read_states(const JsonReader& metadata, const std::string& name) {
  // JsonReader::parse requires an object, so the array is wrapped in one.
  const json wrapped = JsonReader::parse(text("{\"state\":", metadata.at("state").string(), "}"), name);
  std::vector<StateTensor> states;
  for (const JsonReader& entry : JsonReader(wrapped, name).at("state").items()) {
    StateTensor state{};
    state.name = entry.at("name").string();
    state.role = entry.at("role").string();
    const std::optional<DType> dtype = dtype_named(entry.at("dtype").string(), &DTypeInfo::name);
    if (!dtype) entry.at("dtype").fail("an element type such as float32");
    state.dtype = *dtype;
    state.shape = entry.at("shape").shape(0);
    const std::optional<std::size_t> bytes = tensor_bytes(state.shape, state.dtype);
    if (!bytes) entry.at("shape").fail("a shape that fits into memory");
    state.bytes = *bytes;
    state.layout = read_layout(entry, state.shape);
    if (state.role == "memory" && (state.dtype != DType::kFloat32 || state.shape.empty())) {
      entry.at("dtype").fail("float32, with a shape, as its role is memory");
    }
    states.push_back(std::move(state));
  }
  return states;
}

const TensorView& find_tensor(const StateFile& file, const std::string& tensor, const StateTensor& kept,
                              const std::string& name) {
  const auto found = file.tensors.find(tensor);
  if (found == file.tensors.end()) fail_damaged(name, text("missing tensor ", tensor));
  const TensorView& view = found->second;
  if (view.dtype != kept.dtype || view.shape != kept.shape) {
    fail_damaged(name, text("expected ", tensor, " as ", dtype_info(kept.dtype).name, " ", shape_text(kept.shape),
                            ", got ", dtype_info(view.dtype).name, " ", shape_text(view.shape)));
  }
  return view;
}

// Checks that apply to state files of all models, for readers without the model.
void check_content(const StateFile& file, const std::string& name) {
  const JsonReader metadata(file.metadata, name);
  const std::uint64_t position = read_header(name, [&] { return read_position(metadata); });
  read_header(name, [&] {
    read_learning(metadata);
    return JsonReader::parse(metadata.at("model").string(), name);
  });
  const std::vector<StateTensor> kept = read_header(name, [&] { return read_states(metadata, name); });
  std::unordered_set<std::string_view> known;
  for (const StateTensor& state : kept) {
    find_tensor(file, state.name, state, name);
    known.insert(state.name);
  }
  for (const auto& [tensor, view] : file.tensors) {
    const bool output = tensor == kLastOutput && position > 0 && view.dtype == DType::kFloat32;
    if (known.count(tensor) == 0 && !output) fail_damaged(name, text("unexpected tensor ", tensor));
  }
}

StreamState to_state(const StateFile& file, const StateSchema& schema, const std::string& name) {
  const JsonReader metadata(file.metadata, name);
  check_model(metadata, schema, name);
  const std::vector<StateTensor> kept = read_header(name, [&] { return read_states(metadata, name); });
  const auto fail = [&](const StateTensor& state, std::string_view got) {
    throw Error(TITANS_FAILED, "E0407", name,
                text("expected the state tensor ", state.name, " as ", dtype_info(state.dtype).name, " ",
                     shape_text(state.shape), ", got ", got),
                "restore it with a bundle of the model that it was saved with");
  };
  StreamState state;
  state.position = read_header(name, [&] { return read_position(metadata); });
  state.learning = read_header(name, [&] { return read_learning(metadata); });
  for (const StateTensor& wanted : schema.tensors) {
    const auto found =
        std::find_if(kept.begin(), kept.end(), [&](const StateTensor& one) { return one.name == wanted.name; });
    if (found == kept.end()) fail(wanted, "none");
    if (const std::optional<std::string> why = difference(*found, wanted)) fail(wanted, *why);
    const TensorView& view = find_tensor(file, wanted.name, *found, name);
    Bytes& out = state.tensors.emplace_back(wanted.bytes);
    convert_state(*found, view.data, wanted, out.data());
  }
  for (const StateTensor& one : kept) {
    const bool known = std::any_of(schema.tensors.begin(), schema.tensors.end(),
                                   [&](const StateTensor& wanted) { return one.name == wanted.name; });
    if (!known) fail(one, "a bundle without it");
  }
  state.last_output.assign(schema.outputs, 0.0F);
  if (state.position == 0) return state;
  StateTensor output{};
  output.dtype = DType::kFloat32;
  output.shape = {static_cast<std::int64_t>(schema.outputs)};
  const TensorView& view = find_tensor(file, std::string(kLastOutput), output, name);
  std::memcpy(state.last_output.data(), view.data, view.bytes);
  return state;
}

}  // namespace

void save_state(const std::filesystem::path& path, const StateSchema& schema, const StateView& state,
                const StateKey* key, Durability durability) {
  json header{{kMetadata, metadata_of(schema, state)}};
  std::vector<Part> parts = list_parts(schema, state, header);
  const std::string head = build_head(header, parts);
  parts.insert(parts.begin(), {head.data(), head.size()});
  FileAside file(path, durability);
  if (key != nullptr) {
    write_encrypted(file, parts, *key);
  } else {
    for (const Part& part : parts) file.append(part.data, part.bytes);
  }
  file.commit();
}

StreamState load_state(const std::filesystem::path& path, const StateSchema& schema, const StateKey* key) {
  const std::string name = name_of(path);
  const StateFile file =
      verify(open_envelope(read_whole_file(path, kMostHeader + kMostGrowth * schema.bytes()), key, name), name);
  return to_state(file, schema, name);
}

Bytes read_state(const std::filesystem::path& path, const StateKey* key) {
  const std::string name = name_of(path);
  // The size limit is half of memory, because there is no model to compare with and decryption needs a second copy.
  const auto most = static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES) / 2 * ::sysconf(_SC_PAGE_SIZE));
  StateFile file = verify(open_envelope(read_whole_file(path, most), key, name), name);
  check_content(file, name);
  return std::move(file.content);
}

}  // namespace titans::core
