#include "stream/generator.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace titans::core {
namespace {

// A fresh stream has no logits to draw from.
void require_consumed(const Stream& stream) {
  if (stream.position() > 0) return;
  throw Error(TITANS_INVALID_ARGUMENT, "E0508", "generate", "the stream has not consumed a token",
              "feed a prompt of at least one token");
}

}  // namespace

Generator::Generator(Stream& stream, const Sampling& sampling, std::int64_t max_tokens,
                     std::vector<std::int32_t> stop_tokens)
    : stream_(stream), sampler_(sampling), max_tokens_(max_tokens), stop_tokens_(std::move(stop_tokens)) {
  require_input(stream.session().manifest(), InputKind::kTokens);
  require_consumed(stream);
}

std::optional<std::int32_t> Generator::next() {
  const bool at_limit = max_tokens_ >= 0 && count_ >= static_cast<std::uint64_t>(max_tokens_);
  if (stopped_ || at_limit) return std::nullopt;
  require_consumed(stream_);  // the stream may have been reset since
  const std::int32_t token = sampler_.sample(stream_.last_output(), count_);
  if (std::find(stop_tokens_.begin(), stop_tokens_.end(), token) != stop_tokens_.end()) {
    stopped_ = true;
    return std::nullopt;
  }
  stream_.feed(&token, 1, TITANS_OUTPUT_NONE, nullptr, 0);
  ++count_;
  return token;
}

}  // namespace titans::core
