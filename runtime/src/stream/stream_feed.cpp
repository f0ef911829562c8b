// Feeds tokens and vectors to a stream: checks them and runs the graphs of the schedule.
#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>
#include <memory>

#include "base/error.h"
#include "stream/feed.h"
#include "stream/outputs.h"
#include "stream/stream.h"

namespace titans::core {
namespace {

float log_probability(const float* logits, std::size_t vocab, std::int32_t token) {
  const float most = finite_maximum(logits, vocab, "score");
  double sum = 0.0;  // at least exp(0) = 1, so its logarithm is finite
  for (std::size_t i = 0; i < vocab; ++i) sum += std::exp(static_cast<double>(logits[i]) - static_cast<double>(most));
  return static_cast<float>(static_cast<double>(logits[token]) - static_cast<double>(most) - std::log(sum));
}

}  // namespace

void require_input(const Manifest& manifest, InputKind kind) {
  if (manifest.input_kind == kind) return;
  throw Error(TITANS_INVALID_ARGUMENT, "E0506", "stream",
              text("the bundle takes ", input_kind_name(manifest.input_kind), ", got ", input_kind_name(kind)),
              kind == InputKind::kTokens ? "feed it vectors; it has neither tokens nor logits" : "feed it tokens");
}

void Stream::check_tokens(const std::int32_t* tokens, std::size_t count) const {
  const std::int64_t vocab = session_->manifest().input_size;
  for (std::size_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocab) {
      throw Error(TITANS_INVALID_ARGUMENT, "E0504", "stream",
                  text("expected token ", i, " in [0, ", vocab, "), got ", tokens[i]),
                  "encode the text with the model's own tokenizer");
    }
  }
}

void Stream::check_vectors(const float* vectors, std::size_t count) const {
  const std::size_t size = session_->input_size();
  if (count > std::numeric_limits<std::size_t>::max() / sizeof(float) / size) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0507", "stream", text(count, " vectors do not fit into memory"),
                "feed in blocks");
  }
  const float* end = vectors + count * size;
  const float* wrong = std::find_if(vectors, end, [](float value) { return !std::isfinite(value); });
  if (wrong == end) return;
  const auto at = static_cast<std::size_t>(wrong - vectors);
  throw Error(TITANS_INVALID_ARGUMENT, "E0505", "stream",
              text("expected finite numbers in vector ", at / size, ", got ", *wrong, " as element ", at % size),
              "feed numbers without NaN and infinity");
}

void Stream::run(Feed& feed) {
  const Session::WorkspaceLease lease(*session_);
  const OutputRows outputs(lease.get(), 0);
  Call call{};
  while (feed.next(call)) {
    feed.save();
    try {
      session_->executor().run(call, lease.get());
    } catch (...) {
      feed.fail(std::current_exception());
      continue;
    }
    feed.finish(outputs);
  }
}

void Stream::check_room(std::size_t count, titans_output which, const float* output, std::size_t capacity) const {
  const std::size_t size = session_->output_size();
  const char* what = session_->manifest().input_kind == InputKind::kTokens ? "logits" : "outputs";
  if (which == TITANS_OUTPUT_LAST && count == 0 && position_ == 0) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0508", "stream", text("a fresh stream has no last ", what),
                "feed at least one token first");
  }
  if (which == TITANS_OUTPUT_ALL && count > std::numeric_limits<std::size_t>::max() / size) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0507", "stream", text(what, " of ", count, " tokens do not fit into memory"),
                "feed in blocks");
  }
  const std::size_t needed = which == TITANS_OUTPUT_ALL ? count * size : which == TITANS_OUTPUT_LAST ? size : 0;
  if (capacity < needed || (needed > 0 && output == nullptr)) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0507", "stream",
                text("expected room for ", needed, " ", what, ", got ",
                     output == nullptr ? std::string("NULL") : text(capacity)),
                "pass a larger buffer");
  }
}

std::unique_ptr<Feed> Stream::begin(InputKind kind, const Sequence& sequence, titans_output which, float* output,
                                    std::size_t capacity) {
  require_input(session_->manifest(), kind);
  check_room(sequence.count, which, output, capacity);
  if (kind == InputKind::kTokens) check_tokens(sequence.tokens, sequence.count);
  if (kind == InputKind::kVectors) check_vectors(sequence.vectors, sequence.count);
  const std::size_t size = session_->output_size(), count = sequence.count;
  if (count == 0) {
    if (which == TITANS_OUTPUT_LAST) std::copy(last_output_.begin(), last_output_.end(), output);
    return nullptr;
  }
  return std::make_unique<Feed>(*this, sequence, [=](std::size_t first, std::size_t rows, const OutputRows& outputs) {
    if (which == TITANS_OUTPUT_ALL) {
      std::copy_n(outputs.get(0, rows), rows * size, output + first * size);
    } else if (which == TITANS_OUTPUT_LAST && first + rows == count) {
      std::copy_n(outputs.get(rows - 1, 1), size, output);
    }
  });
}

void Stream::feed(const std::int32_t* tokens, std::size_t count, titans_output which, float* logits,
                  std::size_t capacity) {
  const std::unique_ptr<Feed> feed = begin(InputKind::kTokens, {tokens, nullptr, count}, which, logits, capacity);
  if (feed != nullptr) run(*feed);
}

void Stream::feed_vectors(const float* vectors, std::size_t count, titans_output which, float* outputs,
                          std::size_t capacity) {
  const std::unique_ptr<Feed> feed = begin(InputKind::kVectors, {nullptr, vectors, count}, which, outputs, capacity);
  if (feed != nullptr) run(*feed);
}

void Stream::score(const std::int32_t* tokens, std::size_t count, float* logprobs) {
  require_input(session_->manifest(), InputKind::kTokens);
  check_tokens(tokens, count);
  if (count == 0) return;
  const std::size_t vocab = session_->output_size();
  const float first_logprob =
      position_ == 0 ? -std::log(static_cast<float>(vocab)) : log_probability(last_output_.data(), vocab, tokens[0]);
  Feed feed(*this, {tokens, nullptr, count}, [&](std::size_t first, std::size_t rows, const OutputRows& outputs) {
    const std::size_t scored = std::min(rows, count - first - 1);  // the last token's row scores none of these tokens
    const float* logits = outputs.get(0, scored);
    for (std::size_t row = 0; row < scored; ++row) {
      const std::size_t next = first + row + 1;
      logprobs[next] = log_probability(logits + row * vocab, vocab, tokens[next]);
    }
  });
  run(feed);
  logprobs[0] = first_logprob;
}
}  // namespace titans::core
