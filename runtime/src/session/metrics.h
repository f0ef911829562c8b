// A session's counters, updated without locks by every call of every thread.
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

// A counter shared by threads. No order of events is derived from it, so operations are relaxed.
class Counter {
 public:
  void add(std::uint64_t amount = 1) noexcept { value_.fetch_add(amount, std::memory_order_relaxed); }
  void subtract(std::uint64_t amount = 1) noexcept { value_.fetch_sub(amount, std::memory_order_relaxed); }
  std::uint64_t value() const noexcept { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> value_{0};
};

// A histogram of durations in nanoseconds. Each power of two has eight buckets, so results are accurate to 1/16.
class DurationHistogram {
 public:
  static constexpr std::size_t kBuckets = 8 * 62;  // up to 2^64

  void add(std::uint64_t nanoseconds) noexcept;
  // The quantile in seconds; 0 without durations.
  double quantile(double quantile) const;
  double longest() const noexcept { return static_cast<double>(longest_.load(std::memory_order_relaxed)) * 1e-9; }
  double sum() const noexcept { return static_cast<double>(sum_.value()) * 1e-9; }
  std::uint64_t count() const;
  // The number of durations below 2^`exponent` nanoseconds, 3 <= exponent < 64.
  std::uint64_t below(unsigned exponent) const;

  static std::size_t bucket_of(std::uint64_t nanoseconds) noexcept;
  static std::uint64_t first_of(std::size_t bucket) noexcept;  // shortest duration of the bucket

 private:
  std::array<std::atomic<std::uint64_t>, kBuckets> buckets_{};
  Counter sum_;
  std::atomic<std::uint64_t> longest_{0};
};

struct Metrics {
  Counter streams;        // open now
  Counter tokens;         // consumed by successful calls
  Counter chunk_updates;  // chunk updates by these calls, over all memories
  Counter rollbacks;      // chunks undone by a guard
  Counter cancelled;      // calls
  Counter failed;         // calls that failed after they started work
  Counter spilled;
  Counter restored;
  Counter diverging;        // open streams whose memory diverges
  Counter divergences;      // times that a memory began to
  Counter repairs;          // times that a guard set a memory back
  Counter state_bytes;      // of all open streams
  Counter resident_bytes;   // the part in memory
  DurationHistogram steps;  // single-token calls
  DurationHistogram feeds;  // longer calls

  // Writes only the first `into->struct_size` bytes.
  void read(titans_metrics* into) const;
  // Prometheus text format 0.0.4. Every sample has the label bundle.
  std::string text(std::string_view bundle) const;
};

// One call of a stream. It counts as failed unless succeeded or cancelled is called.
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
  // The call is made again and counts then.
  void withdrawn() noexcept { ended_ = true; }

 private:
  Metrics& metrics_;
  std::chrono::steady_clock::time_point start_;
  bool ended_ = false;
};

}  // namespace titans::core
