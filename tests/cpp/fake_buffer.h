// Buffers and workspaces in host memory, for the engines of tests. They count the bytes copied between them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <vector>

#include <gtest/gtest.h>

#include "backends/backend.h"
#include "base/error.h"
#include "base/wipe.h"

namespace titans::test {

inline constexpr std::size_t kFakeVocab = 8;

struct FakeTraffic {
  std::atomic<std::size_t> bytes_copied{0};     // between buffers
  std::optional<int> uploads_before_a_failure;  // unset: all succeed
};

struct FakeBuffer final : core::Buffer {
  FakeBuffer(std::size_t bytes, FakeTraffic& all, bool pooled = false)
      : values(bytes / sizeof(float)), traffic(all), pool(pooled) {}

  ~FakeBuffer() override { core::wipe(values.data(), values.size() * sizeof(float)); }

  void upload(const std::byte* host) override {
    if (traffic.uploads_before_a_failure && (*traffic.uploads_before_a_failure)-- == 0) {
      throw core::Error(TITANS_FAILED, "E0609", "fake", "the upload failed", "go on");
    }
    std::memcpy(values.data(), host, values.size() * sizeof(float));
  }

  void download(std::byte* host) const override { std::memcpy(host, values.data(), values.size() * sizeof(float)); }

  void copy_from(const core::Buffer& other) override {
    values = static_cast<const FakeBuffer&>(other).values;
    traffic.bytes_copied += values.size() * sizeof(float);
  }

  void copy_stripe_from(const core::Buffer& other, const core::Stripe& stripe) override {
    const auto& from = static_cast<const FakeBuffer&>(other).values;
    for (std::size_t row = 0; row < stripe.rows; ++row) {
      const std::size_t start = (row * stripe.pitch + stripe.offset) / sizeof(float);
      ASSERT_LE(start * sizeof(float) + stripe.bytes, from.size() * sizeof(float));
      std::memcpy(values.data() + start, from.data() + start, stripe.bytes);
      traffic.bytes_copied += stripe.bytes;
    }
  }

  bool in_pool() const override { return pool; }

  std::vector<float> values;
  FakeTraffic& traffic;
  bool pool;
};

struct FakeWorkspace final : core::Workspace {
  explicit FakeWorkspace(std::size_t row_elements = kFakeVocab) : row(row_elements) {}
  const float* output(std::size_t first_row, std::size_t rows) override {
    EXPECT_LE((first_row + rows) * row, values.size());
    return values.data() + first_row * row;
  }
  std::size_t row;  // in elements
  std::vector<float> values;
};

// Runs calls of one graph as one call. If one fails, all fail, and the others have changed their state.
template <typename Run>
void run_all(const core::Call* calls, std::size_t count, core::Workspace& workspace, Run&& run) {
  std::vector<float>& values = static_cast<FakeWorkspace&>(workspace).values;
  std::vector<float> rows;
  std::exception_ptr failure;
  for (std::size_t at = 0; at < count; ++at) {
    EXPECT_EQ(calls[at].graph, calls[0].graph);
    EXPECT_TRUE(calls[at].state[0]->in_pool());
    try {
      run(calls[at]);
      rows.insert(rows.end(), values.begin(), values.end());
    } catch (...) {
      failure = std::current_exception();
    }
  }
  if (failure != nullptr) std::rethrow_exception(failure);
  values = rows;
}

// Buffers of one stream, in pools if it shares calls.
inline std::vector<std::unique_ptr<core::Buffer>> fake_buffers(const core::Manifest& manifest, FakeTraffic& traffic,
                                                               bool pooled) {
  std::vector<std::unique_ptr<core::Buffer>> buffers;
  for (const core::StateTensor& state : manifest.state) {
    buffers.push_back(std::make_unique<FakeBuffer>(state.bytes, traffic, pooled));
  }
  return buffers;
}

}  // namespace titans::test
