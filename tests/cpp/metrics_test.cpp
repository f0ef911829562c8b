#include "session/metrics.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "fake_executor.h"
#include "stream/stream.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

using core::DurationHistogram;

titans_metrics read(const core::Metrics& metrics) {
  titans_metrics all{};
  all.struct_size = sizeof(all);
  metrics.read(&all);
  return all;
}

TEST(DurationHistogram, BucketsFollowEachOther) {
  for (std::size_t bucket = 0; bucket < DurationHistogram::kBuckets; ++bucket) {
    const std::uint64_t first = DurationHistogram::first_of(bucket);
    EXPECT_EQ(DurationHistogram::bucket_of(first), bucket);
    if (bucket == 0) continue;
    EXPECT_EQ(DurationHistogram::bucket_of(first - 1), bucket - 1);
  }
  EXPECT_EQ(DurationHistogram::bucket_of(~std::uint64_t{0}), DurationHistogram::kBuckets - 1);
}

// Compares with the sorted durations.
TEST(DurationHistogram, QuantilesAreRightToASixteenth) {
  DurationHistogram histogram;
  std::vector<std::uint64_t> durations;
  std::uint64_t seed = 1, sum = 0;
  for (int i = 0; i < 5000; ++i) {
    seed = seed * 6364136223846793005U + 1442695040888963407U;
    durations.push_back(static_cast<std::uint64_t>(std::exp(static_cast<double>(seed >> 40) / 16777216.0 * 18)));
    histogram.add(durations.back());
    sum += durations.back();
  }
  std::sort(durations.begin(), durations.end());
  for (const double quantile : {0.01, 0.5, 0.9, 0.99}) {
    const auto right = static_cast<double>(durations[static_cast<std::size_t>(quantile * 5000) - 1]) * 1e-9;
    EXPECT_NEAR(histogram.quantile(quantile), right, right / 16 + 1e-9) << quantile;
  }
  EXPECT_EQ(histogram.count(), 5000U);
  EXPECT_DOUBLE_EQ(histogram.longest(), static_cast<double>(durations.back()) * 1e-9);
  EXPECT_LE(histogram.quantile(1), histogram.longest());
  EXPECT_NEAR(histogram.sum(), static_cast<double>(sum) * 1e-9, 1e-9);
  for (const unsigned exponent : {3U, 10U, 20U, 63U}) {
    const std::uint64_t end = std::uint64_t{1} << exponent;
    EXPECT_EQ(
        histogram.below(exponent),
        static_cast<std::uint64_t>(std::lower_bound(durations.begin(), durations.end(), end) - durations.begin()));
  }
  EXPECT_EQ(DurationHistogram().quantile(0.5), 0);
}

class MetricsTest : public testing::Test {
 protected:
  MetricsTest() {
    write_bundle(folder_.path());
    session_ = open_fake_session(folder_.path(), control_);
  }
  TemporaryFolder folder_;
  FakeControl control_;
  std::shared_ptr<core::Session> session_;
  const std::vector<std::int32_t> tokens_{1, 2, 3, 4, 5, 6};
};

TEST_F(MetricsTest, CountWhatStreamsDo) {
  auto stream = std::make_unique<core::Stream>(session_);
  const auto twin = stream->fork();
  titans_metrics metrics = read(session_->metrics());
  EXPECT_EQ(metrics.streams, 2U);
  EXPECT_EQ(metrics.state_bytes, 2 * stream->state_bytes());
  EXPECT_EQ(metrics.resident_bytes, metrics.state_bytes);
  EXPECT_EQ(metrics.calls, 0U);
  EXPECT_EQ(metrics.step.p50_seconds, 0);

  stream->feed(tokens_.data(), 6, TITANS_OUTPUT_NONE, nullptr, 0);
  for (int i = 0; i < 3; ++i) twin->feed(tokens_.data(), 1, TITANS_OUTPUT_NONE, nullptr, 0);
  twin->feed(nullptr, 0, TITANS_OUTPUT_NONE, nullptr, 0);
  control_.fail_at = static_cast<int>(control_.calls.size());
  EXPECT_THROW(stream->feed(tokens_.data(), 6, TITANS_OUTPUT_NONE, nullptr, 0), core::Error);
  EXPECT_THROW(stream->feed(tokens_.data(), 6, TITANS_OUTPUT_ALL, nullptr, 0), core::Error);  // never began
  metrics = read(session_->metrics());
  EXPECT_EQ(metrics.tokens, 9U);
  EXPECT_EQ(metrics.calls, 5U);
  EXPECT_EQ(metrics.failed, 1U);
  EXPECT_EQ(metrics.step.count, 3U);
  EXPECT_EQ(metrics.feed.count, 1U);
  EXPECT_EQ(metrics.chunk_updates, 9U);  // a memory whose layout has no chunk length
  EXPECT_GT(metrics.step.p50_seconds, 0);
  EXPECT_LE(metrics.step.p50_seconds, metrics.step.p99_seconds);
  EXPECT_LE(metrics.step.p99_seconds, metrics.step.max_seconds);
  EXPECT_LE(metrics.step.max_seconds, metrics.step.sum_seconds);

  stream.reset();
  EXPECT_EQ(read(session_->metrics()).streams, 1U);
  EXPECT_EQ(read(session_->metrics()).state_bytes, twin->state_bytes());
}

TEST_F(MetricsTest, AnOlderCallersStructIsWrittenNoFurther) {
  titans_metrics metrics;
  std::memset(&metrics, 0x55, sizeof(metrics));
  metrics.struct_size = offsetof(titans_metrics, feed);
  session_->metrics().read(&metrics);
  EXPECT_EQ(metrics.struct_size, offsetof(titans_metrics, feed));
  EXPECT_EQ(metrics.step.count, 0U);
  EXPECT_EQ(metrics.feed.count, 0x5555555555555555U);
}

TEST_F(MetricsTest, CountEveryCallOfEveryThread) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int call = 0; call < 1000; ++call) {
        core::MeasuredCall measured(session_->metrics());
        measured.succeeded(2, 1);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const titans_metrics metrics = read(session_->metrics());
  EXPECT_EQ(metrics.tokens, 8000U);
  EXPECT_EQ(metrics.chunk_updates, 4000U);
  EXPECT_EQ(metrics.feed.count, 4000U);
}

TEST_F(MetricsTest, TheTextEscapesLabels) {
  const std::string text = session_->metrics().text("a\"b\\c\nd");
  EXPECT_NE(text.find(R"(titans_streams{bundle="a\"b\\c\nd"} 0)"), std::string::npos) << text;
  const std::string other = session_->metrics().text("x\xff\u65e5");  // the format is UTF-8
  EXPECT_NE(other.find("titans_streams{bundle=\"x\uFFFD\u65e5\"} 0"), std::string::npos) << other;
}

}  // namespace
}  // namespace titans::test
