// What keeps a stream's memory from being destroyed by what the stream is fed (docs/guard.md).
//
// W and S change when a chunk is complete, so that is when a guard looks at them. It keeps a checkpoint, which is the
// state after the last good chunk, and what the stream has consumed since: a chunk that breaks a limit is taken back to
// there and consumed again with the memory frozen. Within a chunk that costs nothing but a look at the output; at its
// end the checkpoint's copy of what the chunk overwrites in place, and one reading of W and S.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "session/session.h"
#include "state/journal.h"
#include "state/stream_state.h"
#include "titans/titans.h"

namespace titans::core {

// An Error where these are no limits.
void check_guard(const titans_guard& guard);

// What broke a limit, or would not.
struct Violation {
  std::int32_t reason = TITANS_GUARD_GOOD;
  std::int32_t layer = -1;  // among the memories; -1: the output
  std::int32_t head = -1;
  const std::string* name = nullptr;  // of that memory
  float update_norm = 0;              // the largest of all layers and heads
  float surprise = 0;
  bool changed = false;  // some memory is not as it was at the checkpoint
  std::string failure;   // of the backend
};

class Guard {
 public:
  using BufferSet = std::vector<Buffer*>;

  Guard(const Session& session, const titans_guard& limits);

  // Gives the guard a buffer for a state tensor in place, to keep of it what changes after the checkpoint.
  void watch(std::size_t state, Buffer& live, Buffer& backup);
  // Goes on with other buffers, which hold the same.
  void move_to(const BufferMap& moved) {
    journal_.move_to(moved);
    core::move_to(moved, backups_);
  }

  const titans_guard& limits() const { return limits_; }
  bool on() const { return limits_.policy != TITANS_GUARD_OFF; }
  const titans_guard_report& report() const { return report_; }

  // The checkpoint is the state at `position`, which `set` holds; nothing has been consumed since.
  void set_checkpoint(std::uint64_t position, std::size_t set);
  std::uint64_t position() const { return position_; }
  std::size_t set() const { return set_; }

  // How many of `remaining` tokens the next call may consume. Where a limit is on what one chunk changes, or a chunk
  // that broke one is being looked for, none goes beyond the end of a chunk.
  std::size_t reach(std::uint64_t position, std::size_t remaining) const;
  // Until that position every chunk is looked at by itself.
  void look_closer(std::uint64_t until) { closely_until_ = until; }
  // Whether the call was of several chunks and they can be looked at one by one.
  bool can_look_closer(std::uint64_t position, std::uint64_t tokens) const {
    return !looks_closely(position) && saw_several(position, tokens);
  }

  // Before and after a call of `tokens` tokens: saves for the checkpoint what it overwrites; looks at what it made,
  // where `before` is the checkpoint's set and `output` the last row.
  void save_for(std::uint64_t position, std::uint64_t tokens) { journal_.save_for(position, tokens); }
  Violation look(const BufferSet& before, const BufferSet& after, std::uint64_t position, std::uint64_t tokens,
                 const float* output);
  // Whether the checkpoint goes to the end of that call, in which nothing was wrong.
  bool moves_on(const Violation& violation, std::uint64_t position, std::uint64_t tokens) const;
  void count(const Violation& violation, std::uint64_t position);
  // "expected an update norm of at most 0.5, got 0.7 in layers.0.memory, head 1"
  std::string describe(const Violation& violation) const;

  // Puts back what is in place; what swaps is in the checkpoint's set.
  void restore() { journal_.restore(); }
  // Whether some memory had learned of an open chunk when the checkpoint was made, in a form that can be dropped.
  bool can_drop_open_chunk() const { return droppable_; }
  // Drops it from those buffers, and makes them the checkpoint.
  void drop_open_chunk(const BufferSet& state, std::size_t set);

  // What was consumed since the checkpoint, before the feed that runs.
  const std::int32_t* tokens_at(std::uint64_t position) const { return tokens_.data() + (position - position_); }
  const float* vectors_at(std::uint64_t position) const {
    return vectors_.data() + (position - position_) * session_.input_size();
  }
  // A feed that began at `position` and consumed this has succeeded.
  void remember(std::uint64_t position, const std::int32_t* tokens, const float* vectors, std::size_t count);

 private:
  struct Field {
    std::size_t offset, extent, columns;
    FieldDtype dtype;
    bool surprise;  // of S; else of W
  };
  // Words of a row and their value at a chunk's start.
  struct Reset {
    std::size_t offset, extent;
    float value;
  };
  static std::vector<Reset> resets_of(const StateTensor& state);
  struct Memory {
    std::size_t state;
    const std::string* name;
    std::uint64_t chunk;
    bool known;  // says after how many rows it changes
    StreamRows rows;
    std::vector<Reset> resets;  // make the open chunk empty; none where that cannot be done
    std::size_t row, heads;
    std::vector<Field> fields;
  };
  // A chunk's worth of tokens where nothing says where chunks end.
  static constexpr std::uint64_t kMostRemembered = 4096;

  bool looks_closely(std::uint64_t position) const;
  bool saw_several(std::uint64_t position, std::uint64_t tokens) const;
  std::uint64_t completed(const Memory& memory, std::uint64_t position, std::uint64_t tokens) const;
  // The packed rows in host memory: the buffer's own, or a copy in `copy`.
  static const float* rows_of(const Buffer& buffer, const Memory& memory, Floats& copy);
  const float* values_of(const Field& field, const float* row, Floats& values) const;
  void look_at_head(const Memory& memory, std::size_t head, const float* before, const float* after,
                    Violation& violation);
  bool output_is_good(const float* output) const;

  const Session& session_;
  titans_guard limits_;
  titans_guard_report report_{};
  std::vector<Memory> memories_;
  std::vector<Buffer*> backups_;  // for each state; NULL where it swaps
  Journal journal_;
  std::uint64_t position_ = 0;
  std::size_t set_ = 0;
  bool droppable_ = false;
  std::uint64_t closely_until_ = 0;
  std::vector<std::int32_t, WipingAllocator<std::int32_t>> tokens_;
  Floats vectors_;
  Floats before_copy_, after_copy_, before_values_, after_values_;
};

}  // namespace titans::core
