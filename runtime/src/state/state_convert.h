// A state tensor as one bundle keeps it, made into what another bundle of the same model keeps.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

#include "bundle/manifest.h"

namespace titans::core {

// Why a tensor kept as `from` is none of the model that keeps it as `to`; nothing where it is. Storage and what the
// rounding adds (kept errors, a count of chunk_updates) may differ, and so where fields lie.
std::optional<std::string> difference(const StateTensor& from, const StateTensor& to);

// Writes to.bytes at `out` from the from.bytes at `in`, of two that do not differ. A field in the same dtype keeps
// its bits; of another one its value, the kept errors added, is rounded to the nearest, and errors become what that
// loses. A count of chunk_updates that was not kept starts at 0.
void convert_state(const StateTensor& from, const std::byte* in, const StateTensor& to, std::byte* out);

}  // namespace titans::core
