// Finds the backend for a device and opens it.
#pragma once

#include <filesystem>
#include <string>

#include "backends/backend.h"

namespace titans::core {

// The default backend for plain graphs on a device kind, "cpu" or "cuda".
std::string default_backend(const std::string& device_kind);

// Throws an Error if no backend has that name.
void check_backend(const std::string& name);

// Loads libtitans_backend_MODULE.so from `plugin_dir`, or from beside this library if it is empty. It stays loaded
// until the process ends, because vendor libraries do not survive unloading.
const BackendEntry& load_backend(const std::string& module, const std::filesystem::path& plugin_dir);

// The vendor library that the backend finds. A missing backend is reported in `why_not`.
LibraryInfo find_library(const std::string& module, const std::filesystem::path& plugin_dir,
                         const std::string& library);

}  // namespace titans::core
