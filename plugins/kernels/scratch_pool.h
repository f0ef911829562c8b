// Scratch memory that a kernel keeps from call to call.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace titans::kernels {

inline constexpr std::size_t kCacheLine = 64;

// Floats that begin on a cache line, or null.
struct FreeFloats {
  void operator()(float* data) const noexcept { ::operator delete(data, std::align_val_t{kCacheLine}); }
};
using AlignedFloats = std::unique_ptr<float, FreeFloats>;

inline AlignedFloats allocate_floats(std::size_t count) {
  return AlignedFloats(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{kCacheLine})));
}

// Reusable scratch: one allocation per head that ran at the same time.
template <class Scratch, class Configuration>
class ScratchPool {
 public:
  explicit ScratchPool(const Configuration& configuration) : configuration_(configuration) {}

  class Lease {
   public:
    explicit Lease(ScratchPool& pool) : pool_(pool) {
      {
        const std::lock_guard lock(pool.mutex_);
        if (!pool.idle_.empty()) {
          scratch_ = std::move(pool.idle_.back());
          pool.idle_.pop_back();
          return;
        }
      }
      scratch_ = std::make_unique<Scratch>(pool.configuration_);
      // Reserves now, so that returning the scratch cannot fail.
      const std::lock_guard lock(pool.mutex_);
      pool.idle_.reserve(++pool.made_);
    }
    ~Lease() {
      const std::lock_guard lock(pool_.mutex_);
      pool_.idle_.push_back(std::move(scratch_));
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    Scratch& get() const { return *scratch_; }

   private:
    ScratchPool& pool_;
    std::unique_ptr<Scratch> scratch_;
  };

 private:
  Configuration configuration_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> idle_;
  std::size_t made_ = 0;
};

// Scratch of a size that depends on the call. It grows only.
class GrowingScratch {
 public:
  struct Nothing {};
  explicit GrowingScratch(Nothing /*configuration*/) {}

  // Uninitialized floats that begin on a cache line.
  float* floats(std::size_t count) {
    if (count > size_) {
      memory_ = nullptr;
      size_ = 0;
      memory_ = allocate_floats(count);
      size_ = count;
    }
    return memory_.get();
  }

 private:
  AlignedFloats memory_;
  std::size_t size_ = 0;
};
using GrowingPool = ScratchPool<GrowingScratch, GrowingScratch::Nothing>;

}  // namespace titans::kernels
