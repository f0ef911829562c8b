// An engine's manifest entry, for tests.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

namespace titans::test {

// An engine for a Jetson of compute capability `sm`, built by `compiler`, with the graph "decode" only. TensorRT's has
// the plugin.
inline nlohmann::json engine_json(const std::string& name, const std::string& compiler, int sm) {
  using nlohmann::json;
  const bool plugin = compiler == "tensorrt";
  json engine{{"name", name},
              {"target", "orin-agx"},
              {"compiler", compiler},
              {"compiler_version", plugin                       ? "10.3.0"
                                   : compiler == "tensorrt_rtx" ? "1.7.1"
                                                                : "1.24.0"},
              {"precision", "fp16"},
              {"device", "cuda"},
              {"sm", {sm}},
              {"platform", "linux-aarch64"},
              {"cuda", "12.6"},
              {"driver", 12060},
              {"memory", plugin ? "plugin" : "standard-operators"},
              {"plugin", nullptr},
              {"alias", nullptr},
              {"state_in_place", json::array()},
              {"graphs", {{{"graph", "decode"}, {"file", name + ".decode.engine"}}}}};
  if (plugin) {
    engine["plugin"] = {{"name", "NeuralMemory"}, {"namespace", "ai.titans"}, {"version", "1"}};
    engine["alias"] = "undeclared";
    engine["state_in_place"] = {"layers.0.memory"};
  }
  return engine;
}

}  // namespace titans::test
