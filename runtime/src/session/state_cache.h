// The budget for the state of all streams in memory. The streams used last stay in memory; the others are spilled to
// files (spill_folder.h) and read back at their next use.
//
// A caller that uses a stream holds the stream's handle. A held stream is never spilled, so the memory in use exceeds
// the budget if nothing else can be spilled. States move without the lock, so other streams continue meanwhile.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>
#include <vector>

#include "session/metrics.h"
#include "state/spill_folder.h"
#include "state/stream_state.h"

namespace titans::core {

// The interface through which the cache moves a stream's state.
class Spillable {
 public:
  virtual ~Spillable() = default;
  // A copy of everything that give_up drops.
  virtual std::vector<StreamState> copy_out() const = 0;
  virtual void give_up() noexcept = 0;
  // Allocates again and restores the copy exactly. After an exception the stream still has no state.
  virtual void take_back(std::vector<StreamState> parts) = 0;
};

class StateCache {
 public:
  StateCache(const StateSchema& schema, Metrics& metrics, std::uint64_t budget, const std::filesystem::path& spill_dir);
  StateCache(const StateCache&) = delete;
  StateCache& operator=(const StateCache&) = delete;
  std::uint64_t budget() const { return budget_; }

  // One stream in the cache. A new handle is held and in memory, with 0 bytes.
  class Handle {
   public:
    // If `cache` is NULL, the state always stays in memory.
    Handle(StateCache* cache, Spillable& owner);
    ~Handle();
    Handle(const Handle&) = delete;
    Handle& operator=(const Handle&) = delete;

    // Brings the state into memory and keeps it there until let_go().
    void hold();
    void let_go() noexcept;
    // While held: grow makes room before the owner allocates; shrink counts freed bytes.
    void grow(std::uint64_t bytes);
    void shrink(std::uint64_t bytes) noexcept;
    // Call before the owner frees its buffers: the stream is never moved again, and its files are removed. True if the
    // state is in memory.
    bool retire() noexcept;

   private:
    friend class StateCache;
    enum class State : std::uint8_t { kHeld, kIdle, kMoving, kSpilled };

    StateCache* cache_;
    Spillable& owner_;
    // Guarded by the cache's mutex.
    std::uint64_t id_ = 0;
    std::uint64_t bytes_ = 0;
    State state_ = State::kHeld;
    std::size_t parts_ = 0;          // files, while spilled
    std::list<Handle*> node_{this};  // is in idle_ while idle, so that no move needs memory
    const std::list<Handle*>::iterator at_ = node_.begin();
  };

 private:
  using Lock = std::unique_lock<std::mutex>;

  void hold(Handle& handle);
  void let_go(Handle& handle) noexcept;
  void grow(Handle& handle, std::uint64_t bytes);
  void shrink(Handle& handle, std::uint64_t bytes) noexcept;
  bool retire(Handle& handle) noexcept;
  void leave(Handle& handle) noexcept;

  // Spills idle streams until the bytes fit or only held streams remain, then counts the bytes. Throws an Error if a
  // spill fails.
  void reserve(std::uint64_t bytes, Lock& lock);
  void free_up(Lock& lock);
  void spill_oldest(Lock& lock);
  // Returns freed memory to the system once enough has accumulated.
  void return_to_system(std::uint64_t freed);
  void read_back(Handle& handle, std::size_t parts);
  void remove_files(std::uint64_t id, std::size_t parts) noexcept;

  const StateSchema& schema_;
  Metrics& metrics_;
  const std::uint64_t budget_;
  const SpillFolder folder_;
  std::mutex mutex_;  // guards the members below
  std::condition_variable moved_;
  std::list<Handle*> idle_;      // least recently used first
  std::uint64_t in_memory_ = 0;  // bytes
  std::uint64_t leaving_ = 0;    // the part of in_memory_ that is being spilled
  std::uint64_t next_id_ = 0;

  std::atomic<std::uint64_t> freed_{0};  // since memory was last returned to the system
};

}  // namespace titans::core
