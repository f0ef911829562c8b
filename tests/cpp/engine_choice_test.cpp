// The choice among a bundle's engines, for simulated devices.
#include "session/engine_choice.h"

#include <algorithm>

#include <gtest/gtest.h>

#include "engine_json.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

using nlohmann::json;

class EngineChoice : public testing::Test {
 protected:
  core::EngineChoice choose() const {
    json manifest = manifest_json();
    manifest["engines"] = engines;
    manifest_ = core::Manifest::parse(manifest.dump());
    return core::choose_engine(manifest_, device_info, request, "onnxruntime");
  }
  void refuse(titans_status status, const std::vector<std::string>& words) const {
    expect_error(status, words, [&] { choose(); });
  }
  // The reason why the engine of that name was rejected.
  static std::string reason(const core::EngineChoice& choice, const std::string& name) {
    for (const auto& [other, why] : choice.others) {
      if (other == name) return why;
    }
    return {};
  }

  json engines = json::array({engine_json("orin", "tensorrt", 87)});
  // A Jetson AGX Orin with everything installed.
  core::DeviceInfo device_info{"cuda",
                               "Orin",
                               "linux-aarch64",
                               87,
                               12060,
                               {{"tensorrt_10", {"10.3.0", "", "1", ""}},
                                {"tensorrt_rtx", {"1.7.1", "", "", "no plugins"}},
                                {"onnxruntime", {"1.24.1", "", "", ""}}}};
  core::EngineRequest request{"m.titans", "cuda", "", "", "auto"};
  mutable core::Manifest manifest_;  // choices point into it
};

TEST_F(EngineChoice, TheOneThatFits) {
  const core::EngineChoice choice = choose();
  ASSERT_NE(choice.engine, nullptr);
  EXPECT_EQ(choice.engine->name, "orin");
  EXPECT_EQ(choice.backend, "tensorrt");
  EXPECT_EQ(choice.module, "tensorrt_10");
  EXPECT_NE(choice.reason.find("sm 87"), std::string::npos);
}

// Each mismatch on its own: its error, and the command or package that fixes it.
TEST_F(EngineChoice, AnotherCapability) {
  device_info.sm = 110;
  device_info.name = "Thor";
  refuse(TITANS_UNSUPPORTED,
         {"orin", "made for sm 87", "got sm 110 (Thor)", "titans-export build m.titans --target thor", "engine none"});
}

TEST_F(EngineChoice, AnotherPlatform) {
  device_info.platform = "linux-x86_64";
  refuse(TITANS_UNSUPPORTED, {"orin", "linux-aarch64", "got linux-x86_64", "titans-export build", "on this machine"});
}

TEST_F(EngineChoice, ALibraryThatIsMissing) {
  device_info.libraries["tensorrt_10"] = {"", "libnvinfer.so.10: cannot open", "", ""};
  refuse(TITANS_UNSUPPORTED, {"library of tensorrt 10.3.0", "libnvinfer.so.10", "install tensorrt 10.3.0"});
  device_info.libraries.erase("tensorrt_10");
  refuse(TITANS_UNSUPPORTED, {"library of tensorrt 10.3.0", "no backend tensorrt"});
}

TEST_F(EngineChoice, AnotherVersionOfTheLibrary) {
  device_info.libraries["tensorrt_10"].version = "10.13.3";
  refuse(TITANS_UNSUPPORTED,
         {"needs tensorrt 10.3, got 10.13.3", "titans-export build m.titans --target orin-agx with tensorrt 10.13.3"});
  device_info.libraries["tensorrt_10"].version = "10.3.1";
  EXPECT_NE(choose().engine, nullptr);
}

TEST_F(EngineChoice, APluginThatIsMissingOrOfAnotherVersion) {
  device_info.libraries["tensorrt_10"].plugin_why_not = "libtitans_tensorrt_plugin_10.so: cannot open";
  refuse(TITANS_UNSUPPORTED, {"the plugin NeuralMemory", "libtitans_tensorrt_plugin_10.so", "TENSORRT_ROOT"});
  device_info.libraries["tensorrt_10"].plugin_why_not = "";
  device_info.libraries["tensorrt_10"].plugin_version = "2";
  refuse(TITANS_UNSUPPORTED, {"version 1 of the plugin NeuralMemory", "got 2", "titans-export build"});
}

