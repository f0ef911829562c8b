// One feed of a stream, graph call by graph call. The caller runs the calls, so it chooses when each one runs and which
// other streams share it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>

#include "backends/backend.h"
#include "base/error.h"
#include "session/metrics.h"
#include "stream/guard.h"

namespace titans::core {

class Stream;

// The checked input of a feed: tokens or vectors; the other is NULL.
struct Sequence {
  const std::int32_t* tokens;
  const float* vectors;
  std::size_t count;
};

// One stream's rows of the last call in a workspace, valid until the next call.
class OutputRows {
 public:
  OutputRows(Workspace& workspace, std::size_t first_row) : workspace_(workspace), first_row_(first_row) {}
  // Row t belongs to token t of the stream's part of the call.
  const float* get(std::size_t first, std::size_t rows) const { return workspace_.output(first_row_ + first, rows); }

 private:
  Workspace& workspace_;
  std::size_t first_row_;
};

// If a function throws, the stream is as before the feed and the feed is over. The same holds for a feed that is
// destroyed before its last call.
class Feed {
 public:
  // Receives the outputs of the sequence's tokens [first, first + rows). Some tokens may be reported twice; the last
  // report counts.
  using Sink = std::function<void(std::size_t first, std::size_t rows, const OutputRows& outputs)>;

  // Throws an Error if the stream would exceed the largest position. The stream must not be used otherwise before the
  // feed is over. `sequence` has at least one token; its arrays must outlive the feed.
  Feed(Stream& stream, const Sequence& sequence, Sink sink);
  ~Feed();
  Feed(const Feed&) = delete;
  Feed& operator=(const Feed&) = delete;

  // Prepares the next call. False once the sequence is consumed and the stream has advanced. Throws an Error with
  // TITANS_CANCELLED if the stream was cancelled.
  bool next(Call& call);
  // Saves what the prepared call may overwrite. Call it before the call runs.
  void save();
  // Takes the results of the prepared call. A guard may reject them; the next call then starts at its checkpoint.
  void finish(const OutputRows& outputs);
  // The prepared call failed. Returns if the guard consumes the tokens again with the memory frozen; otherwise throws
  // `failure`.
  void fail(const std::exception_ptr& failure);
  // Undoes the feed, to begin it again. It counts as no call.
  void withdraw();

 private:
  // Runs `step`. Undoes the feed if it throws.
  template <typename Step>
  void attempt(Step&& step);
  void undo(const Error* error);
  void prepare(Call& call);
  void take(const OutputRows& outputs);
  // True for tokens before the feed's start, which a guard has the stream consume again.
  bool again() const;
  // Handles a violation: restores the checkpoint so that the tokens are consumed again with the memory frozen. Throws
  // if the policy requires it or if freezing has not helped.
  void roll_back(const Violation& violation);
  // Repairs the memory, after a violation or for a restart.
  void repair(std::int32_t policy);
  void report_progress(std::uint64_t done) const;
  void commit(const OutputRows& outputs);

  Stream& stream_;
  const Sequence sequence_;
  const Sink sink_;
  const std::uint64_t end_;
  const bool guarded_;
  MeasuredCall measured_;
  bool over_ = false;
  // Position and set of the next call. The position precedes the feed's start after a guard has restored an earlier
  // checkpoint.
  std::uint64_t position_;
  std::size_t set_;
  std::uint64_t frozen_until_ = 0;
  bool all_saved_ = false;  // in the journal
  bool checkpoint_moved_ = false;
  std::uint64_t repair_at_ = 0;  // where the guard repairs the memory; 0: nowhere
  // Of the prepared call.
  std::size_t rows_ = 0;
  std::size_t next_set_ = 0;
  bool learn_ = true;
};

}  // namespace titans::core
