// An engine without a device, for any manifest. Of each token t at position p it makes, in this order,
//   logits[v] = sum of the first element of every float32 state + v + p % 256
//   x = (3 x + t + 1) mod 1024   for each element x of a float32 state, where the stream learns or it is no memory
// with t the token's id or the vector's first element, cut to [0, 256); all of it exact. States of other types go the
// same way byte by byte, mod 256. A token of kFailing fails after its outputs are spoilt, one of kSpoiling gives NaN.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backends/backend.h"

namespace titans::fuzz {

inline constexpr std::int32_t kFailing = 7;
inline constexpr std::int32_t kSpoiling = 6;

// One buffer for input and output of the states that are set in `in_place`, counted modulo 32.
std::unique_ptr<core::Executor> make_echo_executor(const core::Bundle& bundle, std::uint32_t in_place);

// A step of a float32 element.
float echo(float value, float token);

// What it takes for the token of a vector's first element.
float echo_token(float element);

}  // namespace titans::fuzz
