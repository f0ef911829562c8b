// Our plugin for TensorRT, in a library of its own beside this backend.
#pragma once

#include <filesystem>
#include <string>

namespace titans::core {

struct PluginLibrary {
  std::filesystem::path path;
  std::string version;  // of the plugin NeuralMemory, empty: not known
  std::string why_not;  // why it cannot be used, empty: it can
};

// Looks for it; the library stays loaded until the process ends. TensorRT-RTX takes no plugins in its networks, so for
// that there is none.
PluginLibrary find_plugin_library();

}  // namespace titans::core
