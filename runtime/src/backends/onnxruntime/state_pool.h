// The state of many streams in host memory: one array for each state tensor, with a slot for each stream. A graph call
// takes the arrays and the slots of its streams.
//
// The arrays are reserved address space, so they grow without moving. A slot takes memory while a stream has it.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

namespace titans::core {

class StatePool {
 public:
  // One array per element of `slot_bytes`, the bytes of a slot. Reserves address space for as many slots as fit into
  // the machine's memory, fewer if the system refuses.
  explicit StatePool(std::vector<std::size_t> slot_bytes);
  // All slots must have been returned.
  ~StatePool();
  StatePool(const StatePool&) = delete;
  StatePool& operator=(const StatePool&) = delete;

  // A stream's slot, the same in every array. Wipes it and returns its memory to the system when destroyed.
  class Slot {
   public:
    Slot(StatePool& pool, std::size_t index) : pool_(pool), index_(index) {}
    ~Slot() { pool_.put_back(index_); }
    Slot(const Slot&) = delete;
    Slot& operator=(const Slot&) = delete;
    std::size_t index() const { return index_; }

   private:
    StatePool& pool_;
    std::size_t index_;
  };
  // The lowest free slot, filled with zeros. NULL if none is free or the system has no memory for it. Threads may call
  // it concurrently.
  std::shared_ptr<Slot> take();

  std::byte* data(std::size_t array, std::size_t slot) const { return arrays_[array].base + slot * bytes_[array]; }
  std::size_t capacity() const { return capacity_; }

 private:
  struct Array {
    std::byte* base = nullptr;
    std::size_t reserved = 0;  // bytes
    std::size_t usable = 0;    // bytes that may be read and written, from the base
  };

  bool reserve(std::size_t slots);
  void release();
  bool make_usable(std::size_t slots);
  void put_back(std::size_t slot) noexcept;
  // Returns the pages of a slot that no taken slot shares to the system.
  void drop_pages(std::size_t array, std::size_t slot) noexcept;

  const std::vector<std::size_t> bytes_;
  std::vector<Array> arrays_;
  std::size_t capacity_ = 0;
  std::mutex mutex_;            // guards the members below and the arrays' usable bytes
  std::vector<bool> taken_;     // one per slot ever taken
  std::size_t first_free_ = 0;  // no slot before it is free
};

}  // namespace titans::core
