// Fuzzes manifest.json and all code that depends on it. For a valid manifest, the target writes a matching bundle with
// hashes, and runs a stream on it.
#include <algorithm>
#include <set>

#include "echo_executor.h"
#include "fuzz.h"
#include "session/engine_choice.h"
#include "session/session.h"
#include "stream/stream.h"

namespace titans::fuzz {
namespace {

using nlohmann::json;

// Small enough to run quickly.
constexpr std::size_t kMostState = 1 << 16;
constexpr std::int64_t kMostRow = 1 << 10;
constexpr std::size_t kMostTokens = 48;
constexpr std::size_t kMostFiles = 24;

bool is_small(const core::Manifest& manifest) {
  std::size_t bytes = 0;
  for (const core::StateTensor& state : manifest.state) {
    if (state.bytes > kMostState - bytes) return false;
    bytes += state.bytes;
  }
  return manifest.input_size <= kMostRow && manifest.output_size <= kMostRow && manifest.graphs.size() <= kMostFiles;
}

// Weights and state as a safetensors file. Offsets must be multiples of the largest element's size.
std::string tensors_file(const std::vector<core::StateTensor>& tensors) {
  json header = json::object();
  std::string data;
  for (const core::StateTensor& tensor : tensors) {
    data.resize((data.size() + 7) / 8 * 8);
    header[tensor.name] = {{"dtype", core::dtype_info(tensor.dtype).safetensors},
                           {"shape", tensor.shape},
                           {"data_offsets", {data.size(), data.size() + tensor.bytes}}};
    data.append(tensor.bytes, '\x01');
  }
  return safetensors(header.dump(), data);
}

// Writes a bundle with that manifest and matching files to `folder`. Returns whether it could.
bool write_bundle(const std::filesystem::path& folder, const core::Manifest& manifest,
                  const std::vector<core::EngineGraph>& graphs, json source) {
  std::vector<core::StateTensor> weights;
  std::set<std::string> names;
  for (const core::EngineGraph& graph : graphs) {
    for (const std::string& name : graph.weights) {
      if (names.insert(name).second) weights.push_back({name, {}, {}, core::DType::kFloat32, {1}, 4, {}, {}});
    }
  }
  std::map<std::string, std::string> files;
  for (const core::EngineGraph& graph : graphs) files[graph.file] = "a graph";
  if (!manifest.tokenizer_file.empty()) files[manifest.tokenizer_file] = "{}";
  files[manifest.weights_file] = tensors_file(weights);
  files[manifest.initial_state_file] = tensors_file(manifest.state);
  source["files"] = json::object();
  for (const auto& [name, content] : files) {
    if (!write(folder / name, content)) return false;
    source["files"][name] = file_record(content);
  }
  return write(folder / "manifest.json", source.dump());
}

template <typename Action>
bool succeeds(Action&& action) {
  try {
    action();
    return true;
  } catch (const core::Error& error) {
    check_error(error);
    return false;
  }
}

void run_stream(const std::shared_ptr<core::Session>& session, std::size_t count) {
  core::Stream stream(session);
  const bool tokens = session->manifest().input_kind == core::InputKind::kTokens;
  std::vector<float> output(kMostTokens * session->output_size());
  const std::vector<float> vectors(count * session->input_size(), 1.0F);
  const std::vector<std::int32_t> ids(count, 0);
  const auto feed = [&](core::Stream& to, titans_output which) {
    if (tokens) {
      to.feed(ids.data(), count, which, output.data(), output.size());
    } else {
      to.feed_vectors(vectors.data(), count, which, output.data(), output.size());
    }
  };
  const bool fed = succeeds([&] { feed(stream, TITANS_OUTPUT_ALL); });
  check(stream.position() == (fed ? count : 0), "a position as fed");
  if (tokens && session->manifest().input_size > kFailing) {
    std::vector<std::int32_t> failing(count + 1, 1);
    failing.back() = kFailing;
    const std::uint64_t position = stream.position();
    check(!succeeds([&] { stream.feed(failing.data(), failing.size(), TITANS_OUTPUT_NONE, nullptr, 0); }),
          "a token to fail");
    check(stream.position() == position, "a failed call to leave the position");
  }
  const std::unique_ptr<core::Stream> twin = stream.fork();
  succeeds([&] { feed(*twin, TITANS_OUTPUT_LAST); });
  for (std::size_t index = 0; index < session->memories().size(); ++index) {
    std::vector<float> values(session->memories()[index].elements);
    succeeds([&] { twin->read_memory(index, values.data(), values.size()); });
  }
  stream.reset();
  check(stream.position() == 0, "a stream at its start after a reset");
}

void open(const json& source, const core::Manifest& manifest, std::size_t engine) {
  const std::filesystem::path folder = scratch() / "bundle";
  std::filesystem::create_directory(folder);
  const bool plain = engine >= manifest.engines.size();
  std::vector<core::EngineGraph> graphs;
  if (plain) {
    for (const core::Graph& graph : manifest.graphs) graphs.push_back({graphs.size(), graph.file, graph.weights});
  } else {
    graphs = manifest.engines[engine].graphs;
  }
  if (write_bundle(folder, manifest, graphs, source)) {
    succeeds([&] {
      auto bundle = std::make_unique<const core::Bundle>(
          folder, [&](const core::Manifest& read) { return plain ? nullptr : &read.engines[engine]; });
      const auto in_place = static_cast<std::uint32_t>(source.size() * 0x9e3779b9U);
      auto echo = make_echo_executor(*bundle, in_place ^ static_cast<std::uint32_t>(manifest.state.size()));
      const auto session = std::make_shared<core::Session>(std::move(bundle), std::move(echo), core::SessionOptions{});
      check(json::accept(session->info()), "a session's info to be JSON");
      for (const std::size_t count : {std::size_t{1}, kMostTokens}) run_stream(session, count);
    });
  }
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
}

void choose(const core::Manifest& manifest) {
  const core::DeviceInfo devices[] = {
      {"cpu", {}, "linux-x86_64", 0, 0, {}},
      {"cuda",
       "a GPU",
       "linux-x86_64",
       90,
       12040,
       {{"tensorrt_10", {"10.3.0", {}, "1", {}}}, {"onnxruntime", {"1.20", {}, {}, {}}}}}};
  for (const core::DeviceInfo& facts : devices) {
    for (const char* name : {"", "none", "other"}) {
      const core::EngineRequest request{"a bundle", facts.kind, name, {}, "auto"};
      for (const std::string& module : core::modules_to_look_at(manifest, facts, request)) {
        check(module.find('/') == std::string::npos && !module.empty(), "a library's name to come from no bundle");
      }
      succeeds([&] { core::choose_engine(manifest, facts, request, "onnxruntime"); });
    }
  }
}

}  // namespace
}  // namespace titans::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace titans;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  core::Manifest manifest;
  if (!fuzz::succeeds([&] { manifest = core::Manifest::parse(text); })) return 0;
  fuzz::choose(manifest);
  if (!fuzz::is_small(manifest)) return 0;
  const nlohmann::json source = nlohmann::json::parse(text);
  fuzz::open(source, manifest, size % (manifest.engines.size() + 1));
  return 0;
}
