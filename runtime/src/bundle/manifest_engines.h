// The manifest's `engines`: which of the graphs are compiled for which device (docs/bundle.md).
#pragma once

#include <vector>

#include "base/json_reader.h"
#include "bundle/manifest.h"

namespace titans::core {

// The name that no engine has: whoever asks for it wants the plain graphs.
inline constexpr std::string_view kNoEngine = "none";

// `manifest` has its state and graphs already.
std::vector<EngineRecord> read_engines(const JsonReader& engines, const Manifest& manifest);

}  // namespace titans::core
