// Finds the backend for a device and opens it.
#pragma once

#include <filesystem>
#include <string>

#include "backend.h"

namespace titans::core {

// The backend that serves `device` unless the caller insists on another.
std::string default_backend(const std::string& device);

// Loads libtitans_backend_NAME.so from `plugin_dir`, or from beside this library where that is empty. It stays loaded
// until the process ends: vendor libraries do not survive being unloaded.
const BackendEntry& load_backend(const std::string& name, const std::filesystem::path& plugin_dir);

}  // namespace titans::core
