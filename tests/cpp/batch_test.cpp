// Many streams in one call: each behaves as if it were alone, whatever happens to the others.
#include "stream/batch.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>

#include <gtest/gtest.h>

#include "fake_executor.h"
#include "packed_executor.h"
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

struct BatchForm {
  int threads;
  const char* batch;
};

class BatchTest : public testing::TestWithParam<BatchForm> {
 protected:
  BatchTest() {
    write_bundle(folder_.path());
    core::SessionOptions options;
    options.batch_threads = GetParam().threads;
    options.batch = GetParam().batch;
    if (grouped()) {
      control_.in_place = {true, true};
      control_.most_streams = 3;
    }
    session_ = open_fake_session(folder_.path(), control_, options);
  }

  static bool grouped() { return GetParam().batch == std::string("fast"); }

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

INSTANTIATE_TEST_SUITE_P(Threads, BatchTest,
                         testing::Values(BatchForm{1, "exact"}, BatchForm{2, "exact"}, BatchForm{5, "exact"},
                                         BatchForm{1, "fast"}, BatchForm{3, "fast"}),
                         [](const auto& info) { return info.param.batch + std::to_string(info.param.threads); });

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
  // A call of several streams that fails is made again for each stream.
  ASSERT_EQ(std::count_if(outcomes.begin(), outcomes.end(), failed), grouped() ? 0 : 1);
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

TEST_P(BatchTest, AStreamWhoseInputFailsTheCallFailsAlone) {
  control_.poison = 6;
  const auto streams = make_streams(4);
  const std::vector<Tokens> tokens{{1, 2, 3, 4, 5}, {1, 2, 6, 4, 5}, {7, 7, 7, 7, 7}, {1}};
  std::vector<std::vector<float>> logits(4);
  std::vector<BatchItem> items;
  for (std::size_t i = 0; i < 4; ++i) items.push_back(item(*streams[i], tokens[i], logits[i]));
  const std::vector<Failure> outcomes = run_batch(*session_, items);
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(outcomes[i].status, i == 1 ? TITANS_FAILED : TITANS_OK) << outcomes[i].text;
    EXPECT_EQ(streams[i]->position(), i == 1 ? 0U : tokens[i].size());
    if (i != 1) {
      EXPECT_EQ(logits[i], expected_logits(tokens[i])) << i;
    }
  }
  EXPECT_EQ(session_->metrics().failed.value(), 1U);
  EXPECT_EQ(session_->metrics().tokens.value(), 11U);
  items[1] = item(*streams[1], tokens[0], logits[1]);
  EXPECT_EQ(run_batch(*session_, {items[1]})[0].status, TITANS_OK);
  EXPECT_EQ(logits[1], expected_logits(tokens[0]));
}

TEST_P(BatchTest, AStreamThatIsCancelledOrInUseStopsNoOther) {
  const auto streams = make_streams(4);
  const Tokens tokens = tokens_of(2, 9);
  const auto stop = [](void*, std::uint64_t done, std::uint64_t) { return done > 4 ? 1 : 0; };
  streams[1]->set_progress(stop, nullptr);
  const core::Stream::ExclusiveUse used(*streams[2]);
  std::vector<std::vector<float>> logits(4);
  std::vector<BatchItem> items;
  for (std::size_t i = 0; i < 4; ++i) items.push_back(item(*streams[i], tokens, logits[i]));
  const std::vector<Failure> outcomes = run_batch(*session_, items);
  EXPECT_EQ(outcomes[1].status, TITANS_CANCELLED);
  EXPECT_EQ(outcomes[2].status, TITANS_INVALID_ARGUMENT);
  for (const std::size_t i : {1U, 2U}) EXPECT_EQ(streams[i]->position(), 0U);
  for (const std::size_t i : {0U, 3U}) {
    EXPECT_EQ(outcomes[i].status, TITANS_OK);
    EXPECT_EQ(logits[i], expected_logits(tokens));
  }
}

// Sessions whose calls take three streams.
class GroupTest : public testing::Test {
 protected:
  using Calls = std::vector<std::pair<std::size_t, std::size_t>>;
  static constexpr std::size_t kPrefill = 0, kChunk = 1, kDecode = 2;  // the manifest's graphs: 4, 2 and 1 tokens

  GroupTest() {
    write_bundle(folder_.path());
    control_.in_place = {true, true};
    control_.most_streams = 3;
  }

