#include "backends/onnxruntime/state_pool.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/wipe.h"

namespace titans::core {
namespace {

constexpr std::size_t kMostSlots = std::size_t{1} << 16;

std::size_t page_bytes() {
  static const auto bytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

std::size_t round_up(std::size_t bytes) { return (bytes + page_bytes() - 1) / page_bytes() * page_bytes(); }

std::size_t slots_of_machine(std::size_t bytes) {
  std::size_t room = static_cast<std::size_t>(std::max(0L, ::sysconf(_SC_PHYS_PAGES))) * page_bytes();
  rlimit limit{};
  // Most of a limited address space stays free for everything else.
  if (::getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
    room = std::min<std::size_t>(room, limit.rlim_cur / 4);
  }
  return std::clamp<std::size_t>(room / std::max<std::size_t>(bytes, 1), 1, kMostSlots);
}

}  // namespace

StatePool::StatePool(std::vector<std::size_t> slot_bytes) : bytes_(std::move(slot_bytes)), arrays_(bytes_.size()) {
  std::size_t slots = slots_of_machine(std::accumulate(bytes_.begin(), bytes_.end(), std::size_t{0}));
  while (slots > 0 && !reserve(slots)) slots /= 2;
  capacity_ = slots;
}

StatePool::~StatePool() { release(); }

bool StatePool::reserve(std::size_t slots) {
  for (std::size_t array = 0; array < bytes_.size(); ++array) {
    const std::size_t bytes = round_up(std::max<std::size_t>(slots * bytes_[array], 1));
    // Without access rights the range takes neither memory nor a part of the system's commit limit.
    void* base = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
      release();
      return false;
    }
    arrays_[array] = {static_cast<std::byte*>(base), bytes, 0};
  }
  return true;
}

void StatePool::release() {
  for (Array& array : arrays_) {
    if (array.base != nullptr) ::munmap(array.base, array.reserved);
    array = {};
  }
}

bool StatePool::make_usable(std::size_t slots) {
  for (std::size_t index = 0; index < arrays_.size(); ++index) {
    Array& array = arrays_[index];
    const std::size_t wanted = round_up(slots * bytes_[index]);
    if (wanted <= array.usable) continue;
    if (::mprotect(array.base + array.usable, wanted - array.usable, PROT_READ | PROT_WRITE) != 0) return false;
    array.usable = wanted;
  }
  return true;
}

std::shared_ptr<StatePool::Slot> StatePool::take() {
  const std::lock_guard lock(mutex_);
  std::size_t index = first_free_;
  while (index < taken_.size() && taken_[index]) ++index;
  if (index == capacity_ || !make_usable(index + 1)) return nullptr;
  if (index == taken_.size()) taken_.push_back(false);
  auto slot = std::make_shared<Slot>(*this, index);
  taken_[index] = true;
  first_free_ = index + 1;
  return slot;
}

void StatePool::put_back(std::size_t slot) noexcept {
  for (std::size_t array = 0; array < arrays_.size(); ++array) wipe(data(array, slot), bytes_[array]);
  const std::lock_guard lock(mutex_);
  taken_[slot] = false;
  first_free_ = std::min(first_free_, slot);
  for (std::size_t array = 0; array < arrays_.size(); ++array) drop_pages(array, slot);
}

void StatePool::drop_pages(std::size_t array, std::size_t slot) noexcept {
  const std::size_t bytes = bytes_[array], page = page_bytes();
  if (bytes == 0) return;
  const auto shared = [&](std::size_t at) {
    const std::size_t last = std::min((at + page - 1) / bytes + 1, taken_.size());
    for (std::size_t other = at / bytes; other < last; ++other) {
      if (taken_[other]) return true;
    }
    return false;
  };
  std::size_t begin = slot * bytes / page * page, end = round_up((slot + 1) * bytes);
  if (shared(begin)) begin += page;
  if (begin < end && shared(end - page)) end -= page;
  if (begin < end) ::madvise(arrays_[array].base + begin, end - begin, MADV_DONTNEED);
}

}  // namespace titans::core
