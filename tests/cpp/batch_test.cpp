// Many streams in one call: each behaves as if it were alone, whatever happens to the others.
#include "stream/batch.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include <gtest/gtest.h>

#include "fake_executor.h"
#include "test_bundle.h"
#include "titans/titans.hpp"

namespace titans::test {
namespace {

using core::BatchItem;
using core::Failure;
using Tokens = std::vector<std::int32_t>;

constexpr std::size_t kVocab = kFakeVocab;

Tokens tokens_of(std::size_t stream, std::size_t count) {
  Tokens tokens;
  for (std::size_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<std::int32_t>((3 * stream + 5 * i + i * i) % kVocab));
  }
  return tokens;
}

std::vector<float> rows(const std::vector<float>& logits, std::size_t begin, std::size_t end) {
  return {logits.begin() + static_cast<std::ptrdiff_t>(begin * kVocab),
          logits.begin() + static_cast<std::ptrdiff_t>(end * kVocab)};
}

class BatchTest : public testing::TestWithParam<int> {
 protected:
  BatchTest() {
    write_bundle(folder_.path());
    core::SessionOptions options;
    options.batch_threads = GetParam();
    session_ = open_fake_session(folder_.path(), control_, options);
  }

  std::vector<std::unique_ptr<core::Stream>> make_streams(std::size_t count) const {
    std::vector<std::unique_ptr<core::Stream>> streams;
    for (std::size_t i = 0; i < count; ++i) streams.push_back(std::make_unique<core::Stream>(session_));
    return streams;
  }

  static BatchItem item(core::Stream& stream, const Tokens& tokens, std::vector<float>& logits) {
    logits.assign(tokens.size() * kVocab, 0.0F);
    return {&stream, tokens.data(), nullptr, tokens.size(), TITANS_OUTPUT_ALL, logits.data(), logits.size()};
  }