  std::shared_ptr<core::Session> open(int threads = 1, std::uint64_t budget = 0) {
    core::SessionOptions options;
    options.batch = "fast";
    options.batch_threads = threads;
    options.memory_budget = budget;
    if (budget > 0) options.spill_dir = folder_.path();
    return open_fake_session(folder_.path(), control_, options);
  }

  // Feeds the stream i so many tokens of its sequence.
  static std::vector<BatchItem> items_of(const std::vector<std::unique_ptr<core::Stream>>& streams,
                                         const std::vector<std::size_t>& counts, std::vector<Tokens>& tokens,
                                         std::vector<std::vector<float>>& logits) {
    std::vector<BatchItem> items;
    tokens.resize(streams.size());
    logits.resize(streams.size());
    for (std::size_t i = 0; i < streams.size(); ++i) {
      const auto position = static_cast<std::ptrdiff_t>(streams[i]->position());
      const Tokens all = tokens_of(i, static_cast<std::size_t>(position) + counts[i]);
      tokens[i].assign(all.begin() + position, all.end());
      logits[i].assign(counts[i] * kVocab, 0.0F);
      items.push_back({streams[i].get(), tokens[i].data(), nullptr, counts[i], TITANS_OUTPUT_ALL, logits[i].data(),
                       logits[i].size()});
    }
    return items;
  }

  // Feeds each stream and compares its logits with those of a stream alone.
  Calls feed(core::Session& session, const std::vector<std::unique_ptr<core::Stream>>& streams,
             const std::vector<std::size_t>& counts) {
    std::vector<Tokens> tokens;
    std::vector<std::vector<float>> logits;
    const std::vector<BatchItem> items = items_of(streams, counts, tokens, logits);
    control_.together.clear();
    for (const Failure& outcome : run_batch(session, items)) EXPECT_EQ(outcome.status, TITANS_OK) << outcome.text;
    for (std::size_t i = 0; i < streams.size(); ++i) {
      const std::size_t end = streams[i]->position();
      EXPECT_EQ(logits[i], rows(expected_logits(tokens_of(i, end)), end - counts[i], end)) << i;
    }
    return control_.together;
  }

  static std::vector<std::unique_ptr<core::Stream>> make_streams(const std::shared_ptr<core::Session>& session,
                                                                 std::size_t count) {
    std::vector<std::unique_ptr<core::Stream>> streams;
    for (std::size_t i = 0; i < count; ++i) streams.push_back(std::make_unique<core::Stream>(session));
    return streams;
  }

  TemporaryFolder folder_;
  FakeControl control_;
};

TEST_F(GroupTest, StreamsThatNeedOneGraphShareACall) {
  const auto session = open();
  const auto streams = make_streams(session, 5);
  EXPECT_EQ(feed(*session, streams, {1, 1, 1, 1, 1}), (Calls{{kDecode, 2}, {kDecode, 3}}));
  EXPECT_EQ(feed(*session, streams, {0, 1, 0, 1, 0}), (Calls{{kDecode, 2}}));
  // Streams at other positions need other graphs.
  EXPECT_EQ(feed(*session, streams, {1, 2, 0, 6, 0}), (Calls{{kChunk, 1}, {kDecode, 1}, {kPrefill, 1}, {kChunk, 1}}));
  const nlohmann::json info = nlohmann::json::parse(session->info());
  EXPECT_EQ(info["batch"], (nlohmann::json{{"mode", "fast"}, {"streams_per_call", 3}}));
}

TEST_F(GroupTest, APromptThatForksShareIsFedOnce) {
  const auto session = open();
  Calls alone = feed(*session, make_streams(session, 1), {13});
  auto streams = make_streams(session, 1);
  EXPECT_EQ(feed(*session, streams, {13}), alone);
  control_.together.clear();
  while (streams.size() < 6) streams.push_back(streams[0]->fork());
  EXPECT_TRUE(control_.together.empty());
  // All continue from the state after the prompt.
  const Tokens all = tokens_of(0, 14), last{all.back()};
  std::vector<std::vector<float>> logits(streams.size());
  std::vector<BatchItem> items;
  for (std::size_t i = 0; i < streams.size(); ++i) {
    logits[i].assign(kVocab, 0.0F);
    items.push_back({streams[i].get(), last.data(), nullptr, 1, TITANS_OUTPUT_ALL, logits[i].data(), kVocab});
  }
  for (const Failure& outcome : run_batch(*session, items)) EXPECT_EQ(outcome.status, TITANS_OK) << outcome.text;
  for (const std::vector<float>& row : logits) EXPECT_EQ(row, rows(expected_logits(all), 13, 14));
  EXPECT_EQ(control_.together, (Calls{{kDecode, 3}, {kDecode, 3}}));
  EXPECT_EQ(session->metrics().tokens.value(), 2 * 13 + 6U);
}

