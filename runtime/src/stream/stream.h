// One sequence: its state, its position, and the logits after its last token.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "session/session.h"
#include "session/state_cache.h"
#include "state/journal.h"
#include "state/stream_state.h"
#include "stream/guard.h"
#include "titans/titans.h"

namespace titans::core {

// An Error where the bundle's input is of another kind: what is asked for is meant for `kind` alone.
void require_input(const Manifest& manifest, InputKind kind);

// Whoever calls functions of a stream that many threads may know holds it meanwhile, with a Stream::Use, or with a
// Stream::ExclusiveUse where the state is not touched.
class Stream : private Spillable {
 public:
  // No other call is in the stream for the life of the object.
  class ExclusiveUse {
   public:
    // TITANS_INVALID_ARGUMENT where another call is in it: of another thread, or the one that this is made within.
    explicit ExclusiveUse(const Stream& stream);
    ~ExclusiveUse();
    ExclusiveUse(const ExclusiveUse&) = delete;
    ExclusiveUse& operator=(const ExclusiveUse&) = delete;

   private:
    const Stream& stream_;
  };
  // The same, and the state is in memory.
  class Use {
   public:
    explicit Use(const Stream& stream);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    const ExclusiveUse exclusive_;
    const Stream& stream_;
  };

  explicit Stream(std::shared_ptr<Session> session);
  Stream(std::shared_ptr<Session> session, const StreamState& state);
  ~Stream() override;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  std::unique_ptr<Stream> fork() const;
  void reset();

  // All of the stream, for a file or a mark.
  StreamState state() const;
  // The same, for as long as nothing changes it. What does not lie in host memory is copied to `copies`.
  StateView view(std::vector<Bytes>& copies) const;
  // Puts the stream where `state`, one of this model's, says; where that fails it is as it was.
  void set_state(const StreamState& state);

  // See titans_stream_mark and its neighbours.
  std::uint64_t mark();
  void rewind(std::uint64_t position);
  void unmark(std::uint64_t position);
  std::vector<std::uint64_t> marks() const;

  // See titans_stream_feed, titans_stream_feed_vectors and titans_stream_score. Any failure leaves the stream as it
  // was.
  void feed(const std::int32_t* tokens, std::size_t count, titans_output which, float* logits, std::size_t capacity);
  void feed_vectors(const float* vectors, std::size_t count, titans_output which, float* outputs, std::size_t capacity);
  void score(const std::int32_t* tokens, std::size_t count, float* logprobs);

  bool learning() const { return learning_; }
  void set_learning(bool learning) { learning_ = learning; }
  std::uint64_t position() const { return position_; }

  // See titans_stream_set_guard and its neighbours.
  void set_guard(const titans_guard& limits);
  titans_guard_report guard_report() const;
  void set_progress(titans_progress_function progress, void* user) { progress_ = {progress, user}; }
  // From any thread.
  void cancel() noexcept { cancelled_.store(true, std::memory_order_relaxed); }

  std::uint64_t state_bytes() const;
  // Logits, or the vector, after the last token. Meaningless before the first.
  const std::vector<float>& last_output() const { return last_output_; }

  void read_memory(std::size_t index, float* values, std::size_t capacity) const;
  const Session& session() const { return *session_; }

 private:
  // A state tensor that swaps has one buffer in each of three sets: where the running feed began, where it stands, and
  // where the next call writes. Begin stays untouched until the feed has succeeded, so a failure costs no copy. One
  // that the engine updates in place has one buffer, in every set, and the journal another. A guard needs one set more,
  // for its checkpoint.
  static constexpr std::size_t kSets = 3;
  using BufferSet = std::vector<Buffer*>;

  struct Allocate {};  // memory only: reset or fork fills it
  Stream(std::shared_ptr<Session> session, Allocate);

