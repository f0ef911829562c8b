// A small pool of spinning threads, like those that run ONNX Runtime's decode graph. It serves to time a kernel without
// a runtime.
#pragma once

#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

#include "plugins/kernels/cpu_kernel.h"

namespace titans::kernels {

class SpinPool {
 public:
  explicit SpinPool(std::size_t threads) {
    for (std::size_t i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }
  ~SpinPool() {
    stop_ = true;
    for (std::thread& worker : workers_) worker.join();
  }
  SpinPool(const SpinPool&) = delete;
  SpinPool& operator=(const SpinPool&) = delete;

  Parallel parallel() {
    return {[](void* pool, std::size_t count, void (*body)(void*, std::size_t), void* context) {
              static_cast<SpinPool*>(pool)->run(count, body, context);
            },
            this};
  }

 private:
  void run(std::size_t count, void (*body)(void*, std::size_t), void* context) {
    body_ = body;
    context_ = context;
    count_ = count;
    next_ = 0;
    running_ = workers_.size();
    generation_.fetch_add(1);
    take();
    while (running_ != 0) {
    }
  }

  void take() {
    for (std::size_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) body_(context_, i);
  }

  void work() {
    for (std::size_t seen = 0; !stop_;) {
      if (generation_.load() == seen) continue;
      seen = generation_.load();
      take();
      running_.fetch_sub(1);
    }
  }

  std::vector<std::thread> workers_;
  void (*body_)(void*, std::size_t) = nullptr;
  void* context_ = nullptr;
  std::size_t count_ = 0;
  std::atomic<std::size_t> next_{0}, running_{0}, generation_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace titans::kernels
