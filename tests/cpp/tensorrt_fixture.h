// The backends for TensorRT and TensorRT-RTX on a fake driver and a fake vendor library: everything except the device.
// fake_executor.h has the engines' arithmetic.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "fake_executor.h"
#include "stream/stream.h"
#include "test_bundle.h"

namespace titans::test {

using nlohmann::json;
using Tokens = std::vector<std::int32_t>;

// CMake sets paths and versions.
struct Vendor {
  const char* name;
  const char* module;
  const char* backend;  // our library
  const char* library;  // the vendor's library
  const char* version;
  bool plugins;
};

inline const std::vector<Vendor> kVendors{
    {"tensorrt", TENSORRT_MODULE, TENSORRT_BACKEND, FAKE_NVINFER, TENSORRT_VERSION, true},
#ifdef TENSORRT_RTX_BACKEND
    {"tensorrt_rtx", "tensorrt_rtx", TENSORRT_RTX_BACKEND, FAKE_TENSORRT_RTX, "1.7.1", false},
#endif
};

inline void PrintTo(const Vendor& vendor, std::ostream* out) { *out << vendor.name; }

// Sets an environment variable while a test runs.
class Setting {
 public:
  Setting(const char* name, const std::string& value) : name_(name) { ::setenv(name, value.c_str(), 1); }
  ~Setting() { ::unsetenv(name_); }
  Setting(const Setting&) = delete;
  Setting& operator=(const Setting&) = delete;

 private:
  const char* name_;
};

// A function of a library, which is loaded if necessary.
template <typename Function>
Function* function_of(const char* library, const char* name) {
  void* loaded = ::dlopen(library, RTLD_NOW | RTLD_LOCAL);
  return loaded == nullptr ? nullptr : reinterpret_cast<Function*>(::dlsym(loaded, name));
}

class TensorRt : public testing::TestWithParam<Vendor> {
 protected:
  TensorRt() : driver_("TITANS_CUDA_DRIVER", FAKE_CUDA) {
    write_bundle(folder_.path());
    std::filesystem::copy(GetParam().backend, backends_.path());
    if (GetParam().plugins) install_plugin(FAKE_PLUGIN);
    use_engine(/*plugin=*/GetParam().plugins);
  }
  ~TensorRt() override {
    EXPECT_EQ(function_of<std::size_t()>(FAKE_CUDA, "fake_cuda_held")(), 0U);
    EXPECT_EQ(function_of<int()>(GetParam().library, "fake_nvinfer_alive")(), 0);
  }

  void install_plugin(const std::filesystem::path& library) {
    const std::string module = GetParam().module;
    const std::string name = "libtitans_tensorrt_plugin_" + module.substr(module.rfind('_') + 1) + ".so";
    std::filesystem::copy(library, backends_.path() / name, std::filesystem::copy_options::overwrite_existing);
  }

  // The text of an engine file for a graph.
  static std::string engine_text(int tokens, bool plugin, bool vectors = false) {
    const std::string count = std::to_string(tokens);
    const std::string input = vectors ? "x 0 1 " + count + " 2" : "tokens 8 1 " + count;
    const std::string output = vectors ? "y 0 1 " + count + " 3" : "logits 0 1 " + count + " 8";
    return std::string("FAKE ENGINE\nplugin ") + (plugin ? "1" : "0") + "\nin " + input +
           "\nin position 8 1\nin learn 4 1\nin memory 0 1 1 4\nin last 0 1 1\nout " + output +
           "\nout memory.next 0 1 1 4\nout last.next 0 1 1\n";
  }

  // Replaces the bundle by one that takes vectors and has a separate graph for the last token of four.
  void use_vectors() {
    manifest_ = vectors_json();
    manifest_["graphs"].push_back(manifest_["graphs"][0]);
    manifest_["graphs"][0].update({{"stride", 4}, {"offsets", {0, 1, 2}}});
    manifest_["graphs"][3].update({{"name", "last"}, {"file", "last.onnx"}, {"stride", 4}, {"offsets", {3}}});
    for (const auto& file : std::vector<std::filesystem::directory_entry>(
             std::filesystem::directory_iterator(folder_.path()), std::filesystem::directory_iterator())) {
      std::filesystem::remove(file);
    }
    write_bundle(folder_.path(), manifest_);
    use_engine(GetParam().plugins);
  }

