#include "stream/feed.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/forks.h"
#include "base/log.h"
#include "stream/stream.h"

namespace titans::core {
namespace {

constexpr std::uint64_t kAlways = std::numeric_limits<std::uint64_t>::max();

std::uint64_t end_of(std::uint64_t position, std::size_t count) {
  // Graphs take the position as an int64, and a state file may hold any value.
  constexpr auto kLast = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  if (count > kLast - position) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0504", "stream",
                text("expected at most ", kLast - position, " more tokens, got ", count), "continue with a new stream");
  }
  return position + count;
}

}  // namespace

Feed::Feed(Stream& stream, const Sequence& sequence, Sink sink)
    : stream_(stream),
      sequence_(sequence),
      sink_(std::move(sink)),
      end_(end_of(stream.position_, sequence.count)),
      guarded_(stream.guard_ && stream.guard_->on()),
      measured_(stream.session_->metrics()),
      position_(stream.position_),
      set_(stream.current_) {
  stream.cancelled_.store(false, std::memory_order_relaxed);
  stream.health_.begin();
  stream.journal_.begin();
}

Feed::~Feed() {
  if (over_) return;
  try {
    stream_.journal_.restore();
  } catch (...) {  // the device failed; its error was reported when it first did
  }
  undo(nullptr);
}

template <typename Step>
void Feed::attempt(Step&& step) {
  try {
    try {
      step();
    } catch (...) {
      over_ = true;
      stream_.journal_.restore();
      throw;
    }
  } catch (const Error& error) {
    undo(&error);
    throw;
  } catch (...) {
    undo(nullptr);
    throw;
  }
}

void Feed::undo(const Error* error) {
  over_ = true;
  stream_.health_.undo();
  if (checkpoint_moved_) stream_.rebase_guard();
  stream_.clear_unused_sets();
  if (error == nullptr) return;
  const bool cancelled = error->status() == TITANS_CANCELLED;
  if (cancelled) measured_.cancelled();
  log(cancelled ? TITANS_LOG_DEBUG : TITANS_LOG_ERROR, "stream", error->what());
}

bool Feed::again() const { return position_ < stream_.position_; }

bool Feed::next(Call& call) {
  if (over_) return false;
  attempt([&] { prepare(call); });
  return true;
}

void Feed::save() {
  attempt([&] {
    if (!all_saved_) stream_.journal_.save_for(position_, rows_);
    if (guarded_) stream_.guard_->save_for(position_, rows_);
  });
}

void Feed::withdraw() {
  over_ = true;
  measured_.withdrawn();
  stream_.journal_.restore();
  undo(nullptr);
}

void Feed::finish(const OutputRows& outputs) {
  attempt([&] { take(outputs); });
}

void Feed::fail(const std::exception_ptr& failure) {
  attempt([&] {
    try {
      std::rethrow_exception(failure);
    } catch (const Error& error) {
      if (!guarded_ || !learn_ || error.status() != TITANS_FAILED) throw;
      if (stream_.guard_->limits().policy == TITANS_GUARD_RAISE) throw;
      // An overflowing memory gives the next layer gates that are not finite, and kernels reject those.
      Violation violation;
      violation.reason = TITANS_GUARD_CALL;
      violation.failure = error.what();
      roll_back(violation);
    }
  });
}

void Feed::prepare(Call& call) {
  const bool replay = again();
  const std::size_t done = replay ? 0 : static_cast<std::size_t>(position_ - stream_.position_);
  if (stream_.cancelled_.load(std::memory_order_relaxed)) {
    throw Error(TITANS_CANCELLED, "E0509", "stream", text("cancelled after ", done, " of ", sequence_.count, " tokens"),
                "feed them again");
  }
  Session& session = *stream_.session_;
  Guard* guard = stream_.guard_.get();
  auto remaining = static_cast<std::size_t>((replay ? stream_.position_ : end_) - position_);
  if (guarded_) remaining = guard->reach(position_, remaining);
  call.graph = session.next_graph(position_, remaining);
  call.tokens = nullptr;
  call.vectors = nullptr;
  if (sequence_.tokens != nullptr) call.tokens = replay ? guard->tokens_at(position_) : sequence_.tokens + done;
  if (sequence_.vectors != nullptr) {
    call.vectors = replay ? guard->vectors_at(position_) : sequence_.vectors + done * session.input_size();
  }
  learn_ = stream_.learning_ && position_ >= frozen_until_;
  next_set_ = stream_.free_set(stream_.current_, set_);
  call.position = static_cast<std::int64_t>(position_);
  call.learn = learn_;
  call.state = stream_.sets_[set_].data();
  call.next_state = stream_.sets_[next_set_].data();
  rows_ = static_cast<std::size_t>(session.manifest().graphs[call.graph].tokens);
}

