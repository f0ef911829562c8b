// Generates tokens and feeds them back to a stream.
#pragma once

#include <optional>
#include <vector>

#include "stream/sampler.h"
#include "stream/stream.h"

namespace titans::core {

class Generator {
 public:
  // `max_tokens` < 0: no limit. The stream must outlive the generator.
  Generator(Stream& stream, const Sampling& sampling, std::int64_t max_tokens, std::vector<std::int32_t> stop_tokens);

  // The next token, already fed to the stream; no value at the end. A retry after a failed call draws the same token.
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
