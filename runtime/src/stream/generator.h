// Continues a stream with tokens of its own.
#pragma once

#include <optional>
#include <vector>

#include "stream/sampler.h"
#include "stream/stream.h"

namespace titans::core {

class Generator {
 public:
  // `max_tokens` < 0: no limit. The stream outlives the generator.
  Generator(Stream& stream, const Sampling& sampling, std::int64_t max_tokens, std::vector<std::int32_t> stop_tokens);

  // The next token, which the stream has consumed; nothing at the end. A failed call draws the same token again.
  std::optional<std::int32_t> next();
  const Stream& stream() const { return stream_; }

 private:
  Stream& stream_;
  Sampler sampler_;
  std::int64_t max_tokens_;
  std::vector<std::int32_t> stop_tokens_;
  std::uint64_t count_ = 0;
  bool stopped_ = false;
};

}  // namespace titans::core
