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
#include "stream/feed.h"
#include "stream/guard.h"
#include "stream/health.h"
#include "titans/titans.h"

namespace titans::core {

// Throws an Error unless the bundle's input is of `kind`.
void require_input(const Manifest& manifest, InputKind kind);

// Threads that share a stream hold a Use during each call, or an ExclusiveUse if the call does not touch the state.
class Stream : private Spillable {
 public:
  // Excludes other calls for the life of the object.
  class ExclusiveUse {
   public:
    // Throws TITANS_INVALID_ARGUMENT if another call is active, from another thread or from a callback of this one.
    explicit ExclusiveUse(const Stream& stream);
    ~ExclusiveUse();
    ExclusiveUse(const ExclusiveUse&) = delete;
    ExclusiveUse& operator=(const ExclusiveUse&) = delete;

   private:
    const Stream& stream_;
  };
  // Excludes other calls and keeps the state in memory.
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

  // The complete stream, for a file or a mark.
  StreamState state() const;
  // The complete stream, valid until it changes. State outside host memory is copied to `copies`.
  StateView view(std::vector<Bytes>& copies) const;
  // Sets the stream to `state`, which must be of the same model. After an exception the stream is unchanged.
  void set_state(const StreamState& state);

  // See titans_stream_mark and related functions.
  std::uint64_t mark();
  void rewind(std::uint64_t position);
  void unmark(std::uint64_t position);
  std::vector<std::uint64_t> marks() const;

  // See titans_stream_feed, titans_stream_feed_vectors and titans_stream_score. After a failure the stream is
  // unchanged.
  void feed(const std::int32_t* tokens, std::size_t count, titans_output which, float* logits, std::size_t capacity);
  void feed_vectors(const float* vectors, std::size_t count, titans_output which, float* outputs, std::size_t capacity);
  void score(const std::int32_t* tokens, std::size_t count, float* logprobs);
  // Begins feed() or feed_vectors() for a caller that runs the calls itself. The outputs are complete when the feed is
  // over. NULL if the sequence is empty; its outputs are then complete.
  std::unique_ptr<Feed> begin(InputKind kind, const Sequence& sequence, titans_output which, float* output,
                              std::size_t capacity);
  // True if the stream's calls may include other streams. Only while a Use is held.
  bool shares_calls() const { return !sets_[0].empty() && sets_[0][0]->in_pool(); }

  bool learning() const { return learning_; }
  void set_learning(bool learning) { learning_ = learning; }
  std::uint64_t position() const { return position_; }

  // See titans_stream_set_guard and related functions.
  void set_guard(const titans_guard& limits, bool measures_updates = true);
  titans_guard_report guard_report() const;
  void set_progress(titans_progress_function progress, void* user) { progress_ = {progress, user}; }
  // See titans_stream_health and titans_stream_peak_norms.
  titans_health health() const { return health_.report(); }
  void peak_norms(float* norms, std::size_t capacity) const;
  // May be called from any thread.
  void cancel() noexcept { cancelled_.store(true, std::memory_order_relaxed); }

  std::uint64_t state_bytes() const;
  // The logits or the vector after the last token. Undefined before the first token.
  const std::vector<float>& last_output() const { return last_output_; }

  void read_memory(std::size_t index, float* values, std::size_t capacity) const;
  const Session& session() const { return *session_; }

 private:
  friend class Feed;

  // A swapped state tensor has one buffer in each of three sets: the start of the running feed, the current state, and
  // the output of the next call. The start is kept until the feed succeeds, so a failure costs no copy. A tensor
  // updated in place has one buffer, which is in every set, and a backup for the journal. A guard needs a fourth set
  // for its checkpoint.
  static constexpr std::size_t kSets = 3;
  using BufferSet = std::vector<Buffer*>;

  struct Allocate {};  // allocates only; reset or fork fills the buffers
  Stream(std::shared_ptr<Session> session, Allocate);

  std::vector<StreamState> copy_out() const override;
  void give_up() noexcept override;
  void take_back(std::vector<StreamState> parts) override;
  StreamState copy_of(const BufferSet& buffers) const;
  void drop_last_output() noexcept;
  BufferSet checkpoint_buffers() const;

  BufferSet add_current_buffers();
  Buffer* add_buffer(std::size_t state);
  void drop_buffers(std::size_t kept) noexcept;
  using Mark = std::map<std::uint64_t, StreamState>::iterator;
  Mark find_mark(std::uint64_t position);
  void drop_marks(Mark first, Mark end);
  // A set that is neither `a`, `b` nor the guard's.
  std::size_t free_set(std::size_t a, std::size_t b) const;
  // Overwrites what a failed feed has left in buffers that hold no state.
  void clear_unused_sets() noexcept;
  void add_guard_buffers();
  // Makes the current state the guard's checkpoint, after the stream was set to another state.
  void rebase_guard();
  void check_tokens(const std::int32_t* tokens, std::size_t count) const;
  void check_vectors(const float* vectors, std::size_t count) const;

  // Runs `change`, which saves in the journal what it overwrites in place. Restores that if it throws.
  template <typename Change>
  void transact(Change&& change);
  // Runs the feed's calls, one after the other.
  void run(Feed& feed);
  // Throws an Error unless `output` has room for `which`.
  void check_room(std::size_t count, titans_output which, const float* output, std::size_t capacity) const;

  struct OwnBuffer {
    std::size_t state;
    std::unique_ptr<Buffer> buffer;  // NULL while the state is not in memory
    Buffer* known_as;                // the address used by the sets, the journal and the guard
    bool current;                    // one of those that Executor::allocate_current returned
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
  std::map<std::uint64_t, StreamState> marks_;  // by position
  std::vector<Buffer*> guard_backups_;          // one per state tensor; NULL if it is swapped
  std::unique_ptr<Guard> guard_;                // stays after it is turned off
  Health health_;
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