  // Adds an engine to the bundle. `change` may modify its manifest entry.
  template <typename Change>
  void use_engine(bool plugin, Change&& change) {
    json manifest = manifest_;
    json engine{{"name", "fake-fp32"},
                {"target", "rtx-40"},
                {"compiler", GetParam().name},
                {"compiler_version", GetParam().version},
                {"precision", "fp32"},
                {"device", "cuda"},
                {"sm", {86, 89}},
                {"platform", PLATFORM},
                {"cuda", "12.6"},
                {"driver", 12060},
                {"memory", plugin ? "plugin" : "standard-operators"},
                {"plugin", nullptr},
                {"alias", nullptr},
                {"state_in_place", json::array()}};
    if (plugin) {
      engine["plugin"] = {{"name", "NeuralMemory"}, {"namespace", "ai.titans"}, {"version", "1"}};
      engine["alias"] = "undeclared";
      engine["state_in_place"] = {"layers.0.memory"};
    }
    for (const auto& [graph, tokens] :
         std::map<std::string, int>{{"prefill", 4}, {"chunk", 2}, {"decode", 1}, {"last", 1}}) {
      const json& graphs = manifest["graphs"];
      const std::string& name = graph;
      if (std::none_of(graphs.begin(), graphs.end(), [&](const json& one) { return one["name"] == name; })) continue;
      const std::string file = "fake-fp32." + graph + ".engine";
      if (!std::filesystem::exists(folder_.path() / file)) {
        write_file(folder_.path() / file, engine_text(tokens, plugin, manifest["input"]["kind"] == "vectors"));
      }
      engine["graphs"].push_back({{"graph", graph}, {"file", file}});
    }
    change(engine);
    manifest["engines"] = {engine};
    write_manifest(folder_.path(), manifest);
  }
  void use_engine(bool plugin) {
    use_engine(plugin, [](json&) {});
  }
  void write_engine(const std::string& graph, const std::string& content) {
    write_file(folder_.path() / ("fake-fp32." + graph + ".engine"), content);
    use_engine(GetParam().plugins);
  }

  core::SessionOptions options() const {
    core::SessionOptions options;
    options.device = "cuda";
    options.plugin_dir = backends_.path();
    options.libraries = std::string("other=/nowhere\n") + GetParam().module + "=" + library_;
    return options;
  }
  std::shared_ptr<core::Session> open() const { return core::Session::open(folder_.path(), options()); }
  void refuse(titans_status status, const std::vector<std::string>& words) const {
    expect_error(status, words, [&] { open(); });
  }
  static json info(const core::Session& session) { return json::parse(session.info()); }
  std::string cuda_graphs(const core::Session& session) const { return info(session)["details"]["cuda_graphs"]; }

  TemporaryFolder folder_;
  TemporaryFolder backends_;
  std::string library_ = GetParam().library;
  Setting driver_;
  json manifest_ = manifest_json();
};

inline std::vector<float> feed(core::Stream& stream, const Tokens& tokens) {
  std::vector<float> logits(tokens.size() * kFakeVocab);
  stream.feed(tokens.data(), tokens.size(), TITANS_OUTPUT_ALL, logits.data(), logits.size());
  return logits;
}

inline Tokens some_tokens(std::size_t count, std::size_t seed = 0) {
  Tokens tokens;
  for (std::size_t i = 0; i < count; ++i) tokens.push_back(static_cast<std::int32_t>((i * 5 + seed) % kFakeVocab));
  return tokens;
}

// Checks that the logits are those of the recurrence for any split of the stream.
inline void expect_any_cut(const std::shared_ptr<core::Session>& session) {
  const Tokens tokens = some_tokens(16);
  const std::vector<float> expected = expected_logits(tokens);
  for (const std::size_t cut : {1U, 2U, 3U, 5U, 7U, 16U}) {
    core::Stream stream(session);
    std::vector<float> logits;
    for (std::size_t at = 0; at < tokens.size(); at += cut) {
      const Tokens part(tokens.begin() + static_cast<std::ptrdiff_t>(at),
                        tokens.begin() + static_cast<std::ptrdiff_t>(std::min(at + cut, tokens.size())));
      const std::vector<float> some = feed(stream, part);
      logits.insert(logits.end(), some.begin(), some.end());
    }
    EXPECT_EQ(logits, expected) << "in parts of " << cut;
  }
}

}  // namespace titans::test
