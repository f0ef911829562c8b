// Calls on streams with their n-th allocation failing, for every n: an error, no leak, and nothing changed. Calls that
// read or write JSON are not part of it: the JSON library allocates in destructors, and then ends the process.
#include <atomic>
#include <cstdlib>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "fake_executor.h"
#include "test_bundle.h"
#include "titans/titans.h"

namespace {

constexpr long kNever = -1;
std::atomic<long> allowed{kNever};   // allocations before one fails
std::atomic<bool> all_after{false};  // whether all later ones fail too
std::atomic<bool> failed{false};
std::atomic<long> live{0};

bool refuses() {
  if (allowed.load() == kNever) return false;
  if (allowed.load() == 0) {
    failed = true;
    if (!all_after) allowed = kNever;
    return true;
  }
  --allowed;
  return false;
}

void* get(std::size_t bytes) {
  void* data = refuses() ? nullptr : std::malloc(bytes == 0 ? 1 : bytes);
  if (data == nullptr) throw std::bad_alloc();
  ++live;
  return data;
}

void* get(std::size_t bytes, std::align_val_t alignment) {
  void* data = nullptr;
  if (refuses() || ::posix_memalign(&data, static_cast<std::size_t>(alignment), bytes == 0 ? 1 : bytes) != 0) {
    throw std::bad_alloc();
  }
  ++live;
  return data;
}

void* get_or_null(std::size_t bytes) noexcept {
  void* data = refuses() ? nullptr : std::malloc(bytes == 0 ? 1 : bytes);
  if (data != nullptr) ++live;
  return data;
}

void give_back(void* data) noexcept {
  if (data != nullptr) --live;
  std::free(data);
}

}  // namespace

void* operator new(std::size_t bytes) { return get(bytes); }
void* operator new[](std::size_t bytes) { return get(bytes); }
void* operator new(std::size_t bytes, std::align_val_t alignment) { return get(bytes, alignment); }
void* operator new[](std::size_t bytes, std::align_val_t alignment) { return get(bytes, alignment); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return get_or_null(bytes); }
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept { return get_or_null(bytes); }
void operator delete(void* data, const std::nothrow_t&) noexcept { give_back(data); }
void operator delete[](void* data, const std::nothrow_t&) noexcept { give_back(data); }
void operator delete(void* data) noexcept { give_back(data); }
void operator delete[](void* data) noexcept { give_back(data); }
void operator delete(void* data, std::size_t) noexcept { give_back(data); }
void operator delete[](void* data, std::size_t) noexcept { give_back(data); }
void operator delete(void* data, std::align_val_t) noexcept { give_back(data); }
void operator delete[](void* data, std::align_val_t) noexcept { give_back(data); }
void operator delete(void* data, std::size_t, std::align_val_t) noexcept { give_back(data); }
void operator delete[](void* data, std::size_t, std::align_val_t) noexcept { give_back(data); }

namespace titans::test {
namespace {

constexpr std::size_t kVocab = 8;

// The text of the last error is an allocation of its own, so both counts are taken after the same error.
long count_live() {
  EXPECT_NE(titans_stream_reset(nullptr), TITANS_OK);
  return live;
}

// In a session with or without a budget, so that streams are spilled and restored within the calls.
class Allocations : public testing::TestWithParam<std::tuple<int, bool>> {
 protected:
  Allocations() {
    std::filesystem::copy(FAKE_BACKEND, folder_.path() / "libtitans_backend_onnxruntime.so");
    std::filesystem::create_directory(bundle_);
    std::filesystem::create_directory(spill_);
    write_bundle(bundle_);
    options_.struct_size = sizeof(options_);
    options_.plugin_dir = folder_.path().c_str();
    options_.batch_threads = 1;  // so that each run allocates alike
    options_.memory_budget = static_cast<std::uint64_t>(std::get<0>(GetParam()));
    options_.spill_dir = options_.memory_budget > 0 ? spill_.c_str() : nullptr;
    EXPECT_EQ(titans_session_open(bundle_.c_str(), &options_, &session_), TITANS_OK) << titans_last_error();
    for (titans_stream*& stream : streams_) EXPECT_EQ(titans_stream_create(session_, &stream), TITANS_OK);
    for (titans_stream* stream : streams_) feed(stream, {3, 1, 4}, nullptr);
  }
  ~Allocations() override {
    for (titans_stream* stream : streams_) titans_stream_destroy(stream);
    titans_session_close(session_);
  }

