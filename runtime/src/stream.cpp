#include "stream.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "error.h"
#include "logits.h"

namespace titans::core {
namespace {

float log_probability(const float* logits, std::size_t vocab, std::int32_t token) {
  const float most = finite_maximum(logits, vocab, "score");
  double sum = 0.0;  // of at least exp(0), so its logarithm is finite
  for (std::size_t i = 0; i < vocab; ++i) sum += std::exp(static_cast<double>(logits[i]) - static_cast<double>(most));
  return static_cast<float>(static_cast<double>(logits[token]) - static_cast<double>(most) - std::log(sum));
}

}  // namespace

void require_input(const Manifest& manifest, InputKind kind) {
  if (manifest.input_kind == kind) return;
  throw Error(TITANS_INVALID_ARGUMENT, "stream", text("a bundle that takes ", input_kind_name(kind)),
              text("one that takes ", input_kind_name(manifest.input_kind)),
              kind == InputKind::kTokens ? "feed it vectors: it has neither tokens nor logits" : "feed it tokens");
}

Stream::Stream(std::shared_ptr<Session> session) : Stream(std::move(session), Allocate{}) { reset(); }

Stream::Stream(std::shared_ptr<Session> session, Allocate) : session_(std::move(session)) {
  const std::vector<StateTensor>& states = session_->manifest().state;
  for (std::size_t state = 0; state < states.size(); ++state) {
    if (session_->engine().in_place(state)) {
      Buffer* live = add_buffer(state);
      journal_.watch(states[state], *live, *add_buffer(state));
      for (BufferSet& set : sets_) set.push_back(live);
    } else {
      for (BufferSet& set : sets_) set.push_back(add_buffer(state));
    }
  }
  last_output_.resize(session_->output_size());
}

Buffer* Stream::add_buffer(std::size_t state) {
  state_bytes_ += session_->manifest().state[state].bytes;
  return buffers_.emplace_back(session_->engine().allocate(state)).get();
}

std::unique_ptr<Stream> Stream::fork() const {
  std::unique_ptr<Stream> twin(new Stream(session_, Allocate{}));
  for (std::size_t state = 0; state < sets_[current_].size(); ++state) {
    twin->sets_[twin->current_][state]->copy_from(*sets_[current_][state]);
  }
  twin->position_ = position_;
  twin->learning_ = learning_;
  twin->last_output_ = last_output_;
  return twin;
}

void Stream::reset() {
  const std::size_t next = free_set(current_, current_);
  transact([&] {
    journal_.save_all();
    const std::vector<StateTensor>& states = session_->manifest().state;
    for (std::size_t index = 0; index < states.size(); ++index) {
      sets_[next][index]->upload(session_->bundle().initial_state().find(states[index].name)->second.data);
    }
  });
  current_ = next;
  position_ = 0;
  std::fill(last_output_.begin(), last_output_.end(), 0.0F);
}

std::size_t Stream::free_set(std::size_t a, std::size_t b) const {
  std::size_t set = 0;
  while (set == a || set == b) ++set;
  return set;
}

void Stream::check_tokens(const std::int32_t* tokens, std::size_t count) const {
  const std::int64_t vocab = session_->manifest().input_size;
  for (std::size_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocab) {
      throw Error(TITANS_INVALID_ARGUMENT, "stream", text("token ", i, " in [0, ", vocab, ")"), text(tokens[i]),
                  "encode the text with the model's own tokenizer");
    }
  }
}

void Stream::check_vectors(const float* vectors, std::size_t count) const {
  const std::size_t size = session_->input_size();
  if (count > std::numeric_limits<std::size_t>::max() / sizeof(float) / size) {
    throw Error(TITANS_INVALID_ARGUMENT, "stream", "a count whose vectors fit into memory", text(count),
                "feed in blocks");
  }
  const float* end = vectors + count * size;
  const float* wrong = std::find_if(vectors, end, [](float value) { return !std::isfinite(value); });
  if (wrong == end) return;
  const auto at = static_cast<std::size_t>(wrong - vectors);
  throw Error(TITANS_INVALID_ARGUMENT, "stream", text("vector ", at / size, " of finite numbers"),
              text(*wrong, " as its element ", at % size), "feed numbers that are neither NaN nor infinite");
}

template <typename Change>
void Stream::transact(Change&& change) {
  journal_.begin();
  try {
    change();
  } catch (...) {
    journal_.restore();
    throw;
  }
}

