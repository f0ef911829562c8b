// One call for many streams, side by side on the session's threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/error.h"
#include "session/session.h"
#include "stream/stream.h"

namespace titans::core {

// As Stream::feed and Stream::feed_vectors take it: tokens or vectors, the other NULL.
struct BatchItem {
  Stream* stream;
  const std::int32_t* tokens;
  const float* vectors;
  std::size_t count;
  titans_output which;
  float* output;
  std::size_t capacity;
};

// Feeds each stream its own, in any order and at the same time. One that fails stays as it was and stops no other: what
// it says is in its place of the result, and TITANS_OK is in that of one that succeeded. An Error, before anything
// runs, where a stream is NULL, of another session, or there twice.
std::vector<Failure> run_batch(Session& session, const std::vector<BatchItem>& items);

// Throws what the first of those that failed says, and how many others did; nothing where none failed.
void require_success(const std::vector<Failure>& outcomes);

}  // namespace titans::core