  TemporaryFolder folder_;
  FakeControl control_;
  std::shared_ptr<core::Session> session_;
};

INSTANTIATE_TEST_SUITE_P(Threads, BatchTest, testing::Values(1, 2, 5));

TEST_P(BatchTest, StreamsJoinAndLeaveAtAnyPosition) {
  constexpr std::size_t kStreams = 7;
  const auto streams = make_streams(kStreams);
  std::vector<std::size_t> done(kStreams, 0);
  for (std::size_t round = 0; round < 20; ++round) {
    std::vector<BatchItem> items;
    std::vector<Tokens> fed(kStreams);
    std::vector<std::vector<float>> logits(kStreams);
    for (std::size_t i = 0; i < kStreams; ++i) {
      const std::size_t index = (i * 3 + round) % kStreams;  // any order
      if ((round + index) % 3 == 0) continue;
      const std::size_t count = (round * index) % 6;  // sometimes nothing
      const Tokens all = tokens_of(index, done[index] + count);
      fed[index].assign(all.begin() + static_cast<std::ptrdiff_t>(done[index]), all.end());
      items.push_back(item(*streams[index], fed[index], logits[index]));
      done[index] += count;
    }
    for (const Failure& outcome : run_batch(*session_, items)) ASSERT_EQ(outcome.status, TITANS_OK) << outcome.text;
    for (std::size_t i = 0; i < kStreams; ++i) {
      const std::vector<float> alone = expected_logits(tokens_of(i, done[i]));
      ASSERT_EQ(logits[i], rows(alone, done[i] - fed[i].size(), done[i])) << i;
      ASSERT_EQ(streams[i]->position(), done[i]);
    }
  }
}

TEST_P(BatchTest, OneThatFailsStopsNoOther) {
  const auto streams = make_streams(4);
  std::vector<Tokens> tokens;
  for (std::size_t i = 0; i < 4; ++i) tokens.push_back(tokens_of(i, 3));
  tokens[1][2] = 8;
  std::vector<std::vector<float>> logits(4);
  std::vector<BatchItem> items;
  for (std::size_t i = 0; i < 4; ++i) items.push_back(item(*streams[i], tokens[i], logits[i]));
  items[3].capacity = 1;
  const std::vector<Failure> outcomes = run_batch(*session_, items);
  for (const std::size_t good : {0U, 2U}) {
    EXPECT_EQ(outcomes[good].status, TITANS_OK);
    EXPECT_EQ(logits[good], expected_logits(tokens[good]));
  }
  for (const std::size_t bad : {1U, 3U}) {
    EXPECT_EQ(outcomes[bad].status, TITANS_INVALID_ARGUMENT);
    EXPECT_EQ(streams[bad]->position(), 0U);
    EXPECT_EQ(logits[bad], std::vector<float>(3 * kVocab, 0.0F));
  }
  expect_error(TITANS_INVALID_ARGUMENT, {"2 of 4 streams failed", "stream 1 first", "token 2 in [0, 8)"},
               [&] { require_success(outcomes); });
}

TEST_P(BatchTest, ABackendThatFailsForOne) {
  const auto streams = make_streams(3);
  const Tokens token{5};
  std::vector<std::vector<float>> logits(3);
  std::vector<BatchItem> items;
  for (std::size_t i = 0; i < 3; ++i) items.push_back(item(*streams[i], token, logits[i]));
  control_.fail_at = 1;
  const std::vector<Failure> outcomes = run_batch(*session_, items);
  const auto failed = [](const Failure& outcome) { return outcome.status == TITANS_FAILED; };
  ASSERT_EQ(std::count_if(outcomes.begin(), outcomes.end(), failed), 1);
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(streams[i]->position(), failed(outcomes[i]) ? 0U : 1U);
    items[i] = item(*streams[i], token, logits[i]);
    const Tokens all = failed(outcomes[i]) ? token : Tokens{5, 5};
    EXPECT_EQ(run_batch(*session_, {items[i]})[0].status, TITANS_OK);
    EXPECT_EQ(logits[i], rows(expected_logits(all), all.size() - 1, all.size()));
  }
}

TEST_P(BatchTest, WhatIsRefusedBeforeAnythingRuns) {
  const auto streams = make_streams(3);
  FakeControl other_control;
  const auto other = open_fake_session(folder_.path(), other_control);
  core::Stream stranger(other);
  const Tokens token{5};
  const auto one = [&](core::Stream* stream) {
    return BatchItem{stream, token.data(), nullptr, 1, TITANS_OUTPUT_NONE, nullptr, 0};
  };
  const auto a = one(streams[0].get());
  const auto b = one(streams[1].get());
  const auto refuse = [&](const std::vector<BatchItem>& items, const std::vector<std::string>& words) {
    expect_error(TITANS_INVALID_ARGUMENT, words, [&] { run_batch(*session_, items); });
  };
  refuse({a, b, a}, {"one stream twice", "stream 0 is also stream 2"});
  refuse({a, one(nullptr)}, {"stream 1 is NULL"});
  refuse({a, one(&stranger)}, {"stream 1 belongs to another session"});
  EXPECT_TRUE(control_.calls.empty());
  EXPECT_TRUE(run_batch(*session_, {}).empty());
}

// The two calls wait for each other, so the test ends only if they run at the same time.
TEST(Batch, StreamsRunSideBySide) {
  TemporaryFolder folder;
  write_bundle(folder.path());
  FakeControl control;
  std::mutex mutex;
  std::condition_variable all_there;
  std::size_t there = 0;
  control.before_call = [&] {
    std::unique_lock lock(mutex);
    ++there;
    all_there.notify_all();
    all_there.wait(lock, [&] { return there >= 3; });
  };
  core::SessionOptions options;
  options.batch_threads = 3;
  const auto session = open_fake_session(folder.path(), control, options);
  core::Stream a(session), b(session), c(session);
  const Tokens token{5};
  std::vector<BatchItem> items;
  for (core::Stream* stream : {&a, &b, &c}) {
    items.push_back({stream, token.data(), nullptr, 1, TITANS_OUTPUT_NONE, nullptr, 0});
  }
  for (const Failure& outcome : run_batch(*session, items)) EXPECT_EQ(outcome.status, TITANS_OK);
}