TEST_F(EngineChoice, AnOlderDriver) {
  device_info.driver = 12020;
  refuse(TITANS_UNSUPPORTED, {"CUDA 12.6 or newer", "got CUDA 12.2", "update the NVIDIA driver"});
}

TEST_F(EngineChoice, ByName) {
  engines.push_back(engine_json("thor", "tensorrt", 110));
  request.engine = "orin";
  EXPECT_EQ(choose().engine->name, "orin");
  request.engine = "thor";
  refuse(TITANS_UNSUPPORTED, {"thor", "made for sm 110", "got sm 87", "--target orin-agx"});
  request.engine = "other";
  refuse(TITANS_INVALID_ARGUMENT, {"no engine \"other\"", "orin, thor"});
  request.engine = "none";
  EXPECT_EQ(choose().engine, nullptr);
  EXPECT_EQ(choose().backend, "onnxruntime");
}

TEST_F(EngineChoice, AnEngineForTheCpuOnAGpu) {
  engines[0]["device"] = "cpu";
  request.engine = "orin";
  refuse(TITANS_UNSUPPORTED, {"made for cpu", "got cuda", "open the session on cpu"});
}

// TensorRT comes before TensorRT-RTX and ONNX Runtime, in any manifest order. Equal engines keep the manifest's order.
TEST_F(EngineChoice, TheFastestFirst) {
  engines = json::array({engine_json("ort", "onnxruntime", 87), engine_json("rtx", "tensorrt_rtx", 87),
                         engine_json("first", "tensorrt", 87), engine_json("second", "tensorrt", 87)});
  core::EngineChoice choice = choose();
  EXPECT_EQ(choice.engine->name, "first");
  EXPECT_NE(choice.reason.find("4 engines"), std::string::npos);
  for (const char* other : {"ort", "rtx", "second"}) EXPECT_NE(reason(choice, other).find("first"), std::string::npos);
  request.backend = "tensorrt_rtx";
  choice = choose();
  EXPECT_EQ(choice.engine->name, "rtx");
  EXPECT_NE(reason(choice, "first").find("backend tensorrt"), std::string::npos);
  request.backend = "";
  device_info.libraries["tensorrt_10"].why_not = "not there";
  EXPECT_EQ(choose().engine->name, "rtx");
  EXPECT_NE(reason(choose(), "first").find("not there"), std::string::npos);
}

// If several engines do not fit, the error is about the closest one.
TEST_F(EngineChoice, TheNearestIsExplained) {
  engines = json::array(
      {engine_json("h100", "tensorrt", 90), engine_json("orin", "tensorrt", 87), engine_json("thor", "tensorrt", 110)});
  device_info.driver = 12020;
  refuse(TITANS_UNSUPPORTED, {"orin", "CUDA 12.6"});
}

TEST_F(EngineChoice, TheMemoryKernelIsAWishToo) {
  request.memory_kernel = "off";
  refuse(TITANS_UNSUPPORTED, {"our plugin", "got memory_kernel off"});
  engines[0] = engine_json("rtx", "tensorrt_rtx", 87);
  EXPECT_EQ(choose().engine->name, "rtx");
  request.memory_kernel = "require";
  refuse(TITANS_UNSUPPORTED, {"standard operators", "got memory_kernel require"});
}

TEST_F(EngineChoice, ThePlainGraphs) {
  // If no engine is for such a device, or the request names ONNX Runtime.
  device_info.kind = request.device = "cpu";
  device_info.sm = device_info.driver = 0;
  core::EngineChoice choice = choose();
  EXPECT_EQ(choice.engine, nullptr);
  EXPECT_EQ(choice.backend, "onnxruntime");
  EXPECT_NE(reason(choice, "orin").find("made for cuda"), std::string::npos);
  device_info.kind = request.device = "cuda";
  request.backend = "onnxruntime";
  EXPECT_EQ(choose().engine, nullptr);
  request.backend = "";
  engines = json::array();
  choice = choose();
  EXPECT_EQ(choice.engine, nullptr);
  EXPECT_NE(choice.reason.find("no engines"), std::string::npos);
}

