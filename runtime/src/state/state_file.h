// State files: what docs/state.md defines, written and read.
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

// Reads a state file for a stream of that schema, whose memories may have another dtype than the file's.
StreamState load_state(const std::filesystem::path& path, const StateSchema& schema, const StateKey* key);

// The safetensors file in it, with everything checked that needs no model.
Bytes read_state(const std::filesystem::path& path, const StateKey* key);

}  // namespace titans::core
