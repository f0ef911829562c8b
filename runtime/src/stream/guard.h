// Protects a stream's memory from input that would destroy it (docs/guard.md).
//
// W and S change when a chunk completes, so the guard checks them then. It keeps a checkpoint, which is the state after
// the last good chunk, and the input consumed since. If a chunk violates a limit, the checkpoint is restored and the
// input is consumed again with the memory frozen. Within a chunk only the output is checked. At its end the guard
// copies the parts that the chunk overwrites in place and reads W and S once.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "session/session.h"
#include "state/journal.h"
#include "state/stream_state.h"
#include "stream/norms.h"
#include "titans/titans.h"

namespace titans::core {

// Throws an Error if a limit or the policy is invalid.
void check_guard(const titans_guard& guard);

// The result of checking one call. It describes the first violation, if there is one.
struct Violation {
  std::int32_t reason = TITANS_GUARD_GOOD;
  std::int32_t layer = -1;  // index of the memory; -1: the output
  std::int32_t head = -1;
  const std::string* name = nullptr;  // name of that memory
  float update_norm = 0;              // maximum over layers and heads
  float surprise = 0;
  std::size_t field = 0;  // above its limit: index into Session::norm_fields
  double norm = 0;        // of that field
  bool changed = false;   // a memory differs from the checkpoint
  std::string failure;    // the backend's error text
};

class Guard {
 public:
  using BufferSet = std::vector<Buffer*>;

  // Updates are measured if `measures_updates` or if a limit needs it.
  Guard(const Session& session, const titans_guard& limits, bool measures_updates = true);

  // Registers a state tensor that is updated in place. `backup` receives the parts that change after the checkpoint.
  void watch(std::size_t state, Buffer& live, Buffer& backup);
  // Switches to other buffers with the same content.
  void move_to(const BufferMap& moved) {
    journal_.move_to(moved);
    core::move_to(moved, backups_);
  }

  const titans_guard& limits() const { return limits_; }
  bool measures_updates() const { return measures_updates_; }
  bool on() const { return limits_.policy != TITANS_GUARD_OFF; }
  const titans_guard_report& report() const { return report_; }

  // Makes the state at `position`, held by `set`, the checkpoint. The recorded input is dropped.
  void set_checkpoint(std::uint64_t position, std::size_t set);
  std::uint64_t position() const { return position_; }
  std::size_t set() const { return set_; }

  // The number of tokens, at most `remaining`, that the next call may consume. The call stops at the next chunk
  // boundary if a limit applies to a single chunk or if the guard searches for the chunk at fault.
  std::size_t reach(std::uint64_t position, std::size_t remaining) const;
  // Checks every chunk separately before that position.
  void look_closer(std::uint64_t until) { closely_until_ = until; }
  // True if the call completed several chunks that can be checked separately.
  bool can_look_closer(std::uint64_t position, std::uint64_t tokens) const {
    return !looks_closely(position) && saw_several(position, tokens);
  }

  // save_for runs before a call and saves the parts of the checkpoint that the call overwrites. look runs after it and
  // checks the result; `before` is the checkpoint's set and `output` the last row.
  void save_for(std::uint64_t position, std::uint64_t tokens) { journal_.save_for(position, tokens); }
  Violation look(const BufferSet& before, const BufferSet& after, std::uint64_t position, std::uint64_t tokens,
                 const float* output);
  // The norms after the last call that was looked at; NULL if it completed no chunk.
  const std::vector<Norm>* measured_norms() const { return measured_ ? &norms_.norms() : nullptr; }
  // True if the checkpoint advances to the end of that call, which had no violation.
  bool moves_on(const Violation& violation, std::uint64_t position, std::uint64_t tokens) const;
  void count(const Violation& violation, std::uint64_t position);
  // "expected an update norm of at most 0.5, got 0.7 in layers.0.memory, head 1"
  std::string describe(const Violation& violation) const;

  // Restores the state that is updated in place. Swapped state is intact in the checkpoint's set.
  void restore() {
    journal_.restore();
    norms_.clear();
  }
  // True if the checkpoint contains an open chunk that can be dropped.
  bool can_drop_open_chunk() const { return droppable_; }
  // Drops the open chunk from those buffers and makes them the checkpoint.
  void drop_open_chunk(const BufferSet& state, std::size_t set);

  // The input consumed between the checkpoint and the running feed.
  const std::int32_t* tokens_at(std::uint64_t position) const { return tokens_.data() + (position - position_); }
  const float* vectors_at(std::uint64_t position) const {
    return vectors_.data() + (position - position_) * session_.input_size();
  }
  // Records the input of a successful feed that began at `position`.
  void remember(std::uint64_t position, const std::int32_t* tokens, const float* vectors, std::size_t count);

