// Converts a state tensor between bundles of the same model.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

#include "bundle/manifest.h"

namespace titans::core {

// Why `from` and `to` are not the same tensor of one model; no value if they are. Memory dtype, field offsets, rounding
// errors and the count of chunk updates may differ.
std::optional<std::string> difference(const StateTensor& from, const StateTensor& to);

// Converts from.bytes at `in` to to.bytes at `out`. difference(from, to) must be empty. A field with the same dtype
// keeps its bits. Otherwise the value plus its stored rounding error is rounded to nearest, and the new rounding error
// is stored. A missing count of chunk updates starts at 0.
void convert_state(const StateTensor& from, const std::byte* in, const StateTensor& to, std::byte* out);

}  // namespace titans::core