void Feed::take(const OutputRows& outputs) {
  const Stream::BufferSet& after = stream_.sets_[next_set_];
  Guard* guard = stream_.guard_.get();
  bool checkpoint = false;
  if (!guarded_) {
    if (stream_.health_.due(position_, rows_)) stream_.health_.check(after, position_ + rows_);
  } else {
    const Violation violation =
        guard->look(stream_.sets_[guard->set()], after, position_, rows_, outputs.get(rows_ - 1, 1));
    if (violation.reason != TITANS_GUARD_GOOD) return roll_back(violation);
    checkpoint = guard->moves_on(violation, position_, rows_);
    const std::vector<Norm>* norms = guard->measured_norms();
    if (norms != nullptr) stream_.health_.observe(*norms, position_ + rows_);
  }
  const bool replay = again();
  const std::size_t first = replay ? 0 : static_cast<std::size_t>(position_ - stream_.position_);
  if (!replay) sink_(first, rows_, outputs);
  position_ += rows_;
  set_ = next_set_;
  const bool restarts = guarded_ && stream_.learning_ && frozen_until_ != kAlways && guard->restart_due(position_);
  if (restarts || (repair_at_ > 0 && position_ >= repair_at_)) {
    repair(restarts ? TITANS_GUARD_RESTART : guard->limits().policy);
    checkpoint = true;
  } else if (checkpoint) {
    guard->mark_if_healthy(stream_.sets_[set_], position_);
  }
  if (checkpoint) {
    guard->set_checkpoint(position_, set_);
    checkpoint_moved_ = true;
  }
  if (!replay) report_progress(first + rows_);
  if (position_ == end_) commit(outputs);
}

void Feed::report_progress(std::uint64_t done) const {
  const Stream::Progress& progress = stream_.progress_;
  if (progress.function == nullptr) return;
  const std::uint32_t process = fork_count();
  const bool cancelled = progress.function(progress.user, done, sequence_.count) != 0;
  require_own_process(process, "stream");  // the function may have forked, and returned in the child
  if (!cancelled) return;
  throw Error(TITANS_CANCELLED, "E0509", "stream",
              text("cancelled by the progress function after ", done, " of ", sequence_.count, " tokens"),
              "feed them again");
}

void Feed::repair(std::int32_t policy) {
  if (!all_saved_) stream_.journal_.save_all();
  all_saved_ = true;
  checkpoint_moved_ = true;
  repair_at_ = 0;
  stream_.guard_->repair(stream_.sets_[set_], position_, policy);
  stream_.session_->metrics().repairs.add();
}

void Feed::roll_back(const Violation& violation) {
  Guard& guard = *stream_.guard_;
  const std::int32_t policy = guard.limits().policy;
  const std::uint64_t end = position_ + rows_;
  bool drop = false;
  if (policy != TITANS_GUARD_RAISE && guard.can_look_closer(position_, rows_)) {
    guard.look_closer(end);
  } else {
    const bool frozen = position_ < frozen_until_;
    drop = frozen && guard.can_drop_open_chunk();
    if (!frozen) {
      guard.count(violation, end);
      stream_.session_->metrics().rollbacks.add();
    }
    if (policy == TITANS_GUARD_RAISE || (frozen && !drop)) {
      throw Error(
          TITANS_FAILED, "E0510", "guard",
          text(guard.describe(violation), frozen ? ", also with the memory frozen" : "", ", up to position ", end),
          frozen ? "reset the stream, or rewind it to an earlier mark"
                 : "check the input, or set the policy to skip or freeze");
    }
    if (!frozen && log_wanted(TITANS_LOG_WARNING)) {
      log(TITANS_LOG_WARNING, "guard",
          text(guard.describe(violation), ", up to position ", end, "; the memory stays as at position ",
               guard.position(), guard.describe_repair()));
    }
    if (!frozen && guard.repairs()) repair_at_ = end;
    frozen_until_ = policy == TITANS_GUARD_FREEZE ? kAlways : std::max(frozen_until_, end);
  }
  if (guard.position() < stream_.position_ && !all_saved_) {
    // Replaying from the checkpoint also overwrites state from before this feed.
    stream_.journal_.restore();
    stream_.journal_.save_all();
    all_saved_ = true;
  }
  guard.restore();
  position_ = guard.position();
  set_ = guard.set();
  if (!drop) return;
  const std::size_t set = stream_.free_set(stream_.current_, set_);
  for (std::size_t state = 0; state < stream_.sets_[set].size(); ++state) {
    if (stream_.guard_backups_[state] == nullptr) {
      stream_.sets_[set][state]->copy_from(*stream_.sets_[set_][state]);
    }
  }
  guard.drop_open_chunk(stream_.sets_[set], set);
  set_ = set;
  checkpoint_moved_ = true;
}

// Advances the stream. Nothing fails after the copy of the last output.
void Feed::commit(const OutputRows& outputs) {
  const float* last = outputs.get(rows_ - 1, 1);
  if (guarded_) stream_.guard_->remember(stream_.position_, sequence_.tokens, sequence_.vectors, sequence_.count);
  std::copy_n(last, stream_.last_output_.size(), stream_.last_output_.begin());
  if (guarded_) stream_.guard_->keep_marks();
  if (frozen_until_ == kAlways) stream_.learning_ = false;
  stream_.current_ = set_;
  measured_.succeeded(sequence_.count, stream_.session_->chunk_updates(stream_.position_, sequence_.count));
  stream_.position_ = end_;
  over_ = true;
}

}  // namespace titans::core
