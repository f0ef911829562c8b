// Writes and reads state files (docs/state.md).
#pragma once

#include <filesystem>

#include "base/durable_file.h"
#include "state/state_crypto.h"
#include "state/state_schema.h"
#include "state/stream_state.h"

namespace titans::core {

// Writes a stream's state, encrypted if `key` is not NULL. The file is renamed into place atomically.
void save_state(const std::filesystem::path& path, const StateSchema& schema, const StateView& state,
                const StateKey* key, Durability durability = Durability::kPower);

// Reads a state file for a stream of that schema. The memory dtype may differ from the file's.
StreamState load_state(const std::filesystem::path& path, const StateSchema& schema, const StateKey* key);

// Returns the contained safetensors file after all checks that need no model.
Bytes read_state(const std::filesystem::path& path, const StateKey* key);

}  // namespace titans::core