TEST_F(EngineChoice, ABackendWithoutAnEngine) {
  engines = json::array();
  request.backend = "tensorrt";
  refuse(TITANS_UNSUPPORTED, {"made by tensorrt", "no engines", "titans-export build m.titans --target orin-agx"});
}

// An engine of ONNX Runtime for the CPU. Newer releases can read it. Older ones cannot, so the plain graphs run.
TEST_F(EngineChoice, OnACpu) {
  engines[0] = engine_json("cpu-fp32", "onnxruntime", 0);
  engines[0].update({{"device", "cpu"},
                     {"sm", nullptr},
                     {"driver", nullptr},
                     {"cuda", nullptr},
                     {"target", "cpu"},
                     {"memory", "either"}});
  device_info.kind = request.device = "cpu";
  EXPECT_EQ(choose().engine->name, "cpu-fp32");
  device_info.libraries["onnxruntime"].version = "1.23.9";
  const core::EngineChoice choice = choose();
  EXPECT_EQ(choice.engine, nullptr);
  EXPECT_NE(reason(choice, "cpu-fp32").find("1.23.9"), std::string::npos);
}

// Libraries are opened only for engines that fit the device.
TEST_F(EngineChoice, WhichBackendsAreAsked) {
  engines = json::array({engine_json("h100", "tensorrt", 90), engine_json("rtx", "tensorrt_rtx", 87),
                         engine_json("orin", "tensorrt", 87), engine_json("newer", "tensorrt", 87)});
  engines[3]["compiler_version"] = "11.1.0";
  choose();
  using Modules = std::vector<std::string>;
  EXPECT_EQ(core::modules_to_look_at(manifest_, device_info, request),
            (Modules{"tensorrt_rtx", "tensorrt_10", "tensorrt_11"}));
  request.engine = "rtx";
  EXPECT_EQ(core::modules_to_look_at(manifest_, device_info, request), Modules{"tensorrt_rtx"});
  request.engine = "none";
  EXPECT_EQ(core::modules_to_look_at(manifest_, device_info, request), Modules{});
  // Names from a bundle never open a library.
  request.engine = "";
  engines = json::array({engine_json("orin", "../evil", 87)});
  refuse(TITANS_FAILED, {"compiler", "a plain name", "../evil"});
  engines = json::array({engine_json("orin", "evil", 87)});
  refuse(TITANS_UNSUPPORTED, {"no backend evil"});
  EXPECT_EQ(core::modules_to_look_at(manifest_, device_info, request), Modules{});
  engines = json::array({engine_json("h100", "tensorrt", 90)});
  device_info.sm = 90;
  choose();
  EXPECT_EQ(core::modules_to_look_at(manifest_, device_info, request), Modules{"tensorrt_10"});
}

// If an engine is missing, the error names every target that has a name.
TEST_F(EngineChoice, TargetsByDevice) {
  struct Device {
    int sm;
    const char* name;
    const char* target;
  };
  for (const Device& device :
       {Device{80, "NVIDIA A100-SXM4-80GB", "a100"}, Device{86, "NVIDIA GeForce RTX 3090", "rtx-30"},
        Device{89, "NVIDIA L4", "l4"}, Device{89, "NVIDIA L40S", "l40s"},
        Device{89, "NVIDIA GeForce RTX 4090", "rtx-40"}, Device{90, "NVIDIA H200", "h200"},
        Device{90, "NVIDIA H100 80GB HBM3", "h100"}, Device{100, "NVIDIA B200", "b200"},
        Device{110, "NVIDIA Thor", "thor"}, Device{120, "NVIDIA GeForce RTX 5090", "rtx-50"},
        Device{121, "NVIDIA GB10", "dgx-spark"}}) {
    device_info.sm = device.sm;
    device_info.name = device.name;
    refuse(TITANS_UNSUPPORTED, {std::string("--target ") + device.target + ","});
  }
  device_info.sm = 75;
  device_info.name = "Tesla T4";
  refuse(TITANS_UNSUPPORTED, {"sm 75", "--list-targets"});
}

}  // namespace
}  // namespace titans::test
