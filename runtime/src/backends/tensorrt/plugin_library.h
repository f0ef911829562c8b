// Our TensorRT plugin, a separate library beside this backend.
#pragma once

#include <filesystem>
#include <string>

namespace titans::core {

struct PluginLibrary {
  std::filesystem::path path;
  std::string version;  // version of the NeuralMemory plugin; empty: unknown
  std::string why_not;  // why it is unusable; empty: usable
};

// Finds the plugin library, which stays loaded until the process ends. TensorRT-RTX networks cannot use plugins, so it
// has none.
PluginLibrary find_plugin_library();

}  // namespace titans::core
