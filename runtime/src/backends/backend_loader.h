// Finds the backend for a device and opens it.
#pragma once

#include <filesystem>
#include <string>

#include "backends/backend.h"

namespace titans::core {

// The backend that runs plain graphs on a device of that kind, "cpu" or "cuda".
std::string default_backend(const std::string& device_kind);

// An Error unless there is a backend of that name.
void check_backend(const std::string& name);

// Loads libtitans_backend_MODULE.so from `plugin_dir`, or from beside this library where that is empty. It stays loaded
// until the process ends: vendor libraries do not survive being unloaded.
const BackendEntry& load_backend(const std::string& module, const std::filesystem::path& plugin_dir);

// What that backend finds of its vendor's library; where the backend itself is missing, that is why not.
LibraryInfo find_library(const std::string& module, const std::filesystem::path& plugin_dir,
                         const std::string& library);

}  // namespace titans::core
