// Fuzzes state files, for a session on a small bundle: the input as it is, with a corrected hash (otherwise few inputs
// get past it), and as the content of an encrypted file. An accepted state is loaded into a stream, saved and read
// again.
#include <cstring>

#include "echo_executor.h"
#include "fuzz.h"
#include "session/session.h"
#include "state/state_file.h"
#include "stream/stream.h"

namespace titans::fuzz {
namespace {

using nlohmann::json;

// Memories in several dtypes, to convert states of another bundle of the model, and a state that is no memory.
constexpr const char* kManifest = R"({
  "format": "titans-bundle", "schema_version": 2,
  "model": {"name": "fuzz", "variant": "lmm", "source": {"weights_sha256": "5eed"}},
  "input": {"kind": "tokens", "name": "tokens", "dtype": "int64", "vocab_size": 8},
  "output": {"kind": "logits", "name": "logits", "dtype": "float32", "size": 8},
  "controls": {"position": "position", "learn": "learn"},
  "state": [
    {"name": "m", "input": "m.in", "output": "m.next", "dtype": "float32", "shape": [1, 2, 54], "role": "memory",
     "layout": [{"name": "W0", "offset": 0, "shape": [2, 32], "dtype": "int8", "kind": "weights"},
                {"name": "EW0", "offset": 17, "shape": [2, 32], "dtype": "bfloat16", "kind": "rounding_error",
                 "of": "W0"},
                {"name": "S0", "offset": 49, "shape": [4], "kind": "surprise"},
                {"name": "chunk_updates", "offset": 53, "shape": [], "kind": "update_count"}]},
    {"name": "p", "input": "p.in", "output": "p.next", "dtype": "float32", "shape": [1, 12], "role": "memory",
     "layout": [{"name": "W0", "offset": 0, "shape": [2, 3], "kind": "weights"},
                {"name": "S0", "offset": 6, "shape": [2, 3], "kind": "surprise"}]},
    {"name": "c", "input": "c.in", "output": "c.next", "dtype": "int8", "shape": [1, 5], "role": "cache"}],
  "graphs": [{"name": "decode", "file": "decode.onnx", "tokens": 1, "stride": 1, "weights": []}],
  "weights": {"file": "weights.safetensors"}, "initial_state": {"file": "state.safetensors"}})";

std::shared_ptr<core::Session> open_session() {
  const std::filesystem::path folder = scratch() / "bundle";
  std::filesystem::create_directory(folder);
  json manifest = json::parse(kManifest);
  const std::string state = R"({"m": {"dtype": "F32", "shape": [1, 2, 54], "data_offsets": [0, 432]},
    "p": {"dtype": "F32", "shape": [1, 12], "data_offsets": [432, 480]},
    "c": {"dtype": "I8", "shape": [1, 5], "data_offsets": [480, 485]}})";
  const std::pair<const char*, std::string> files[] = {
      {"decode.onnx", "a graph"},
      {"weights.safetensors", safetensors("{}", {})},
      {"state.safetensors", safetensors(state, std::string(485, '\0'))}};
  for (const auto& [name, content] : files) {
    write(folder / name, content);
    manifest["files"][name] = file_record(content);
  }
  write(folder / "manifest.json", manifest.dump());
  auto bundle = std::make_unique<const core::Bundle>(folder);
  auto executor = make_echo_executor(*bundle, 2);
  return std::make_shared<core::Session>(std::move(bundle), std::move(executor), core::SessionOptions{});
}

// Replaces the file's hash by the correct one.
std::string with_hash(std::string content) {
  constexpr std::string_view kKey = "\"xxh3_128\"";
  constexpr std::size_t kDigits = 32;
  const std::size_t named = content.find(kKey);
  if (named == std::string::npos) return content;
  const std::size_t quote = content.find('"', named + kKey.size());
  if (quote == std::string::npos || content.size() - quote <= kDigits) return content;
  content.replace(quote + 1, kDigits, kDigits, '0');
  const std::string digits = xxh3_128(content);
  return content.replace(quote + 1, kDigits, digits);
}

bool same(const core::StreamState& a, const core::StreamState& b) {
  if (a.position != b.position || a.learning != b.learning || a.tensors != b.tensors) return false;
  const std::size_t bytes = a.last_output.size() * sizeof(float);
  return a.position == 0 || std::memcmp(a.last_output.data(), b.last_output.data(), bytes) == 0;
}

void use(const std::shared_ptr<core::Session>& session, const core::StreamState& state) {
  core::Stream stream(session);
  stream.set_state(state);
  check(same(stream.state(), state), "the state that was set");
  const std::filesystem::path path = scratch() / "again.tstate";
  core::save_state(path, session->state_schema(), stream.state(), nullptr, core::Durability::kProcess);
  check(same(core::load_state(path, session->state_schema(), nullptr), state), "what was saved");
  const std::int32_t tokens[] = {1, 2, 3};
  try {
    stream.feed(tokens, std::size(tokens), TITANS_OUTPUT_NONE, nullptr, 0);
    check(stream.position() == state.position + std::size(tokens), "a stream that goes on");
  } catch (const core::Error& error) {
    check_error(error);
  }
}

void read(const std::shared_ptr<core::Session>& session, const std::string& content, const core::StateKey* key) {
  const std::filesystem::path path = scratch() / "file.tstate";
  write(path, content);
  core::StreamState state;
  try {
    state = core::load_state(path, session->state_schema(), key);
  } catch (const core::Error& error) {
    check_error(error);
    return;
  }
  check(key == nullptr, "no state under a key that nobody has");
  use(session, state);
}

}  // namespace
}  // namespace titans::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace titans;
  static const std::shared_ptr<core::Session> session = fuzz::open_session();
  const std::string content(reinterpret_cast<const char*>(data), size);
  fuzz::read(session, fuzz::with_hash(content), nullptr);
  if (size % 4 != 0) return 0;  // a quarter of the inputs suffices for the other reads
  fuzz::read(session, content, nullptr);
  const core::StateKey key{};
  fuzz::read(session, "TITANSE1" + content.substr(0, 64), &key);
  return 0;
}
