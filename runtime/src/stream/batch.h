// Feeds many streams in one call: in parallel on the session's threads, or in graph calls that they share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/error.h"
#include "session/session.h"
#include "stream/stream.h"

namespace titans::core {

// The arguments of Stream::feed or Stream::feed_vectors: tokens or vectors; the other is NULL.
struct BatchItem {
  Stream* stream;
  const std::int32_t* tokens;
  const float* vectors;
  std::size_t count;
  titans_output which;
  float* output;
  std::size_t capacity;
};

// Feeds each stream, in any order. A failed stream is unchanged and does not stop the others. The
// result has one entry per item: its failure, or TITANS_OK. Throws an Error before anything runs if a stream is NULL,
// belongs to another session, or occurs twice.
std::vector<Failure> run_batch(Session& session, const std::vector<BatchItem>& items);

// Throws the first failure, with the number of others. Does nothing if there is none.
void require_success(const std::vector<Failure>& outcomes);

}  // namespace titans::core