// Through the C interface, on the fake backend.
class BatchCApi : public testing::Test {
 protected:
  BatchCApi() { std::filesystem::copy(FAKE_BACKEND, folder_.path() / "libtitans_backend_onnxruntime.so"); }

  Session open(const nlohmann::json& manifest) const {
    const std::filesystem::path bundle = folder_.path() / "bundle";
    std::filesystem::create_directories(bundle);
    write_bundle(bundle, manifest);
    SessionOptions options;
    options.plugin_dir = folder_.path();
    options.batch_threads = 2;
    return Session(bundle, options);
  }

  static bool last_error_has(const std::string& word) {
    return std::string(titans_last_error()).find(word) != std::string::npos;
  }

  TemporaryFolder folder_;
};

TEST_F(BatchCApi, StepAndFeed) {
  Session session = open(manifest_json());
  Stream a = session.stream(), b = session.stream();
  const std::vector<float> steps = session.step_batch({&a, &b}, {3, 4});
  const std::vector<float> first = expected_logits({3}), second = expected_logits({4});
  EXPECT_EQ(rows(steps, 0, 1), first);
  EXPECT_EQ(rows(steps, 1, 2), second);
  const std::vector<float> last = session.feed_batch({&b, &a}, {{1, 2, 3}, {}});
  EXPECT_EQ(rows(last, 0, 1), rows(expected_logits({4, 1, 2, 3}), 3, 4));
  EXPECT_EQ(rows(last, 1, 2), first);
  EXPECT_TRUE(session.step_batch({}, {}).empty());
  try {
    session.step_batch({&a, &b}, {9, 1});
    ADD_FAILURE() << "no error";
  } catch (const BatchError& error) {
    EXPECT_EQ(error.statuses(), (std::vector<titans_status>{TITANS_INVALID_ARGUMENT, TITANS_OK}));
    EXPECT_EQ(rows(error.outputs(), 1, 2), rows(expected_logits({4, 1, 2, 3, 1}), 4, 5));
    EXPECT_NE(std::string(error.what()).find("1 of 2 streams failed, stream 0"), std::string::npos) << error.what();
  }
  EXPECT_EQ(a.position(), 1U);
  EXPECT_EQ(b.position(), 5U);
}

TEST_F(BatchCApi, BundlesOfVectors) {
  Session session = open(vectors_json());
  Stream a = session.stream();
  EXPECT_THROW(session.step_batch({&a}, {1}), BatchError);
  EXPECT_TRUE(last_error_has("takes vectors"));
  EXPECT_THROW(session.feed_batch({&a}, {}), Error);
}

