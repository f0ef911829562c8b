// State files: what docs/state.md defines, written and read.
#pragma once

#include <filesystem>

#include "base/durable_file.h"
#include "session/session.h"
#include "state/state_crypto.h"
#include "state/stream_state.h"

namespace titans::core {

// Writes the state of one of the session's streams, encrypted where there is a key. The file is there whole or not at
// all, and until then the one before it.
void save_state(const std::filesystem::path& path, const Session& session, const StateView& state, const StateKey* key,
                Durability durability = Durability::kPower);

// Reads one for a stream of the session, whose bundle may keep memories in another dtype than the file.
StreamState load_state(const std::filesystem::path& path, const Session& session, const StateKey* key);

// The safetensors file in it, with everything checked that needs no model.
Bytes read_state(const std::filesystem::path& path, const StateKey* key);

}  // namespace titans::core
