#include "session/state_cache.h"

#include <algorithm>
#include <utility>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "base/error.h"
#include "base/log.h"

namespace titans::core {

StateCache::StateCache(const StateSchema& schema, Metrics& metrics, std::uint64_t budget,
                       const std::filesystem::path& spill_dir)
    : schema_(schema), metrics_(metrics), budget_(budget), folder_(spill_dir) {}

StateCache::Handle::Handle(StateCache* cache, Spillable& owner) : cache_(cache), owner_(owner) {
  if (cache_ == nullptr) return;
  const Lock lock(cache_->mutex_);
  id_ = cache_->next_id_++;
}

StateCache::Handle::~Handle() {
  if (cache_ != nullptr) cache_->leave(*this);
}

void StateCache::Handle::hold() {
  if (cache_ != nullptr) cache_->hold(*this);
}

void StateCache::Handle::let_go() noexcept {
  if (cache_ != nullptr) cache_->let_go(*this);
}

void StateCache::Handle::grow(std::uint64_t bytes) {
  if (cache_ != nullptr) cache_->grow(*this, bytes);
}

void StateCache::Handle::shrink(std::uint64_t bytes) noexcept {
  if (cache_ != nullptr) cache_->shrink(*this, bytes);
}

bool StateCache::Handle::retire() noexcept { return cache_ == nullptr || cache_->retire(*this); }

void StateCache::hold(Handle& handle) {
  using State = Handle::State;
  Lock lock(mutex_);
  moved_.wait(lock, [&] { return handle.state_ != State::kMoving; });
  if (handle.state_ == State::kIdle) handle.node_.splice(handle.node_.begin(), idle_, handle.at_);
  if (handle.state_ != State::kSpilled) {
    handle.state_ = State::kHeld;
    return;
  }
  handle.state_ = State::kMoving;
  const auto stays_spilled = [&] {
    handle.state_ = State::kSpilled;
    moved_.notify_all();
  };
  try {
    reserve(handle.bytes_, lock);
  } catch (...) {
    stays_spilled();
    throw;
  }
  const std::size_t parts = handle.parts_;
  lock.unlock();
  try {
    read_back(handle, parts);
  } catch (...) {
    lock.lock();
    in_memory_ -= handle.bytes_;
    stays_spilled();
    throw;
  }
  remove_files(handle.id_, parts);
  lock.lock();
  handle.state_ = State::kHeld;
  metrics_.restored.add();
  metrics_.resident_bytes.add(handle.bytes_);
  moved_.notify_all();
}

void StateCache::let_go(Handle& handle) noexcept {
  Lock lock(mutex_);
  handle.state_ = Handle::State::kIdle;
  idle_.splice(idle_.end(), handle.node_, handle.at_);
  try {
    free_up(lock);
  } catch (...) {
    lock.unlock();  // a log function may close streams
    log(TITANS_LOG_WARNING, "spill", current_failure().text);
  }
}

void StateCache::grow(Handle& handle, std::uint64_t bytes) {
  Lock lock(mutex_);
  reserve(bytes, lock);
  handle.bytes_ += bytes;
}

void StateCache::shrink(Handle& handle, std::uint64_t bytes) noexcept {
  const Lock lock(mutex_);
  in_memory_ -= bytes;
  handle.bytes_ -= bytes;
  moved_.notify_all();
}

bool StateCache::retire(Handle& handle) noexcept {
  Lock lock(mutex_);
  moved_.wait(lock, [&] { return handle.state_ != Handle::State::kMoving; });
  if (handle.state_ == Handle::State::kSpilled) return false;
  if (handle.state_ == Handle::State::kIdle) handle.node_.splice(handle.node_.begin(), idle_, handle.at_);
  handle.state_ = Handle::State::kHeld;
  return true;
}

void StateCache::leave(Handle& handle) noexcept {
  retire(handle);
  if (handle.state_ == Handle::State::kSpilled) {
    remove_files(handle.id_, handle.parts_);
  } else {
    shrink(handle, handle.bytes_);
  }
}

void StateCache::reserve(std::uint64_t bytes, Lock& lock) {
  in_memory_ += bytes;
  try {
    free_up(lock);
  } catch (...) {
    in_memory_ -= bytes;
    moved_.notify_all();
    throw;
  }
}

void StateCache::free_up(Lock& lock) {
  while (in_memory_ > budget_) {
    if (in_memory_ - leaving_ > budget_ && !idle_.empty()) {
      spill_oldest(lock);
    } else if (leaving_ > 0) {
      moved_.wait(lock);
    } else {
      return;
    }
  }
}

void StateCache::spill_oldest(Lock& lock) {
  Handle& handle = *idle_.front();
  handle.node_.splice(handle.node_.begin(), idle_, handle.at_);
  handle.state_ = Handle::State::kMoving;
  leaving_ += handle.bytes_;
  lock.unlock();
  std::size_t written = 0;
  Failure failure;
  try {
    for (const StreamState& part : handle.owner_.copy_out()) folder_.write(schema_, handle.id_, written++, part);
  } catch (...) {
    failure = current_failure();
  }
  const bool moved = failure.status == TITANS_OK;
  if (moved) {
    handle.owner_.give_up();
    return_to_system(handle.bytes_);
  } else {
    remove_files(handle.id_, written);
  }
  lock.lock();
  leaving_ -= handle.bytes_;
  moved_.notify_all();
  if (!moved) {
    handle.state_ = Handle::State::kIdle;
    idle_.splice(idle_.begin(), handle.node_, handle.at_);
    throw Error(TITANS_FAILED, "E0411", "spill",
                text("cannot keep within the memory_budget of ", budget_, " bytes: ", failure.text),
                "free space in spill_dir or close streams; no stream has changed");
  }
  in_memory_ -= handle.bytes_;
  handle.state_ = Handle::State::kSpilled;
  handle.parts_ = written;
  metrics_.spilled.add();
  metrics_.resident_bytes.subtract(handle.bytes_);
}

// The allocator keeps freed memory. As streams come and go, the process would grow to a multiple of the budget.
void StateCache::return_to_system([[maybe_unused]] std::uint64_t freed) {
#ifdef __GLIBC__
  constexpr std::uint64_t kLeast = std::uint64_t{8} << 20, kPart = 16;
  if (freed_.fetch_add(freed, std::memory_order_relaxed) + freed < std::max(budget_ / kPart, kLeast)) return;
  freed_.store(0, std::memory_order_relaxed);
  ::malloc_trim(0);
#endif
}

void StateCache::read_back(Handle& handle, std::size_t parts) {
  std::vector<StreamState> states;
  states.reserve(parts);
  for (std::size_t part = 0; part < parts; ++part) states.push_back(folder_.read(schema_, handle.id_, part));
  handle.owner_.take_back(std::move(states));
}

void StateCache::remove_files(std::uint64_t id, std::size_t parts) noexcept {
  for (std::size_t part = 0; part < parts; ++part) folder_.remove(id, part);
}

}  // namespace titans::core