  static void feed(titans_stream* stream, const std::vector<std::int32_t>& tokens, float* logits) {
    const titans_output which = logits == nullptr ? TITANS_OUTPUT_NONE : TITANS_OUTPUT_ALL;
    ASSERT_EQ(titans_stream_feed(stream, tokens.data(), tokens.size(), which, logits, tokens.size() * kVocab),
              TITANS_OK);
  }

  // Makes `call` with a failing allocation, from the first to the last. `check` runs after each failure, `undo` after
  // each success. A call may do without memory that it only would like to have.
  void each(
      const char* name, const std::function<titans_status()>& call, const std::function<void()>& check,
      const std::function<void()>& undo = [] {}) {
    ASSERT_EQ(call(), TITANS_OK) << name << titans_last_error();  // makes what stays, such as threads and workspaces
    undo();
    int failures = 0;
    for (long count = 0;; ++count) {
      const long before = count_live();
      failed = false;
      all_after = std::get<1>(GetParam());
      allowed = count;
      const titans_status status = call();
      allowed = kNever;
      if (status == TITANS_OK) {
        undo();
        if (!failed) break;
        continue;
      }
      ++failures;
      ASSERT_TRUE(failed) << name << ": " << titans_last_error();
      ASSERT_EQ(status, TITANS_FAILED) << name << " " << count << ": " << titans_last_error();
      ASSERT_EQ(count_live() - before, 0) << name << " " << count;
      check();
      ASSERT_LT(count, 100'000) << name;
    }
    RecordProperty(name, failures);
  }

  // The stream is at the position of the fixture, with its state: that of a stream that had no failures.
  void expect_unchanged() {
    for (titans_stream* stream : streams_) ASSERT_EQ(titans_stream_position(stream), 3U);
  }
  void expect_same_continuation() {
    const std::vector<float> expected = expected_logits({3, 1, 4, 1, 5, 2, 6});
    for (titans_stream* stream : streams_) {
      std::vector<float> logits(4 * kVocab);
      feed(stream, {1, 5, 2, 6}, logits.data());
      EXPECT_TRUE(std::equal(logits.begin(), logits.end(), expected.begin() + 3 * kVocab));
    }
  }

  TemporaryFolder folder_;
  const std::filesystem::path bundle_ = folder_.path() / "bundle", spill_ = folder_.path() / "spill";
  titans_session_options options_{};
  titans_session* session_ = nullptr;
  std::vector<titans_stream*> streams_{4, nullptr};
};

INSTANTIATE_TEST_SUITE_P(Budgets, Allocations, testing::Combine(testing::Values(0), testing::Bool()),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param) > 0 ? "Spilled" : "InMemory") +
                                  (std::get<1>(info.param) ? "AndAllLater" : "");
                         });

