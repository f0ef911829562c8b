// A host-memory engine for any manifest. For each token t at position p it computes, in this order,
//   logits[v] = sum of the first element of every float32 state + v + p % 256
//   x = (3 x + t + 1) mod 1024   for each element x of a float32 state, if the stream learns or the state is no memory
// Here t is the token's id or the vector's first element, clamped to [0, 256). All results are exact. States of other
// types are treated the same way byte by byte, mod 256. A token kFailing fails after overwriting its outputs; a token
// kSpoiling gives NaN.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backends/backend.h"

namespace titans::fuzz {

inline constexpr std::int32_t kFailing = 7;
inline constexpr std::int32_t kSpoiling = 6;
inline constexpr std::size_t kEchoStreams = 3;  // of one call, if all states are updated in place

// States whose bit is set in `in_place` have one buffer for input and output. State indices are taken modulo 32.
std::unique_ptr<core::Executor> make_echo_executor(const core::Bundle& bundle, std::uint32_t in_place);

// One step of a float32 element.
float echo(float value, float token);

// The token of a vector, from its first element.
float echo_token(float element);

}  // namespace titans::fuzz
