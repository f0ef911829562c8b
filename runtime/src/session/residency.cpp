#include "session/residency.h"

#include <algorithm>
#include <utility>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "base/error.h"
#include "base/log.h"

namespace titans::core {

Residency::Residency(const Session& session, Metrics& metrics, std::uint64_t budget,
                     const std::filesystem::path& spill_dir)
    : session_(session), metrics_(metrics), budget_(budget), folder_(spill_dir) {}

Residency::Place::Place(Residency* residency, Spillable& owner) : residency_(residency), owner_(owner) {
  if (residency_ == nullptr) return;
  const Lock lock(residency_->mutex_);
  id_ = residency_->next_id_++;
}

Residency::Place::~Place() {
  if (residency_ != nullptr) residency_->leave(*this);
}

void Residency::Place::hold() {
  if (residency_ != nullptr) residency_->hold(*this);
}

void Residency::Place::let_go() noexcept {
  if (residency_ != nullptr) residency_->let_go(*this);
}

void Residency::Place::grow(std::uint64_t bytes) {
  if (residency_ != nullptr) residency_->grow(*this, bytes);
}

void Residency::Place::shrink(std::uint64_t bytes) noexcept {
  if (residency_ != nullptr) residency_->shrink(*this, bytes);
}

bool Residency::Place::retire() noexcept { return residency_ == nullptr || residency_->retire(*this); }

void Residency::hold(Place& place) {
  using State = Place::State;
  Lock lock(mutex_);
  moved_.wait(lock, [&] { return place.state_ != State::kMoving; });
  if (place.state_ == State::kIdle) place.node_.splice(place.node_.begin(), idle_, place.at_);
  if (place.state_ != State::kSpilled) {
    place.state_ = State::kHeld;
    return;
  }
  place.state_ = State::kMoving;
  const auto stays_spilled = [&] {
    place.state_ = State::kSpilled;
    moved_.notify_all();
  };
  try {
    reserve(place.bytes_, lock);
  } catch (...) {
    stays_spilled();
    throw;
  }
  const std::size_t parts = place.parts_;
  lock.unlock();
  try {
    read_back(place, parts);
  } catch (...) {
    lock.lock();
    in_memory_ -= place.bytes_;
    stays_spilled();
    throw;
  }
  remove_files(place.id_, parts);
  lock.lock();
  place.state_ = State::kHeld;
  metrics_.restored.add();
  metrics_.resident_bytes.add(place.bytes_);
  moved_.notify_all();
}

void Residency::let_go(Place& place) noexcept {
  Lock lock(mutex_);
  place.state_ = Place::State::kIdle;
  idle_.splice(idle_.end(), place.node_, place.at_);
  try {
    free_up(lock);
  } catch (...) {
    lock.unlock();  // a log function may close streams
    log(TITANS_LOG_WARNING, "spill", current_failure().text);
  }
}

void Residency::grow(Place& place, std::uint64_t bytes) {
  Lock lock(mutex_);
  reserve(bytes, lock);
  place.bytes_ += bytes;
}

void Residency::shrink(Place& place, std::uint64_t bytes) noexcept {
  const Lock lock(mutex_);
  in_memory_ -= bytes;
  place.bytes_ -= bytes;
  moved_.notify_all();
}

bool Residency::retire(Place& place) noexcept {
  Lock lock(mutex_);
  moved_.wait(lock, [&] { return place.state_ != Place::State::kMoving; });
  if (place.state_ == Place::State::kSpilled) return false;
  if (place.state_ == Place::State::kIdle) place.node_.splice(place.node_.begin(), idle_, place.at_);
  place.state_ = Place::State::kHeld;
  return true;
}

void Residency::leave(Place& place) noexcept {
  retire(place);
  if (place.state_ == Place::State::kSpilled) {
    remove_files(place.id_, place.parts_);
  } else {
    shrink(place, place.bytes_);
  }
}

void Residency::reserve(std::uint64_t bytes, Lock& lock) {
  in_memory_ += bytes;
  try {
    free_up(lock);
  } catch (...) {
    in_memory_ -= bytes;
    moved_.notify_all();
    throw;
  }
}

void Residency::free_up(Lock& lock) {
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

void Residency::spill_oldest(Lock& lock) {
  Place& place = *idle_.front();
  place.node_.splice(place.node_.begin(), idle_, place.at_);
  place.state_ = Place::State::kMoving;
  leaving_ += place.bytes_;
  lock.unlock();
  std::size_t written = 0;
  Failure failure;
  try {
    for (const StreamState& part : place.owner_.copy_out()) folder_.write(session_, place.id_, written++, part);
  } catch (...) {
    failure = current_failure();
  }
  const bool moved = failure.status == TITANS_OK;
  if (moved) {
    place.owner_.give_up();
    return_to_system(place.bytes_);
  } else {
    remove_files(place.id_, written);
  }
  lock.lock();
  leaving_ -= place.bytes_;
  moved_.notify_all();
  if (!moved) {
    place.state_ = Place::State::kIdle;
    idle_.splice(idle_.begin(), place.node_, place.at_);
    throw Error(TITANS_FAILED, "spill", text("to keep within memory_budget, ", budget_, " bytes,"), failure.text,
                "make room in spill_dir or close streams; no stream has changed");
  }
  in_memory_ -= place.bytes_;
  place.state_ = Place::State::kSpilled;
  place.parts_ = written;
  metrics_.spilled.add();
  metrics_.resident_bytes.subtract(place.bytes_);
}

// An allocator keeps what it gets back: where states come and go, the process would grow to a multiple of the budget.
void Residency::return_to_system([[maybe_unused]] std::uint64_t freed) {
#ifdef __GLIBC__
  constexpr std::uint64_t kLeast = std::uint64_t{8} << 20, kPart = 16;
  if (freed_.fetch_add(freed, std::memory_order_relaxed) + freed < std::max(budget_ / kPart, kLeast)) return;
  freed_.store(0, std::memory_order_relaxed);
  ::malloc_trim(0);
#endif
}

void Residency::read_back(Place& place, std::size_t parts) {
  std::vector<StreamState> states;
  states.reserve(parts);
  for (std::size_t part = 0; part < parts; ++part) states.push_back(folder_.read(session_, place.id_, part));
  place.owner_.take_back(std::move(states));
}

void Residency::remove_files(std::uint64_t id, std::size_t parts) noexcept {
  for (std::size_t part = 0; part < parts; ++part) folder_.remove(id, part);
}

}  // namespace titans::core
