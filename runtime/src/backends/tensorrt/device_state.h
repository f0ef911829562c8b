// State in device memory and its copies.
#pragma once

#include <atomic>
#include <cstdint>

#include "backends/backend.h"
#include "cuda/objects.h"

namespace titans::core {

// The stream for copies of all buffers of an executor. A call waits for earlier copies. Calls are complete when they
// return, so copies need not wait for calls.
class Copies {
 public:
  explicit Copies(const cuda::Context& context) : stream_(context) {}

  const cuda::Stream& stream() const { return stream_; }
  void count() noexcept { done_.fetch_add(1, std::memory_order_release); }
  // The number of copies so far; a workspace compares it to detect new ones.
  std::uint64_t made() const noexcept { return done_.load(std::memory_order_acquire); }

 private:
  cuda::Stream stream_;
  std::atomic<std::uint64_t> done_{0};
};

class DeviceBuffer final : public Buffer {
 public:
  DeviceBuffer(Copies& copies, std::size_t bytes) : copies_(copies), memory_(copies.stream(), bytes) {}

  void upload(const std::byte* host) override {
    cuda::copy_to_device(copies_.stream(), address(), host, memory_.size());
    copies_.count();
  }
  void download(std::byte* host) const override {
    cuda::copy_to_host(copies_.stream(), host, address(), memory_.size());
    copies_.stream().synchronize();
  }
  void copy_from(const Buffer& other) override {
    cuda::copy_on_device(copies_.stream(), address(), static_cast<const DeviceBuffer&>(other).address(),
                         memory_.size());
    copies_.count();
  }
  void copy_stripe_from(const Buffer& other, const Stripe& stripe) override {
    cuda::copy_stripe(copies_.stream(), address(), static_cast<const DeviceBuffer&>(other).address(), stripe);
    copies_.count();
  }

  CUdeviceptr address() const { return memory_.address(); }

 private:
  Copies& copies_;
  cuda::DeviceMemory memory_;
};

}  // namespace titans::core
