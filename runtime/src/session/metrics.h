// What a session counts of its streams, without a lock: every call of every thread adds to it.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "titans/titans.h"

namespace titans::core {

// A number that many threads add to. Nobody derives an order of events from it, so additions are relaxed.
class Counter {
 public:
  void add(std::uint64_t amount = 1) noexcept { value_.fetch_add(amount, std::memory_order_relaxed); }
  void subtract(std::uint64_t amount = 1) noexcept { value_.fetch_sub(amount, std::memory_order_relaxed); }
  std::uint64_t value() const noexcept { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> value_{0};
};

// Durations in nanoseconds, in buckets an eighth as wide as the power of two that they begin with: what is read from
// them is right to 1/16.
class DurationHistogram {
 public:
  static constexpr std::size_t kBuckets = 8 * 62;  // up to 2^64

  void add(std::uint64_t nanoseconds) noexcept;
  // Seconds that the part `quantile` of all durations does not exceed; 0 where there is none.
  double quantile(double quantile) const;
  double longest() const noexcept { return static_cast<double>(longest_.load(std::memory_order_relaxed)) * 1e-9; }
  double sum() const noexcept { return static_cast<double>(sum_.value()) * 1e-9; }
  std::uint64_t count() const;
  // How many are shorter than 2^`exponent` nanoseconds, 3 <= exponent < 64.
  std::uint64_t below(unsigned exponent) const;

  static std::size_t bucket_of(std::uint64_t nanoseconds) noexcept;
  static std::uint64_t first_of(std::size_t bucket) noexcept;  // the shortest duration in it

 private:
  std::array<std::atomic<std::uint64_t>, kBuckets> buckets_{};
  Counter sum_;
  std::atomic<std::uint64_t> longest_{0};
};

struct Metrics {
  Counter streams;        // open now
  Counter tokens;         // consumed by calls that succeeded
  Counter chunk_updates;  // chunks that those completed, of each memory
  Counter rollbacks;      // chunks that a guard took back
  Counter cancelled;      // calls
  Counter failed;         // calls that began to work
  Counter spilled;
  Counter restored;
  Counter state_bytes;      // of all open streams
  Counter resident_bytes;   // of these, what is in memory
  DurationHistogram steps;  // calls of one token
  DurationHistogram feeds;  // of several

  // `into->struct_size` says how much of it is written.
  void read(titans_metrics* into) const;
  // Prometheus' text format 0.0.4, every sample with the label bundle.
  std::string text(std::string_view bundle) const;
};

// One call of a stream. It counts as failed unless told otherwise.
class MeasuredCall {
 public:
  explicit MeasuredCall(Metrics& metrics) : metrics_(metrics), start_(std::chrono::steady_clock::now()) {}
  ~MeasuredCall() {
    if (!ended_) metrics_.failed.add();
  }
  MeasuredCall(const MeasuredCall&) = delete;
  MeasuredCall& operator=(const MeasuredCall&) = delete;

  void succeeded(std::uint64_t tokens, std::uint64_t chunk_updates) noexcept {
    const auto elapsed = std::chrono::steady_clock::now() - start_;
    const auto nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count();
    (tokens == 1 ? metrics_.steps : metrics_.feeds).add(static_cast<std::uint64_t>(nanoseconds));
    metrics_.tokens.add(tokens);
    if (chunk_updates > 0) metrics_.chunk_updates.add(chunk_updates);
    ended_ = true;
  }
  void cancelled() noexcept {
    metrics_.cancelled.add();
    ended_ = true;
  }

 private:
  Metrics& metrics_;
  std::chrono::steady_clock::time_point start_;
  bool ended_ = false;
};

}  // namespace titans::core
