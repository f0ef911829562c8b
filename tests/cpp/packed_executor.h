// A backend without a device whose memory is a packed row (docs/operator.md), updated in place as the operator's
// kernels do it: inside a chunk a token appends a row and changes the coefficients, the chunk's last token
// chunk_updates W and S. Beside it a memory of another layout, in place too, and a cache that swaps. A frozen token is
// the identity.
//
// A call that fails first spoils all that it is allowed to write. Rows of the open chunk beyond its fill are never
// read.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fake_buffer.h"
#include "session/session.h"

namespace titans::test {

inline constexpr std::int64_t kPackedChunk = 4;
inline constexpr std::size_t kPackedHeads = 2;
inline constexpr std::size_t kPackedRow = 32;           // elements
inline constexpr std::size_t kPackedCoefficients = 12;  // where they start
inline constexpr std::size_t kPackedCoefficientWords = 11;
inline constexpr std::size_t kPackedOtherBytes = 16;  // of the memory of another layout

struct PackedControl {
  int fail_at = -1;  // the call that fails, counted from 0
  std::vector<bool> in_place{true, true, false};
  std::map<std::int32_t, float> surprising;  // tokens with another surprise than their own number's
  std::function<void()> before_call;
  std::vector<std::size_t> calls;
  FakeTraffic traffic;
};

// Writes a bundle into `folder`: graphs of 8 and 4 tokens at multiples of 4, of 2 at multiples of 2, and of 1.
void write_packed_bundle(const std::filesystem::path& folder);

// A session on that bundle, which outlives it, as does `control`.
std::shared_ptr<core::Session> open_packed_session(const std::filesystem::path& folder, PackedControl& control,
                                                   const core::SessionOptions& options = {});

}  // namespace titans::test
