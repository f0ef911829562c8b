#include "bundle.h"

#include <system_error>

#include "error.h"

namespace titans::core {
namespace {

constexpr std::string_view kAdvice = "copy or export the bundle again";

Manifest read_manifest(const std::filesystem::path& folder) {
  std::error_code ignored;  // a folder that cannot be looked at is none
  if (!std::filesystem::is_directory(folder, ignored)) {
    throw Error(TITANS_FAILED, "bundle", text("a folder at ", folder.string()), "none",
                "give the path of a bundle, NAME.titans");
  }
  return Manifest::parse(MappedFile(folder / "manifest.json").text());
}

void check_file(const Manifest& manifest, const std::string& name, const MappedFile& file) {
  const auto record = manifest.files.find(name);
  if (record == manifest.files.end()) {
    throw Error(TITANS_FAILED, "manifest.json", text("a field files.", name), "none", kAdvice);
  }
  const FileRecord& listed = record->second;
  if (file.size() != listed.bytes) {
    throw Error(TITANS_FAILED, name, text(listed.bytes, " bytes"), text(file.size()), kAdvice);
  }
  const std::string hash = file.hash();
  if (hash != listed.hash) throw Error(TITANS_FAILED, name, text("hash ", listed.hash), hash, kAdvice);
}

}  // namespace

Bundle::Bundle(const std::filesystem::path& folder) : folder_(folder), manifest_(read_manifest(folder)) {
  // Backends read graph files themselves; what is checked here is that they are what was exported.
  for (const Graph& graph : manifest_.graphs) check_file(manifest_, graph.file, MappedFile(folder_ / graph.file));
  if (!manifest_.tokenizer_file.empty()) {
    check_file(manifest_, manifest_.tokenizer_file, MappedFile(folder_ / manifest_.tokenizer_file));
  }
  weights_ = read_safetensors(open_checked(manifest_.weights_file), manifest_.weights_file);
  initial_state_ = read_safetensors(open_checked(manifest_.initial_state_file), manifest_.initial_state_file);
  check_weights();
  check_initial_state();
}

const MappedFile& Bundle::open_checked(const std::string& name) {
  const MappedFile& file = mapped_.emplace_back(folder_ / name);
  check_file(manifest_, name, file);
  return file;
}

void Bundle::check_weights() const {
  for (const Graph& graph : manifest_.graphs) {
    for (const std::string& name : graph.weights) {
      if (weights_.count(name) == 0) {
        throw Error(TITANS_FAILED, manifest_.weights_file, text("tensor ", name, " of graph ", graph.name), "none",
                    kAdvice);
      }
    }
  }
}

void Bundle::check_initial_state() const {
  for (const StateTensor& state : manifest_.state) {
    const auto expected = text(state.name, " as ", dtype_info(state.dtype).name, " ", shape_text(state.shape));
    const auto found = initial_state_.find(state.name);
    if (found == initial_state_.end()) {
      throw Error(TITANS_FAILED, manifest_.initial_state_file, expected, "no such tensor", kAdvice);
    }
    const TensorView& tensor = found->second;
    if (tensor.dtype != state.dtype || tensor.shape != state.shape) {
      throw Error(TITANS_FAILED, manifest_.initial_state_file, expected,
                  text(dtype_info(tensor.dtype).name, " ", shape_text(tensor.shape)), kAdvice);
    }
  }
}

}  // namespace titans::core