TEST_F(GroupTest, ADecodingStreamWaitsForOneLongCallPerRound) {
  const auto session = open();
  const auto streams = make_streams(session, 6);
  EXPECT_EQ(feed(*session, streams, {1, 0, 0, 0, 0, 0}), (Calls{{kDecode, 1}}));
  // One decoding stream beside five prompts: the prompts that waited come next.
  EXPECT_EQ(feed(*session, streams, {1, 4, 4, 4, 4, 4}), (Calls{{kPrefill, 3}, {kDecode, 1}, {kPrefill, 2}}));
}

TEST_F(GroupTest, ThreadsShareALargeGroup) {
  control_.most_streams = 64;
  const auto session = open(2);
  const auto streams = make_streams(session, 40);
  Calls calls = feed(*session, streams, std::vector<std::size_t>(40, 1));
  EXPECT_EQ(calls, (Calls{{kDecode, 20}, {kDecode, 20}}));
  EXPECT_EQ(feed(*session, make_streams(session, 6), std::vector<std::size_t>(6, 4)),
            (Calls{{kPrefill, 3}, {kPrefill, 3}}));
  EXPECT_EQ(feed(*session, make_streams(session, 3), std::vector<std::size_t>(3, 4)), (Calls{{kPrefill, 3}}));
}

TEST_F(GroupTest, StreamsBeyondThePoolsRunAlone) {
  control_.slots = 2;
  const auto session = open();
  const auto streams = make_streams(session, 4);
  EXPECT_EQ(feed(*session, streams, {1, 1, 1, 1}), (Calls{{kDecode, 1}, {kDecode, 1}, {kDecode, 2}}));
}

TEST_F(GroupTest, OneStreamPerCallIsExact) {
  control_.most_streams = 1;
  const auto session = open();
  EXPECT_FALSE(session->groups_batches());
  const auto streams = make_streams(session, 3);
  EXPECT_EQ(feed(*session, streams, {2, 2, 1}).size(), 3U);
}

TEST_F(GroupTest, ABatchBeyondTheBudgetRunsInParts) {
  constexpr std::uint64_t kBytes = 2 * 20 + kVocab * 4;
  const auto session = open(2, 2 * kBytes);
  const auto streams = make_streams(session, 7);
  for (std::size_t round = 0; round < 3; ++round) {
    for (const auto& [graph, count] : feed(*session, streams, {3, 1, 5, 4, 2, 0, 1})) EXPECT_LE(count, 2U);
    EXPECT_LE(session->metrics().resident_bytes.value(), 2 * kBytes);
  }
}

// A stream of a random program, and the same stream in a session of its own that runs every call alone.
struct Twins {
  std::unique_ptr<core::Stream> grouped, alone;
};