  // A repair sets the memory back after a violation or at a restart: to the last healthy mark, halfway to the initial
  // memory, or to the initial memory. It changes what the memory has learned and leaves the open chunk.
  bool repairs() const;                            // the policy repairs
  bool restart_due(std::uint64_t position) const;  // restart_every
  // " and is then reset", or nothing if the policy does not repair
  std::string describe_repair() const;
  void repair(const BufferSet& state, std::uint64_t position, std::int32_t policy);

  // Marks for REWIND. They are taken every kMarkEvery tokens while all norms are below half of their limits. A call
  // makes them pending; keep_marks at its success keeps them.
  void mark_if_healthy(const BufferSet& state, std::uint64_t position);
  void keep_marks();
  // Drops pending marks and those after `position`.
  void forget_marks(std::uint64_t position);
  void copy_marks(const Guard& other) { mark_ = other.mark_; }
  // Bytes of memory for marks.
  std::uint64_t mark_bytes() const;
  // For a spilled stream: the mark as a state, whose other tensors are zeros.
  bool has_mark() const { return mark_ && !mark_->rows.empty(); }
  std::optional<StreamState> copy_mark() const;
  void give_mark_up() noexcept;
  void take_mark(const StreamState& state);

 private:
  struct Field {
    std::size_t offset, extent, columns;
    FieldDtype dtype;
    bool surprise;  // part of S; otherwise of W
  };
  // A range of words in a row and its value at the start of a chunk.
  struct Reset {
    std::size_t offset, extent;
    float value;
  };
  static std::vector<Reset> resets_of(const StateTensor& state);
  struct Memory {
    std::size_t state;
    const std::string* name;
    std::uint64_t chunk;
    bool known;  // the manifest gives the chunk length
    StreamRows rows;
    std::vector<Reset> resets;  // empty the open chunk; no elements if it cannot be dropped
    std::size_t row, heads;
    std::vector<Field> fields;
  };
  // The longest input that is recorded if the chunk length is unknown.
  static constexpr std::uint64_t kMostRemembered = 4096;
  static constexpr std::uint64_t kMarkEvery = 1024;  // tokens between healthy marks
  static constexpr double kHealthyShare = 0.5;       // of a limit: a mark needs lower norms

  struct HealthyMark {
    std::uint64_t position;
    std::vector<Floats> rows;  // one per memory; empty: the initial memory
    bool used;                 // the memory has returned to it; it does not help twice
  };

  bool looks_closely(std::uint64_t position) const;
  bool saw_several(std::uint64_t position, std::uint64_t tokens) const;
  std::uint64_t completed(const Memory& memory, std::uint64_t position, std::uint64_t tokens) const;
  // The packed rows in host memory: the buffer's own or a copy in `copy`.
  static const float* rows_of(const Buffer& buffer, const Memory& memory, Floats& copy);
  const float* values_of(const Field& field, const float* row, Floats& values) const;
  void look_at_head(const Memory& memory, std::size_t head, const float* before, const float* after,
                    Violation& violation);
  void look_at_norms(const Memory& memory, const Buffer& before, const Buffer& after, Violation& violation);
  bool field_changed(const Memory& memory, const NormField& field, const Buffer& before, const Buffer& after);
  bool output_is_good(const float* output) const;
  bool can_use_mark() const;
  static void set_back(const StateTensor& tensor, const float* source, float* row);
  static void decay(const StateTensor& tensor, const float* source, float* row);

  const Session& session_;
  titans_guard limits_;
  bool measures_updates_;
  titans_guard_report report_{};
  std::vector<Memory> memories_;
  std::vector<Buffer*> backups_;  // one per state tensor; NULL for swapped tensors
  Journal journal_;
  std::uint64_t position_ = 0;
  std::size_t set_ = 0;
  bool droppable_ = false;
  std::uint64_t closely_until_ = 0;
  std::vector<std::int32_t, WipingAllocator<std::int32_t>> tokens_;
  Floats vectors_;
  Floats before_copy_, after_copy_, before_values_, after_values_;
  NormReader norms_;
  std::vector<double> norm_limits_, mark_limits_;  // one per field of Session::norm_fields
  bool measured_ = false;
  std::uint64_t since_ = 0;  // marks are taken after this position
  std::optional<HealthyMark> mark_, pending_;
};

}  // namespace titans::core
