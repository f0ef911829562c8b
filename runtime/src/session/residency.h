// Which streams have their state in memory, where a session has a budget for that: those used last, as many as fit.
// The others wait in files (spill_folder.h), and come back at their next use.
//
// Who uses a stream holds its place; a held one is never spilled, and is in memory beyond the budget where nothing else
// is left to spill. Moving a state takes place without the lock, so that other streams go on meanwhile.
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

class Session;

// What a residency moves.
class Spillable {
 public:
  virtual ~Spillable() = default;
  // All that give_up drops.
  virtual std::vector<StreamState> copy_out() const = 0;
  virtual void give_up() noexcept = 0;
  // Allocates again, and is exactly as it was; where that fails it has nothing, as before.
  virtual void take_back(std::vector<StreamState> parts) = 0;
};

class Residency {
 public:
  Residency(const Session& session, Metrics& metrics, std::uint64_t budget, const std::filesystem::path& spill_dir);
  Residency(const Residency&) = delete;
  Residency& operator=(const Residency&) = delete;

  // One stream's place. It begins held, in memory, with nothing.
  class Place {
   public:
    // Without a residency nothing is ever moved, and nothing here costs anything.
    Place(Residency* residency, Spillable& owner);
    ~Place();
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;

    // Brings the state into memory and keeps it there until let_go.
    void hold();
    void let_go() noexcept;
    // While held: makes room before the owner allocates, counts as freed what it no longer has.
    void grow(std::uint64_t bytes);
    void shrink(std::uint64_t bytes) noexcept;
    // Before the owner's buffers go: never moved again. Whether it is in memory; what is not loses its files.
    bool retire() noexcept;

   private:
    friend class Residency;
    enum class State : std::uint8_t { kHeld, kIdle, kMoving, kSpilled };

    Residency* residency_;
    Spillable& owner_;
    // Guarded by the residency's mutex.
    std::uint64_t id_ = 0;
    std::uint64_t bytes_ = 0;
    State state_ = State::kHeld;
    std::size_t parts_ = 0;         // files, while spilled
    std::list<Place*> node_{this};  // is in idle_ while idle, so that no move needs memory
    const std::list<Place*>::iterator at_ = node_.begin();
  };

 private:
  using Lock = std::unique_lock<std::mutex>;

  void hold(Place& place);
  void let_go(Place& place) noexcept;
  void grow(Place& place, std::uint64_t bytes);
  void shrink(Place& place, std::uint64_t bytes) noexcept;
  bool retire(Place& place) noexcept;
  void leave(Place& place) noexcept;

  // Counts the bytes as in memory when others have made room, or only held ones are left. An Error where a spill fails.
  void reserve(std::uint64_t bytes, Lock& lock);
  void free_up(Lock& lock);
  void spill_oldest(Lock& lock);
  // After so many bytes were freed that the process may have kept them.
  void return_to_system(std::uint64_t freed);
  void read_back(Place& place, std::size_t parts);
  void remove_files(std::uint64_t id, std::size_t parts) noexcept;

  const Session& session_;
  Metrics& metrics_;
  const std::uint64_t budget_;
  const SpillFolder folder_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable moved_;
  std::list<Place*> idle_;       // the one used longest ago first
  std::uint64_t in_memory_ = 0;  // bytes
  std::uint64_t leaving_ = 0;    // of these, being spilled
  std::uint64_t next_id_ = 0;

  std::atomic<std::uint64_t> freed_{0};  // since memory was last returned to the system
};

}  // namespace titans::core
