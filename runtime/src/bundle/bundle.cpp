#include "bundle/bundle.h"

#include <algorithm>
#include <cctype>
#include <set>
#include <system_error>

#include "base/error.h"
#include "base/sha256.h"

namespace titans::core {
namespace {

constexpr std::string_view kFix = "copy or export the bundle again";

// SHA-256 of the lines "HASH  NAME" of all files, the manifest included, in the order of the names' bytes: what
// `sha256sum * | sha256sum` prints in a bundle's folder, in the C locale.
void check_sha256(const std::filesystem::path& folder, const Manifest& manifest, std::string_view expected) {
  std::set<std::string> names{"manifest.json"};
  for (const auto& [name, record] : manifest.files) names.insert(name);
  std::string lines;
  for (const std::string& name : names) lines += text(sha256(MappedFile(folder / name).text()), "  ", name, "\n");
  const std::string found = sha256(lines);
  const auto same = [](char a, char b) { return std::tolower(static_cast<unsigned char>(a)) == b; };
  if (std::equal(expected.begin(), expected.end(), found.begin(), found.end(), same)) return;
  throw Error(TITANS_FAILED, "E0211", "bundle",
              text("another bundle than expected: expected SHA-256 ", expected, ", got ", found),
              "get the bundle again, and compare the hash with what its author published");
}

Manifest read_manifest(const std::filesystem::path& folder, std::string_view expect_sha256) {
  std::error_code ignored;  // an inaccessible folder counts as missing
  if (!std::filesystem::is_directory(folder, ignored)) {
    throw Error(TITANS_FAILED, "E0201", "bundle", text("not a bundle: no folder at ", folder.string()),
                "give the path of a NAME.titans folder");
  }
  Manifest manifest = Manifest::parse(MappedFile(folder / "manifest.json").text());
  if (!expect_sha256.empty()) check_sha256(folder, manifest, expect_sha256);
  return manifest;
}

void check_file(const Manifest& manifest, const std::string& name, const MappedFile& file) {
  const auto record = manifest.files.find(name);
  if (record == manifest.files.end()) {
    throw Error(TITANS_FAILED, "E0205", "manifest.json", text("missing field files.", name), kFix);
  }
  const FileRecord& listed = record->second;
  if (file.size() != listed.bytes) {
    throw Error(TITANS_FAILED, "E0204", name,
                text("damaged file: expected ", listed.bytes, " bytes, got ", file.size()), kFix);
  }
  const std::string hash = file.hash();
  if (hash != listed.hash) {
    throw Error(TITANS_FAILED, "E0204", name, text("damaged file: expected hash ", listed.hash, ", got ", hash), kFix);
  }
}

std::vector<EngineGraph> plain_graphs(const Manifest& manifest) {
  std::vector<EngineGraph> graphs;
  for (const Graph& graph : manifest.graphs) graphs.push_back({graphs.size(), graph.file, graph.weights});
  return graphs;
}

}  // namespace

Bundle::Bundle(const std::filesystem::path& folder, const EngineChooser& choose, std::string_view expect_sha256)
    : folder_(folder),
      manifest_(read_manifest(folder, expect_sha256)),
      engine_(choose ? choose(manifest_) : nullptr),
      graphs_(engine_ == nullptr ? plain_graphs(manifest_) : engine_->graphs),
      schedule_(listed_graphs(manifest_, graphs_)) {
  // Backends read graph files themselves. This checks that the files are unchanged since export.
  for (const EngineGraph& graph : graphs_) check_file(manifest_, graph.file, MappedFile(folder_ / graph.file));
  if (!manifest_.tokenizer_file.empty()) {
    check_file(manifest_, manifest_.tokenizer_file, MappedFile(folder_ / manifest_.tokenizer_file));
  }
  if (needs_weights()) {
    weights_ = read_safetensors(open_checked(manifest_.weights_file), manifest_.weights_file);
    read_engine_weights();
    check_weights();
  }
  initial_state_ = read_safetensors(open_checked(manifest_.initial_state_file), manifest_.initial_state_file);
  check_initial_state();
}

bool Bundle::needs_weights() const {
  // ONNX graph files reference the weights file even if the manifest lists no weights to provide.
  if (engine_ == nullptr || engine_->compiler == "onnxruntime") return true;
  return std::any_of(graphs_.begin(), graphs_.end(), [](const EngineGraph& graph) { return !graph.weights.empty(); });
}

void Bundle::read_engine_weights() {
  if (engine_ == nullptr || engine_->weights_file.empty()) return;
  const std::string& name = engine_->weights_file;
  for (auto& [tensor, view] : read_safetensors(open_checked(name), name)) {
    if (!weights_.emplace(tensor, view).second) {
      throw Error(TITANS_FAILED, "E0205", name, text("tensor ", tensor, " is also in ", manifest_.weights_file),
                  "build the engine again");
    }
  }
}

const MappedFile& Bundle::open_checked(const std::string& name) {
  const MappedFile& file = mapped_.emplace_back(folder_ / name);
  check_file(manifest_, name, file);
  return file;
}

void Bundle::check_weights() const {
  for (const EngineGraph& graph : graphs_) {
    for (const std::string& name : graph.weights) {
      if (weights_.count(name) == 0) {
        throw Error(TITANS_FAILED, "E0207", manifest_.weights_file,
                    text("tensor ", name, " of graph ", manifest_.graphs[graph.graph].name,
                         " is missing or has an unknown dtype"),
                    kFix);
      }
    }
  }
}

void Bundle::check_initial_state() const {
  for (const StateTensor& state : manifest_.state) {
    const auto expected =
        text("expected ", state.name, " as ", dtype_info(state.dtype).name, " ", shape_text(state.shape));
    const auto found = initial_state_.find(state.name);
    if (found == initial_state_.end()) {
      throw Error(TITANS_FAILED, "E0207", manifest_.initial_state_file, text(expected, ", got no such tensor"), kFix);
    }
    const TensorView& tensor = found->second;
    if (tensor.dtype != state.dtype || tensor.shape != state.shape) {
      throw Error(TITANS_FAILED, "E0207", manifest_.initial_state_file,
                  text(expected, ", got ", dtype_info(tensor.dtype).name, " ", shape_text(tensor.shape)), kFix);
    }
  }
}

}  // namespace titans::core
