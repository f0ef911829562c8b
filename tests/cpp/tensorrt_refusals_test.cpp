// The backends for TensorRT and TensorRT-RTX: their rejections and error messages.
#include "tensorrt_fixture.h"

namespace titans::test {
namespace {

using TensorRtRefusals = TensorRt;

INSTANTIATE_TEST_SUITE_P(Vendors, TensorRtRefusals, testing::ValuesIn(kVendors),
                         [](const auto& vendor) { return std::string(vendor.param.name); });

TEST_P(TensorRtRefusals, AFileThatIsNoEngine) {
  write_engine("chunk", "something else");
  refuse(TITANS_FAILED, {"fake-fp32.chunk.engine", "the plan has no header", "titans-export build"});
}

// The real vendor library, if TITANS_TEST_TENSORRT_RTX names one. It finds no device or no engine, and our error
// includes its message.
TEST(TensorRtLibrary, ARealOne) {
  const char* library = std::getenv("TITANS_TEST_TENSORRT_RTX");
  if (library == nullptr || kVendors.size() < 2) GTEST_SKIP() << "TITANS_TEST_TENSORRT_RTX names no library";
  const Setting driver("TITANS_CUDA_DRIVER", FAKE_CUDA);
  const TemporaryFolder folder;
  write_bundle(folder.path());
  write_file(folder.path() / "decode.engine", "no engine");
  json manifest = manifest_json();
  manifest["engines"] = {{{"name", "real"},
                          {"target", "rtx-40"},
                          {"compiler", "tensorrt_rtx"},
                          {"compiler_version", "1.7.1.116"},
                          {"precision", "fp32"},
                          {"device", "cuda"},
                          {"sm", {89}},
                          {"platform", PLATFORM},
                          {"memory", "standard-operators"},
                          {"graphs", {{{"graph", "decode"}, {"file", "decode.engine"}}}}}};
  write_manifest(folder.path(), manifest);
  core::SessionOptions options;
  options.device = "cuda";
  options.backend_library = library;
  options.plugin_dir = std::filesystem::path(kVendors[1].backend).parent_path();
  expect_error(TITANS_FAILED, {"decode.engine", "tensorrt_rtx cannot open the engine", "Error Code"},
               [&] { core::Session::open(folder.path(), options); });
}

TEST_P(TensorRtRefusals, ADamagedFile) {
  write_file(folder_.path() / "fake-fp32.chunk.engine", "something else");
  refuse(TITANS_FAILED, {"fake-fp32.chunk.engine", "bytes"});
}

TEST_P(TensorRtRefusals, AnEngineOfAnotherModel) {
  const std::string right = engine_text(1, GetParam().plugins);
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string changed = right;
    changed.replace(changed.find(from), from.size(), to);
    write_engine("decode", changed);
  };
  with("in memory 0 1 1 4", "in memory 0 1 1 5");
  refuse(TITANS_FAILED, {"fake-fp32.decode.engine", "memory as float32 [1, 1, 4]", "[1, 1, 5]"});
  with("in tokens 8", "in tokens 3");
  refuse(TITANS_FAILED, {"tokens as int64 [1, 1]", "int32"});
  with("in learn 4 1\n", "");
  refuse(TITANS_FAILED, {"input learn is missing"});
  with("out last.next 0 1 1", "out other.next 0 1 1");
  refuse(TITANS_FAILED, {"output other.next", "manifest"});
}

TEST_P(TensorRtRefusals, NoDriver) {
  const Setting nowhere("TITANS_CUDA_DRIVER", "/nowhere/libcuda.so.1");
  refuse(TITANS_UNSUPPORTED, {"NVIDIA driver", "/nowhere/libcuda.so.1", "nvidia-smi"});
}

TEST_P(TensorRtRefusals, ADeviceThatIsNotThere) {
  expect_error(TITANS_UNSUPPORTED, {"cuda:0 to cuda:0", "cuda:3"}, [&] {
    core::SessionOptions wanted = options();
    wanted.device = "cuda:3";
    core::Session::open(folder_.path(), wanted);
  });
}

TEST_P(TensorRtRefusals, AnotherDevice) {
  const Setting sm("TITANS_FAKE_SM", "120");
  refuse(TITANS_UNSUPPORTED, {"fake-fp32", "sm 86, 89", "sm 120", "titans-export build", "--target rtx-50"});
}

TEST_P(TensorRtRefusals, AnOlderDriver) {
  const Setting version("TITANS_FAKE_DRIVER", "12020");
  refuse(TITANS_UNSUPPORTED, {"CUDA 12.6", "CUDA 12.2", "update the NVIDIA driver"});
}

TEST_P(TensorRtRefusals, NoLibrary) {
  library_ = "/nowhere/libvendor.so";
  refuse(TITANS_UNSUPPORTED, {"library of", GetParam().name, "/nowhere/libvendor.so", "install"});
}

TEST_P(TensorRtRefusals, ALibraryOfAnotherVersion) {
  use_engine(GetParam().plugins, [](json& engine) {
    const std::string version = engine["compiler_version"];
    engine["compiler_version"] = version.substr(0, version.find('.')) + ".99.0";
  });
  refuse(TITANS_UNSUPPORTED, {".99, got", GetParam().version, "titans-export build", "--target rtx-40"});
}

TEST_P(TensorRtRefusals, ALibraryThatIsNotTheVendors) {
  library_ = FAKE_CUDA;
  refuse(TITANS_UNSUPPORTED, {"getInferLibVersion"});
}

TEST_P(TensorRtRefusals, NoPlugin) {
  if (!GetParam().plugins) GTEST_SKIP() << "this vendor takes no plugins";
  for (const auto& entry : std::filesystem::directory_iterator(backends_.path())) {
    if (entry.path().filename().string().find("plugin") != std::string::npos) std::filesystem::remove(entry.path());
  }
  refuse(TITANS_UNSUPPORTED, {"the plugin NeuralMemory", "TENSORRT_ROOT"});
}

TEST_P(TensorRtRefusals, APluginOfAnotherVersion) {
  if (!GetParam().plugins) GTEST_SKIP() << "this vendor takes no plugins";
  install_plugin(FAKE_PLUGIN_2);
  refuse(TITANS_UNSUPPORTED, {"version 1 of the plugin", "got 2", "titans-export build"});
}

TEST_P(TensorRtRefusals, NoBackend) {
  core::SessionOptions wanted = options();
  const TemporaryFolder empty;
  wanted.plugin_dir = empty.path();
  expect_error(TITANS_UNSUPPORTED, {GetParam().module, "fake-fp32"},
               [&] { core::Session::open(folder_.path(), wanted); });
}

}  // namespace
}  // namespace titans::test
