// A host-memory backend whose memory is a packed row (docs/operator.md), updated in place like the operator's kernels
// do. Inside a chunk, a token appends a row and changes the coefficients. The chunk's last token runs the chunk update
// of W and S. There are also a memory of another layout, updated in place, and a cache that swaps. A frozen token is
// the identity.
//
// A failing call first overwrites everything that it may write. Rows of the open chunk beyond its fill are never read.
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
inline constexpr std::size_t kPackedRow = 32;           // in elements
inline constexpr std::size_t kPackedCoefficients = 12;  // their offset
inline constexpr std::size_t kPackedCoefficientWords = 11;
inline constexpr std::size_t kPackedOtherBytes = 16;  // of the memory of another layout

struct PackedControl {
  int fail_at = -1;  // index of the call that fails, from 0
  std::vector<bool> in_place{true, true, false};
  std::map<std::int32_t, float> surprising;  // tokens whose surprise differs from their number's
  std::function<void()> before_call;
  std::size_t most_streams = 1;  // of one call
  std::vector<std::size_t> calls;
  FakeTraffic traffic;
};

// Writes a bundle into `folder`. Its graphs have 8 and 4 tokens at multiples of 4, 2 tokens at multiples of 2, and 1.
void write_packed_bundle(const std::filesystem::path& folder);

// A session on that bundle. `folder` and `control` must outlive it.
std::shared_ptr<core::Session> open_packed_session(const std::filesystem::path& folder, PackedControl& control,
                                                   const core::SessionOptions& options = {});

}  // namespace titans::test