  std::vector<StreamState> copy_out() const override;
  void give_up() noexcept override;
  void take_back(std::vector<StreamState> parts) override;
  StreamState copy_of(const BufferSet& buffers) const;
  void drop_last_output() noexcept;
  BufferSet checkpoint_buffers() const;

  Buffer* add_buffer(std::size_t state);
  void drop_buffers(std::size_t kept) noexcept;
  using Mark = std::map<std::uint64_t, StreamState>::iterator;
  Mark find_mark(std::uint64_t position);
  void drop_marks(Mark first, Mark end);
  // One that is neither of these nor the guard's.
  std::size_t free_set(std::size_t a, std::size_t b) const;
  void add_guard_buffers();
  // The stream has been put elsewhere: the guard's checkpoint is where it stands.
  void rebase_guard();
  void check_tokens(const std::int32_t* tokens, std::size_t count) const;
  void check_vectors(const float* vectors, std::size_t count) const;

  // Runs `change`, which saves in the journal what it overwrites in place; where it throws, that is put back.
  template <typename Change>
  void transact(Change&& change);
  // What a feed consumes, checked: tokens or vectors, the other NULL.
  struct Sequence {
    const std::int32_t* tokens;
    const float* vectors;
    std::size_t count;
  };
  // How far a feed has come: the position and the set of the next call of a graph. It may be before the feed's
  // beginning, where a guard has gone back to its checkpoint.
  struct FeedCursor {
    std::uint64_t position;
    std::size_t set;
    std::uint64_t frozen_until = 0;
    bool all_saved = false;  // in the journal
    bool checkpoint_moved = false;
  };
  // What a call at `position` consumes: of the feed's sequence, or before it what the guard remembers.
  Call next_call(const Sequence& sequence, const FeedCursor& cursor, std::uint64_t end) const;
  // Runs the call, of `tokens` tokens, and looks at what it made. That it fails is a violation, too, where consuming
  // the tokens with the memory frozen may help.
  Violation run_guarded(const Call& call, std::size_t tokens, Workspace& workspace);
  // After a call of `tokens` tokens, in which the guard has found something wrong: back to the checkpoint, from where
  // they are consumed with the memory frozen. Throws where the policy says so, or where that has not helped.
  void roll_back(const Violation& violation, FeedCursor& cursor, std::uint64_t tokens);
  void report_progress(std::uint64_t done, std::uint64_t total) const;
  // Consumes the sequence; after each call of a graph sink(first token, how many, workspace), for some tokens perhaps
  // a second time, the last of which counts.
  template <typename Sink>
  void advance(const Sequence& sequence, Sink&& sink);
  // That `capacity` floats at `output` have room for what `which` asks for.
  void check_room(std::size_t count, titans_output which, const float* output, std::size_t capacity) const;
  void feed(const Sequence& sequence, titans_output which, float* output);

  struct OwnBuffer {
    std::size_t state;
    std::unique_ptr<Buffer> buffer;  // NULL while the state is not in memory
    Buffer* known_as;                // what everything else here has of it
  };

  std::shared_ptr<Session> session_;
  mutable std::atomic<bool> used_{false};
  mutable StateCache::Handle handle_;
  std::vector<OwnBuffer> buffers_;
  std::array<BufferSet, kSets + 1> sets_;
  Journal journal_;
  std::uint64_t state_bytes_ = 0;
  std::size_t current_ = 0;  // the set that holds the state
  std::uint64_t position_ = 0;
  bool learning_ = true;
  std::vector<float> last_output_;
  std::map<std::uint64_t, StreamState> marks_;  // by their positions
  std::vector<Buffer*> guard_backups_;          // for each state in place; NULL for one that swaps
  std::unique_ptr<Guard> guard_;                // also where it is off, once one was set
  struct Progress {
    titans_progress_function function = nullptr;
    void* user = nullptr;
  };
  Progress progress_;
  std::atomic<bool> cancelled_{false};
};

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

}  // namespace titans::core
