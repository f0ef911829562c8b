// Feeds tokens and vectors to a stream: runs the graphs of the schedule under the stream's guard.
#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/log.h"
#include "stream/outputs.h"
#include "stream/stream.h"

namespace titans::core {
namespace {

constexpr std::uint64_t kAlways = std::numeric_limits<std::uint64_t>::max();

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

Call Stream::next_call(const Sequence& sequence, const FeedCursor& cursor, std::uint64_t end) const {
  const bool again = cursor.position < position_;
  auto remaining = static_cast<std::size_t>((again ? position_ : end) - cursor.position);
  if (guard_ && guard_->on()) remaining = guard_->reach(cursor.position, remaining);
  const std::size_t graph = session_->next_graph(cursor.position, remaining);
  const std::size_t done = again ? 0 : static_cast<std::size_t>(cursor.position - position_);
  const std::int32_t* tokens = nullptr;
  const float* vectors = nullptr;
  if (sequence.tokens != nullptr) tokens = again ? guard_->tokens_at(cursor.position) : sequence.tokens + done;
  if (sequence.vectors != nullptr) {
    vectors = again ? guard_->vectors_at(cursor.position) : sequence.vectors + done * session_->input_size();
  }
  const bool learn = learning_ && cursor.position >= cursor.frozen_until;
  return {graph, tokens, vectors, static_cast<std::int64_t>(cursor.position), learn, sets_[cursor.set].data(), nullptr};
}

void Stream::report_progress(std::uint64_t done, std::uint64_t total) const {
  if (progress_.function == nullptr || progress_.function(progress_.user, done, total) == 0) return;
  throw Error(TITANS_CANCELLED, "E0509", "stream",
              text("cancelled by the progress function after ", done, " of ", total, " tokens"), "feed them again");
}

Violation Stream::run_guarded(const Call& call, std::size_t tokens, Workspace& workspace) {
  try {
    session_->executor().run(call, workspace);
  } catch (const Error& error) {
    if (!call.learn || error.status() != TITANS_FAILED || guard_->limits().policy == TITANS_GUARD_RAISE) throw;
    // An overflowing memory gives the next layer gates that are not finite, and kernels reject those.
    Violation violation;
    violation.reason = TITANS_GUARD_CALL;
    violation.failure = error.what();
    return violation;
  }
  BufferSet after(call.next_state, call.next_state + sets_[0].size());
  return guard_->look(sets_[guard_->set()], after, static_cast<std::uint64_t>(call.position), tokens,
                      workspace.output(tokens - 1, 1));
}

void Stream::repair(FeedCursor& cursor, std::int32_t policy) {
  if (!cursor.all_saved) journal_.save_all();
  cursor.all_saved = true;
  cursor.checkpoint_moved = true;
  cursor.repair_at = 0;
  guard_->repair(sets_[cursor.set], cursor.position, policy);
  session_->metrics().repairs.add();
}

void Stream::roll_back(const Violation& violation, FeedCursor& cursor, std::uint64_t tokens) {
  const std::int32_t policy = guard_->limits().policy;
  const std::uint64_t end = cursor.position + tokens;
  bool drop = false;
  if (policy != TITANS_GUARD_RAISE && guard_->can_look_closer(cursor.position, tokens)) {
    guard_->look_closer(end);
  } else {
    const bool frozen = cursor.position < cursor.frozen_until;
    drop = frozen && guard_->can_drop_open_chunk();
    if (!frozen) {
      guard_->count(violation, end);
      session_->metrics().rollbacks.add();
    }
    if (policy == TITANS_GUARD_RAISE || (frozen && !drop)) {
      throw Error(
          TITANS_FAILED, "E0510", "guard",
          text(guard_->describe(violation), frozen ? ", also with the memory frozen" : "", ", up to position ", end),
          frozen ? "reset the stream, or rewind it to an earlier mark"
                 : "check the input, or set the policy to skip or freeze");
    }
    if (!frozen && log_wanted(TITANS_LOG_WARNING)) {
      log(TITANS_LOG_WARNING, "guard",
          text(guard_->describe(violation), ", up to position ", end, "; the memory stays as at position ",
               guard_->position(), guard_->describe_repair()));
    }
    if (!frozen && guard_->repairs()) cursor.repair_at = end;
    cursor.frozen_until = policy == TITANS_GUARD_FREEZE ? kAlways : std::max(cursor.frozen_until, end);
  }
  if (guard_->position() < position_ && !cursor.all_saved) {
    // Replaying from the checkpoint also overwrites state from before this feed.
    journal_.restore();
    journal_.save_all();
    cursor.all_saved = true;
  }
  guard_->restore();
  cursor.position = guard_->position();
  cursor.set = guard_->set();
  if (!drop) return;
  const std::size_t set = free_set(current_, cursor.set);
  for (std::size_t state = 0; state < sets_[set].size(); ++state) {
    if (guard_backups_[state] == nullptr) sets_[set][state]->copy_from(*sets_[cursor.set][state]);
  }
  guard_->drop_open_chunk(sets_[set], set);
  cursor.set = set;
  cursor.checkpoint_moved = true;
}

template <typename Sink>
void Stream::advance(const Sequence& sequence, Sink&& sink) {
  const std::size_t count = sequence.count;
  if (count == 0) return;
  // Graphs take the position as an int64, and a state file may hold any value.
  constexpr auto kLast = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  if (count > kLast - position_) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0504", "stream",
                text("expected at most ", kLast - position_, " more tokens, got ", count),
                "continue with a new stream");
  }
  const std::vector<Graph>& graphs = session_->manifest().graphs;
  const std::uint64_t end = position_ + count;
  const bool guarded = guard_ && guard_->on();
  FeedCursor cursor{position_, current_};
  MeasuredCall measured(session_->metrics());
  cancelled_.store(false, std::memory_order_relaxed);
  health_.begin();
  try {
    transact([&] {
      const Session::WorkspaceLease lease(*session_);
      Workspace& workspace = lease.get();
      std::size_t rows = 0;
      while (cursor.position < end) {
        const bool again = cursor.position < position_;
        const std::size_t done = again ? 0 : static_cast<std::size_t>(cursor.position - position_);
        if (cancelled_.load(std::memory_order_relaxed)) {
          throw Error(TITANS_CANCELLED, "E0509", "stream", text("cancelled after ", done, " of ", count, " tokens"),
                      "feed them again");
        }
        Call call = next_call(sequence, cursor, end);
        const std::size_t next = free_set(current_, cursor.set);
        call.next_state = sets_[next].data();
        rows = static_cast<std::size_t>(graphs[call.graph].tokens);
        if (!cursor.all_saved) journal_.save_for(cursor.position, rows);
        if (guarded) guard_->save_for(cursor.position, rows);
        bool checkpoint = false;
        if (!guarded) {
          session_->executor().run(call, workspace);
          if (health_.due(cursor.position, rows)) health_.check(sets_[next], cursor.position + rows);
        } else {
          const Violation violation = run_guarded(call, rows, workspace);
          if (violation.reason != TITANS_GUARD_GOOD) {
            roll_back(violation, cursor, rows);
            continue;
          }
          checkpoint = guard_->moves_on(violation, cursor.position, rows);
          const std::vector<Norm>* norms = guard_->measured_norms();
          if (norms != nullptr) health_.observe(*norms, cursor.position + rows);
        }
        if (!again) sink(done, rows, workspace);
        cursor.position += rows;
        cursor.set = next;
        const bool restarts =
            guarded && learning_ && cursor.frozen_until != kAlways && guard_->restart_due(cursor.position);
        if (restarts || (cursor.repair_at > 0 && cursor.position >= cursor.repair_at)) {
          repair(cursor, restarts ? TITANS_GUARD_RESTART : guard_->limits().policy);
          checkpoint = true;
        } else if (checkpoint) {
          guard_->mark_if_healthy(sets_[cursor.set], cursor.position);
        }
        if (checkpoint) {
          guard_->set_checkpoint(cursor.position, cursor.set);
          cursor.checkpoint_moved = true;
        }
        if (!again) report_progress(done + rows, count);
      }
      const float* last = workspace.output(rows - 1, 1);
      if (guarded) guard_->remember(position_, sequence.tokens, sequence.vectors, count);
      std::copy_n(last, last_output_.size(), last_output_.begin());
    });
  } catch (const Error& error) {
    health_.undo();
    if (cursor.checkpoint_moved) rebase_guard();
    if (error.status() == TITANS_CANCELLED) {
      measured.cancelled();
      log(TITANS_LOG_DEBUG, "stream", error.what());
    } else {
      log(TITANS_LOG_ERROR, "stream", error.what());
    }
    throw;
  } catch (...) {
    health_.undo();
    if (cursor.checkpoint_moved) rebase_guard();
    throw;
  }
  if (guarded) guard_->keep_marks();
  if (cursor.frozen_until == kAlways) learning_ = false;
  current_ = cursor.set;
  measured.succeeded(count, session_->chunk_updates(position_, count));
  position_ = end;
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

void Stream::feed(const Sequence& sequence, titans_output which, float* output) {
  const std::size_t size = session_->output_size();
  advance(sequence, [&](std::size_t first, std::size_t rows, Workspace& workspace) {
    if (which != TITANS_OUTPUT_ALL) return;
    std::copy_n(workspace.output(0, rows), rows * size, output + first * size);
  });
  if (which == TITANS_OUTPUT_LAST) std::copy(last_output_.begin(), last_output_.end(), output);
}

void Stream::feed(const std::int32_t* tokens, std::size_t count, titans_output which, float* logits,
                  std::size_t capacity) {
  require_input(session_->manifest(), InputKind::kTokens);
  check_room(count, which, logits, capacity);
  check_tokens(tokens, count);
  feed({tokens, nullptr, count}, which, logits);
}

void Stream::feed_vectors(const float* vectors, std::size_t count, titans_output which, float* outputs,
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
    const std::size_t scored = std::min(rows, count - first - 1);  // the last token's row scores none of these tokens
    const float* logits = workspace.output(0, scored);
    for (std::size_t row = 0; row < scored; ++row) {
      const std::size_t next = first + row + 1;
      logprobs[next] = log_probability(logits + row * vocab, vocab, tokens[next]);
    }
  });
  logprobs[0] = first_logprob;
}
}  // namespace titans::core