TEST(GroupedPrograms, EveryStreamIsAsIfItWereAlone) {
  for (const std::uint32_t seed : {1U, 2U, 3U}) {
    std::mt19937 random(seed);
    const auto below = [&](std::size_t limit) { return static_cast<std::size_t>(random() % limit); };
    TemporaryFolder bundle, spill;
    write_packed_bundle(bundle.path());
    PackedControl grouped_control, alone_control;
    for (PackedControl* control : {&grouped_control, &alone_control}) {
      control->in_place = {true, true, true};
      control->surprising = {{7, 1e5F}, {6, std::nanf("")}};
    }
    grouped_control.most_streams = 5;
    const titans_guard limits{
        sizeof(titans_guard), TITANS_GUARD_SKIP, 1e3F, std::numeric_limits<float>::infinity(), 0, 1};
    core::SessionOptions options;
    options.batch_threads = 1;
    const auto alone = open_packed_session(bundle.path(), alone_control, options);
    options.batch = "fast";
    options.memory_budget = 10 * core::Stream(alone).state_bytes();
    options.spill_dir = spill.path();
    const auto grouped = open_packed_session(bundle.path(), grouped_control, options);
    std::vector<Twins> twins;
    const auto both = [&](Twins& one, const auto& action) {
      for (core::Stream* stream : {one.grouped.get(), one.alone.get()}) {
        const core::Stream::Use use(*stream);
        action(*stream);
      }
    };
    while (twins.size() < 16) {
      twins.push_back({std::make_unique<core::Stream>(grouped), std::make_unique<core::Stream>(alone)});
      if (twins.size() % 3 == 0) both(twins.back(), [&](core::Stream& stream) { stream.set_guard(limits); });
    }
    std::size_t failures = 0;
    for (int round = 0; round < 60; ++round) {
      std::vector<std::size_t> chosen(twins.size());
      std::iota(chosen.begin(), chosen.end(), std::size_t{0});
      std::shuffle(chosen.begin(), chosen.end(), random);
      chosen.resize(1 + below(chosen.size()));
      std::vector<Tokens> tokens(chosen.size());
      std::vector<std::vector<float>> logits(chosen.size());
      std::vector<BatchItem> items;
      for (std::size_t i = 0; i < chosen.size(); ++i) {
        constexpr std::size_t kCounts[]{0, 1, 1, 3, 4, 5, 17};
        tokens[i].resize(kCounts[below(std::size(kCounts))]);
        // 6 and 7 violate a guard's limits. 8 is refused.
        for (std::int32_t& token : tokens[i]) {
          token = static_cast<std::int32_t>(below(40) == 0 ? 6 + below(3) : below(6));
        }
        logits[i].assign(tokens[i].size() * kVocab, 0.0F);
        items.push_back({twins[chosen[i]].grouped.get(), tokens[i].data(), nullptr, tokens[i].size(), TITANS_OUTPUT_ALL,
                         logits[i].data(), logits[i].size()});
      }
      const std::vector<Failure> outcomes = run_batch(*grouped, items);
      for (std::size_t i = 0; i < chosen.size(); ++i) {
        core::Stream& stream = *twins[chosen[i]].alone;
        std::vector<float> expected(logits[i].size());
        std::vector<BatchItem> one{items[i]};
        one[0].stream = &stream;
        one[0].output = expected.data();
        const Failure outcome = run_batch(*alone, one)[0];
        ASSERT_EQ(outcomes[i].status, outcome.status) << seed << " " << round << outcomes[i].text << outcome.text;
        ASSERT_EQ(twins[chosen[i]].grouped->position(), stream.position());
        ASSERT_EQ(twins[chosen[i]].grouped->learning(), stream.learning());
        failures += outcome.status == TITANS_OK ? 0 : 1;
        if (outcome.status != TITANS_OK || expected.empty()) continue;
        ASSERT_EQ(std::memcmp(logits[i].data(), expected.data(), expected.size() * sizeof(float)), 0)
            << seed << " " << round << " " << i;
      }
      Twins& one = twins[below(twins.size())];
      Twins& other = twins[below(twins.size())];
      switch (below(8)) {
        case 0:
          both(one, [](core::Stream& stream) { stream.reset(); });
          break;
        case 1:
          both(one, [](core::Stream& stream) { stream.mark(); });
          break;
        case 2:
          if (!one.alone->marks().empty()) {
            const std::uint64_t mark = one.alone->marks().front();
            both(one, [&](core::Stream& stream) { stream.rewind(mark); });
          }
          break;
        case 3:
          both(one, [](core::Stream& stream) { stream.set_learning(!stream.learning()); });
          break;
        case 4:
          if (&one != &other) {
            Twins forks;
            both(one, [&](core::Stream& stream) {
              (forks.grouped == nullptr ? forks.grouped : forks.alone) = stream.fork();
            });
            other = std::move(forks);
          }
          break;
        case 5: {
          core::StreamState saved;
          both(one, [&](core::Stream& stream) { saved = stream.state(); });
          other = {std::make_unique<core::Stream>(grouped, saved), std::make_unique<core::Stream>(alone, saved)};
          break;
        }
        case 6:
          other = {std::make_unique<core::Stream>(grouped), std::make_unique<core::Stream>(alone)};
          break;
        default:
          break;
      }
    }
    EXPECT_GT(failures, 0U);
    EXPECT_GT(grouped->metrics().spilled.value(), 0U);
    EXPECT_GT(grouped->metrics().rollbacks.value(), 0U);
    EXPECT_EQ(grouped->metrics().tokens.value(), alone->metrics().tokens.value());
  }
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
  options = {};
  options.batch = "quick";
  refuse(options, "unknown batch");
}

}  // namespace
}  // namespace titans::test
