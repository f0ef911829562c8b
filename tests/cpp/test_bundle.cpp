#include "test_bundle.h"

#include <stdlib.h>

#include <cstring>
#include <fstream>
#include <sstream>

#include "base/mapped_file.h"

namespace titans::test {

using nlohmann::json;

TemporaryFolder::TemporaryFolder() {
  std::string pattern = (std::filesystem::temp_directory_path() / "titans-XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary folder");
  path_ = pattern;
}

TemporaryFolder::~TemporaryFolder() { std::filesystem::remove_all(path_); }

void write_file(const std::filesystem::path& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

std::string read_file(const std::filesystem::path& path) {
  std::ostringstream content;
  content << std::ifstream(path, std::ios::binary).rdbuf();
  return content.str();
}

std::string safetensors(std::string header, const std::string& data) {
  header.resize((header.size() + 7) / 8 * 8, ' ');  // aligns the data
  std::string length(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) length[i] = static_cast<char>((header.size() >> (8 * i)) & 0xff);
  return length + header + data;
}

std::string float_bytes(const std::vector<float>& values) {
  std::string bytes(values.size() * sizeof(float), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

json manifest_json() {
  return json::parse(R"({
    "format": "titans-bundle", "schema_version": 2, "model": {"name": "fake"},
    "input": {"kind": "tokens", "name": "tokens", "dtype": "int64", "vocab_size": 8},
    "output": {"kind": "logits", "name": "logits", "dtype": "float32", "size": 8},
    "controls": {"position": "position", "learn": "learn"},
    "state": [
      {"name": "layers.0.memory", "input": "memory", "output": "memory.next", "dtype": "float32", "shape": [1, 1, 4],
       "role": "memory",
       "layout": [{"name": "W0", "offset": 0, "shape": [1, 2], "kind": "weights"},
                  {"name": "S0", "offset": 2, "shape": [2], "kind": "surprise"}]},
      {"name": "layers.0.last", "input": "last", "output": "last.next", "dtype": "float32", "shape": [1, 1],
       "role": "cache"}],
    "graphs": [
      {"name": "decode", "file": "decode.onnx", "tokens": 1, "stride": 1, "weights": ["E"]},
      {"name": "prefill", "file": "prefill.onnx", "tokens": 4, "stride": 2, "weights": ["E"]},
      {"name": "chunk", "file": "chunk.onnx", "tokens": 2, "stride": 2, "weights": []}],
    "weights": {"file": "weights.safetensors"},
    "initial_state": {"file": "state.safetensors"},
    "files": {}})");
}

json vectors_json() {
  json manifest = manifest_json();
  manifest["input"] = {{"kind", "vectors"}, {"name", "x"}, {"dtype", "float32"}, {"size", kFakeInputs}};
  manifest["output"] = {{"kind", "vectors"}, {"name", "y"}, {"dtype", "float32"}, {"size", kFakeOutputs}};
  return manifest;
}

void write_manifest(const std::filesystem::path& folder, json manifest) {
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name == "manifest.json" || !entry.is_regular_file() || entry.is_symlink()) continue;
    const core::MappedFile file(entry.path());
    manifest["files"][name] = {{"bytes", file.size()}, {"xxh3_128", file.hash()}};
  }
  write_file(folder / "manifest.json", manifest.dump());
}

void write_bundle(const std::filesystem::path& folder) { write_bundle(folder, manifest_json()); }

void write_bundle(const std::filesystem::path& folder, const json& manifest) {
  for (const json& graph : manifest["graphs"]) write_file(folder / graph["file"], graph["name"]);
  write_file(
      folder / "weights.safetensors",
      safetensors(R"({"E": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})", float_bytes({1.0F, 2.0F})));
  write_file(folder / "state.safetensors",
             safetensors(R"({"layers.0.memory": {"dtype": "F32", "shape": [1, 1, 4], "data_offsets": [0, 16]},)"
                         R"( "layers.0.last": {"dtype": "F32", "shape": [1, 1], "data_offsets": [16, 20]}})",
                         float_bytes({0.5F, 0.25F, 0.0F, 3.0F, 1.0F})));
  write_manifest(folder, manifest);
}

}  // namespace titans::test
