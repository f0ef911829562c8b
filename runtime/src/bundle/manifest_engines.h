// Reads the manifest's `engines`: graphs compiled for devices (docs/bundle.md).
#pragma once

#include <vector>

#include "base/json_reader.h"
#include "bundle/manifest.h"

namespace titans::core {

// Reserved name: requests the plain graphs.
inline constexpr std::string_view kNoEngine = "none";

// Requires `manifest` with state and graphs.
std::vector<EngineRecord> read_engines(const JsonReader& engines, const Manifest& manifest);

}  // namespace titans::core