template <typename Sink>
void Stream::advance(const Sequence& sequence, Sink&& sink) {
  const std::size_t count = sequence.count;
  if (count == 0) return;
  const std::vector<Graph>& graphs = session_->manifest().graphs;
  std::size_t at = current_;
  transact([&] {
    const Session::WorkspaceLease lease(*session_);
    Workspace& workspace = lease.get();
    std::size_t rows = 0;
    for (std::size_t done = 0; done < count; done += rows) {
      const std::uint64_t position = position_ + done;
      const std::size_t graph = session_->next_graph(position, count - done);
      const std::size_t next = free_set(current_, at);
      rows = static_cast<std::size_t>(graphs[graph].tokens);
      journal_.save_for(position, rows);
      const std::int32_t* tokens = sequence.tokens == nullptr ? nullptr : sequence.tokens + done;
      const float* vectors = sequence.vectors == nullptr ? nullptr : sequence.vectors + done * session_->input_size();
      session_->engine().run({graph, tokens, vectors, static_cast<std::int64_t>(position), learning_, sets_[at].data(),
                              sets_[next].data()},
                             workspace);
      sink(done, rows, workspace);
      at = next;
    }
    std::copy_n(workspace.output(rows - 1, 1), last_output_.size(), last_output_.begin());
  });
  current_ = at;
  position_ += count;
}

void Stream::check_room(std::size_t count, titans_logits which, const float* output, std::size_t capacity) const {
  const std::size_t size = session_->output_size();
  const char* what = session_->manifest().input_kind == InputKind::kTokens ? "logits" : "outputs";
  if (which == TITANS_LOGITS_LAST && count == 0 && position_ == 0) {
    throw Error(TITANS_INVALID_ARGUMENT, "stream",
                text("at least one token consumed before its last ", what, " are asked for"), "a fresh stream",
                "feed a token first");
  }
  if (which == TITANS_LOGITS_ALL && count > std::numeric_limits<std::size_t>::max() / size) {
    throw Error(TITANS_INVALID_ARGUMENT, "stream", text("a count whose ", what, " fit into memory"), text(count),
                "feed in blocks");
  }
  const std::size_t needed = which == TITANS_LOGITS_ALL ? count * size : which == TITANS_LOGITS_LAST ? size : 0;
  if (capacity < needed || (needed > 0 && output == nullptr)) {
    throw Error(TITANS_INVALID_ARGUMENT, "stream", text("room for ", needed, " ", what),
                output == nullptr ? std::string("NULL") : text(capacity), "pass a larger buffer");
  }
}

void Stream::feed(const Sequence& sequence, titans_logits which, float* output) {
  const std::size_t size = session_->output_size();
  advance(sequence, [&](std::size_t first, std::size_t rows, Workspace& workspace) {
    if (which != TITANS_LOGITS_ALL) return;
    std::copy_n(workspace.output(0, rows), rows * size, output + first * size);
  });
  if (which == TITANS_LOGITS_LAST) std::copy(last_output_.begin(), last_output_.end(), output);
}

void Stream::feed(const std::int32_t* tokens, std::size_t count, titans_logits which, float* logits,
                  std::size_t capacity) {
  require_input(session_->manifest(), InputKind::kTokens);
  check_room(count, which, logits, capacity);
  check_tokens(tokens, count);
  feed({tokens, nullptr, count}, which, logits);
}

void Stream::feed_vectors(const float* vectors, std::size_t count, titans_logits which, float* outputs,
                          std::size_t capacity) {
  require_input(session_->manifest(), InputKind::kVectors);
  check_room(count, which, outputs, capacity);
  check_vectors(vectors, count);
  feed({nullptr, vectors, count}, which, outputs);
}

void Stream::score(const std::int32_t* tokens, std::size_t count, float* logprobs) {
  require_input(session_->manifest(), InputKind::kTokens);
  check_tokens(tokens, count);
  if (count == 0) return;
  const std::size_t vocab = session_->output_size();
  const float first_logprob =
      position_ == 0 ? -std::log(static_cast<float>(vocab)) : log_probability(last_output_.data(), vocab, tokens[0]);
  advance({tokens, nullptr, count}, [&](std::size_t first, std::size_t rows, Workspace& workspace) {
    const std::size_t scored = std::min(rows, count - first - 1);  // the row after the last token scores none of these
    const float* logits = workspace.output(0, scored);
    for (std::size_t row = 0; row < scored; ++row) {
      const std::size_t next = first + row + 1;
      logprobs[next] = log_probability(logits + row * vocab, vocab, tokens[next]);
    }
  });
  logprobs[0] = first_logprob;
}

std::uint64_t Stream::state_bytes() const { return state_bytes_ + last_output_.size() * sizeof(float); }

void Stream::read_memory(std::size_t index, float* values, std::size_t capacity) const {
  const MemoryView& memory = session_->memories()[index];
  if (capacity < memory.elements) {
    throw Error(TITANS_INVALID_ARGUMENT, "stream", text("room for ", memory.elements, " values of ", memory.name),
                text(capacity), "pass a larger buffer");
  }
  const StateTensor& state = session_->manifest().state[memory.state];
  std::vector<float> packed(state.bytes / sizeof(float));
  sets_[current_][memory.state]->download(reinterpret_cast<std::byte*>(packed.data()));
  const auto row = static_cast<std::size_t>(state.shape.back());
  for (std::size_t start = memory.offset; start < packed.size(); start += row) {
    unpack_field(memory.storage, packed.data() + start, memory.extent, memory.columns, values);
    values += memory.extent;
  }
}

}  // namespace titans::core