TEST_F(BatchCApi, WrongArguments) {
  const std::filesystem::path bundle = folder_.path() / "bundle";
  std::filesystem::create_directories(bundle);
  write_bundle(bundle, vectors_json());
  titans_session_options options{};
  options.struct_size = sizeof(options);
  options.plugin_dir = folder_.path().c_str();
  titans_session* session = nullptr;
  ASSERT_EQ(titans_session_open(bundle.c_str(), &options, &session), TITANS_OK) << titans_last_error();
  titans_stream* stream = nullptr;
  ASSERT_EQ(titans_stream_create(session, &stream), TITANS_OK);
  const float vector[]{1, 2};
  const std::int32_t token = 1;
  float output[kFakeOutputs];
  titans_feed items[2]{};
  for (titans_feed& item : items) {
    item = {sizeof(titans_feed), stream, nullptr, vector, 1, TITANS_OUTPUT_LAST, output, kFakeOutputs};
  }
  titans_status statuses[2];
  const auto refused = [&](const titans_feed* first, std::size_t count, const std::string& word) {
    statuses[0] = statuses[1] = TITANS_OK;
    EXPECT_EQ(titans_session_feed_batch(session, first, count, statuses), TITANS_INVALID_ARGUMENT) << word;
    EXPECT_TRUE(last_error_has(word)) << titans_last_error();
    for (std::size_t i = 0; i < count; ++i) EXPECT_EQ(statuses[i], TITANS_INVALID_ARGUMENT) << word;
  };
  refused(nullptr, 1, "NULL");
  refused(items, 2, "one stream twice");
  titans_feed wrong = items[0];
  wrong.struct_size = 8;
  refused(&wrong, 1, "struct_size");
  wrong = items[0];
  wrong.tokens = &token;
  refused(&wrong, 1, "both");
  wrong = items[0];
  wrong.vectors = nullptr;
  refused(&wrong, 1, "tokens of item 0");
  wrong.tokens = &token;
  EXPECT_EQ(titans_session_feed_batch(session, &wrong, 1, nullptr), TITANS_INVALID_ARGUMENT);
  EXPECT_TRUE(last_error_has("takes vectors")) << titans_last_error();
  EXPECT_EQ(titans_session_step_batch(session, &stream, &token, 1, nullptr, nullptr), TITANS_INVALID_ARGUMENT);
  EXPECT_TRUE(last_error_has("takes vectors")) << titans_last_error();
  EXPECT_EQ(titans_session_feed_batch(nullptr, items, 1, nullptr), TITANS_INVALID_ARGUMENT);
  EXPECT_EQ(titans_session_step_batch(session, nullptr, &token, 1, nullptr, nullptr), TITANS_INVALID_ARGUMENT);
  EXPECT_EQ(titans_session_step_batch(session, &stream, nullptr, 1, nullptr, nullptr), TITANS_INVALID_ARGUMENT);
  EXPECT_EQ(titans_session_step_batch(nullptr, nullptr, nullptr, 0, nullptr, nullptr), TITANS_INVALID_ARGUMENT);
  EXPECT_EQ(titans_stream_position(stream), 0U);
  EXPECT_EQ(titans_session_feed_batch(session, items, 1, statuses), TITANS_OK) << titans_last_error();
  EXPECT_EQ(std::vector<float>(output, output + kFakeOutputs), expected_outputs({1, 2}));
  EXPECT_EQ(titans_session_feed_batch(session, nullptr, 0, nullptr), TITANS_OK);
  // Callers compiled against a later version have larger items.
  struct LaterFeed {
    titans_feed feed;
    void* more;
  } later[1]{{items[0], nullptr}};
  later[0].feed.struct_size = sizeof(LaterFeed);
  EXPECT_EQ(titans_session_feed_batch(session, &later[0].feed, 1, nullptr), TITANS_OK) << titans_last_error();
  titans_stream_destroy(stream);
  titans_session_close(session);
}

TEST_F(BatchCApi, OptionsThatAreWrong) {
  const std::filesystem::path bundle = folder_.path() / "bundle";
  std::filesystem::create_directories(bundle);
  write_bundle(bundle, manifest_json());
  const auto refuse = [&](SessionOptions options, const std::string& word) {
    options.plugin_dir = folder_.path();
    try {
      Session session(bundle, options);
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), TITANS_INVALID_ARGUMENT);
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
    }
  };
  SessionOptions options;
  options.batch_threads = -1;
  refuse(options, "batch_threads");
  options = {};
  options.memory_budget = std::uint64_t{1} << 20;
  refuse(options, "spill_dir");
  options.spill_dir = folder_.path() / "nowhere";
  refuse(options, "spill_dir is not a folder");
  options.spill_dir = folder_.path();
  options.memory_budget = 10;
  refuse(options, "at least one stream");
}

}  // namespace
}  // namespace titans::test