TEST_P(Allocations, FeedingOneStream) {
  titans_stream* stream = streams_[0];
  std::vector<float> logits(6 * kVocab);
  const std::int32_t tokens[] = {1, 2, 3, 4, 5, 6};
  std::uint64_t marked = 0;
  ASSERT_EQ(titans_stream_mark(stream, &marked), TITANS_OK);
  const auto unchanged = [&] { expect_unchanged(); };
  titans_stream* made = nullptr;
  const auto none = [&] {
    ASSERT_EQ(made, nullptr);
    expect_unchanged();
  };
  each(
      "stream_create", [&] { return titans_stream_create(session_, &made); }, none,
      [&] { titans_stream_destroy(made); });
  each("stream_fork", [&] { return titans_stream_fork(stream, &made); }, none, [&] { titans_stream_destroy(made); });
  const auto rewind = [&] { ASSERT_EQ(titans_stream_rewind(stream, marked), TITANS_OK); };
  each(
      "stream_feed",
      [&] { return titans_stream_feed(stream, tokens, 6, TITANS_OUTPUT_ALL, logits.data(), logits.size()); }, unchanged,
      rewind);
  each("stream_step", [&] { return titans_stream_step(stream, 2, logits.data()); }, unchanged, rewind);
  each("stream_score", [&] { return titans_stream_score(stream, tokens, 6, logits.data()); }, unchanged, rewind);
  each("stream_rewind", [&] { return titans_stream_rewind(stream, marked); }, unchanged);
  std::uint64_t positions[4];
  std::size_t count = 0;
  each("stream_marks", [&] { return titans_stream_marks(stream, positions, 4, &count); }, unchanged);
  ASSERT_EQ(titans_stream_unmark(stream, marked), TITANS_OK);
  each(
      "stream_mark", [&] { return titans_stream_mark(stream, &marked); },
      [&] {
        ASSERT_EQ(titans_stream_marks(stream, nullptr, 0, &count), TITANS_OK);
        ASSERT_EQ(count, 0U);
      },
      [&] { ASSERT_EQ(titans_stream_unmark(stream, marked), TITANS_OK); });
  titans_guard guard;
  titans_guard_init(&guard);
  each("stream_set_guard", [&] { return titans_stream_set_guard(stream, &guard); }, unchanged);
  ASSERT_EQ(titans_stream_mark(stream, &marked), TITANS_OK);
  each(
      "guarded stream_feed", [&] { return titans_stream_feed(stream, tokens, 6, TITANS_OUTPUT_NONE, nullptr, 0); },
      unchanged, rewind);
  titans_guard_report report{};
  report.struct_size = sizeof(report);
  each("stream_guard_report", [&] { return titans_stream_guard_report(stream, &report); }, unchanged);
  each("stream_memory_read", [&] { return titans_stream_memory_read(stream, 0, logits.data(), 2); }, unchanged);
  titans_generator* generator = nullptr;
  titans_sampling sampling;
  titans_sampling_init(&sampling);
  const std::int32_t stop[] = {7};
  sampling.stop_tokens = stop;
  sampling.stop_count = 1;
  sampling.top_k = 3;
  each(
      "generator_create", [&] { return titans_generator_create(stream, &sampling, &generator); },
      [&] { ASSERT_EQ(generator, nullptr); }, [&] { titans_generator_destroy(generator); });
  ASSERT_EQ(titans_generator_create(stream, &sampling, &generator), TITANS_OK);
  std::int32_t token = 0;
  int done = 0;
  each("generator_next", [&] { return titans_generator_next(generator, &token, &done); }, unchanged, rewind);
  titans_generator_destroy(generator);
  expect_same_continuation();
}

TEST_P(Allocations, Batches) {
  std::vector<std::uint64_t> marked(streams_.size());
  for (std::size_t i = 0; i < streams_.size(); ++i) {
    ASSERT_EQ(titans_stream_mark(streams_[i], &marked[i]), TITANS_OK);
  }
  // Streams of a batch fail one by one; those that did not have continued.
  std::vector<titans_status> statuses(streams_.size());
  const auto as_told = [&](std::uint64_t more) {
    for (std::size_t i = 0; i < streams_.size(); ++i) {
      ASSERT_EQ(titans_stream_position(streams_[i]), statuses[i] == TITANS_OK ? 3 + more : 3);
      if (statuses[i] != TITANS_OK) continue;
      ASSERT_EQ(titans_stream_rewind(streams_[i], marked[i]), TITANS_OK);
    }
  };
  const std::int32_t tokens[] = {1, 2, 3, 4, 5, 6};
  std::vector<titans_feed> items;
  for (titans_stream* stream : streams_) {
    items.push_back({sizeof(titans_feed), stream, tokens, nullptr, 6, TITANS_OUTPUT_NONE, nullptr, 0});
  }
  each(
      "session_feed_batch",
      [&] { return titans_session_feed_batch(session_, items.data(), items.size(), statuses.data()); },
      [&] { as_told(6); }, [&] { as_told(6); });
  std::vector<float> logits(streams_.size() * kVocab);
  each(
      "session_step_batch",
      [&] {
        return titans_session_step_batch(session_, streams_.data(), tokens, streams_.size(), logits.data(),
                                         statuses.data());
      },
      [&] { as_told(1); }, [&] { as_told(1); });
  std::size_t size = 0;
  each("session_metrics_text", [&] { return titans_session_metrics_text(session_, nullptr, 0, &size); }, [] {});
  expect_same_continuation();
}

}  // namespace
}  // namespace titans::test
