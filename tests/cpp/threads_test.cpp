// One session in many threads, also built with the thread sanitizer. Streams never see data of other streams.
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "base/thread_pool.h"
#include "fake_executor.h"
#include "state/state_file.h"
#include "stream/batch.h"
#include "stream/stream.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

using core::Stream;
using Tokens = std::vector<std::int32_t>;

constexpr std::size_t kVocab = kFakeVocab;
constexpr std::uint64_t kStreamBytes = 3 * 20 + kVocab * 4;  // as in spill_test.cpp

Tokens random_tokens(unsigned seed, std::size_t count) {
  std::mt19937 random(seed);
  Tokens tokens;
  for (std::size_t i = 0; i < count; ++i) tokens.push_back(static_cast<std::int32_t>(random() % kVocab));
  return tokens;
}

std::vector<float> feed(Stream& stream, const Tokens& tokens) {
  const Stream::Use use(stream);
  std::vector<float> logits(tokens.size() * kVocab);
  stream.feed(tokens.data(), tokens.size(), TITANS_OUTPUT_ALL, logits.data(), logits.size());
  return logits;
}

void append(std::vector<float>& all, const std::vector<float>& more) {
  all.insert(all.end(), more.begin(), more.end());
}

class ThreadsTest : public testing::TestWithParam<std::uint64_t> {
 protected:
  ThreadsTest() {
    write_bundle(bundle_.path());
    core::SessionOptions options;
    options.batch_threads = 3;
    options.memory_budget = GetParam() * kStreamBytes;
    options.spill_dir = spill_.path();
    session_ = open_fake_session(bundle_.path(), control_, options);
  }

  static void run_threads(unsigned count, const std::function<void(unsigned)>& body) {
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < count; ++thread) threads.emplace_back(body, thread);
    for (std::thread& thread : threads) thread.join();
  }

  TemporaryFolder bundle_, spill_;
  FakeControl control_;
  std::shared_ptr<core::Session> session_;
};

INSTANTIATE_TEST_SUITE_P(Budgets, ThreadsTest, testing::Values(0, 3), [](const auto& info) {
  return info.param == 0 ? std::string("None") : "Streams" + std::to_string(info.param);
});

// Each thread has its own streams, makes and drops others, forks, and makes calls that need no state.
TEST_P(ThreadsTest, EachWithStreamsOfItsOwn) {
  run_threads(4, [&](unsigned thread) {
    constexpr std::size_t kStreams = 3, kRounds = 6;
    std::vector<std::unique_ptr<Stream>> streams;
    std::vector<std::vector<float>> logits(kStreams);
    for (std::size_t i = 0; i < kStreams; ++i) streams.push_back(std::make_unique<Stream>(session_));
    for (std::size_t round = 0; round < kRounds; ++round) {
      for (std::size_t i = 0; i < kStreams; ++i) {
        const Tokens all = random_tokens(thread * 100 + static_cast<unsigned>(i), 2 * kRounds);
        const auto at = all.begin() + static_cast<std::ptrdiff_t>(2 * round);
        append(logits[i], feed(*streams[i], Tokens(at, at + 2)));
        EXPECT_EQ(streams[i]->position(), 2 * round + 2);
        EXPECT_EQ(streams[i]->state_bytes(), kStreamBytes);
      }
      Stream passing(session_);
      feed(passing, {1, 2});
      std::unique_ptr<Stream> twin;
      {
        const Stream::Use use(*streams[round % kStreams]);
        twin = streams[round % kStreams]->fork();
      }
      streams[round % kStreams] = std::move(twin);
      streams[round % kStreams]->set_learning(true);
    }
    for (std::size_t i = 0; i < kStreams; ++i) {
      EXPECT_EQ(logits[i], expected_logits(random_tokens(thread * 100 + static_cast<unsigned>(i), 2 * kRounds)));
    }
  });
  EXPECT_EQ(session_->metrics().streams.value(), 0U);
  EXPECT_EQ(session_->metrics().resident_bytes.value(), 0U);
  EXPECT_EQ(session_->metrics().state_bytes.value(), 0U);
}

TEST_P(ThreadsTest, BatchesOfSeveralThreads) {
  std::atomic<bool> done{false};
  std::thread watcher([&] {
    while (!done) {
      titans_metrics metrics{};
      metrics.struct_size = sizeof(metrics);
      session_->metrics().read(&metrics);
      std::this_thread::yield();
    }
  });
  run_threads(3, [&](unsigned thread) {
    constexpr std::size_t kStreams = 4, kTokens = 8;
    std::vector<std::unique_ptr<Stream>> streams;
    std::vector<std::vector<float>> logits(kStreams);
    for (std::size_t i = 0; i < kStreams; ++i) streams.push_back(std::make_unique<Stream>(session_));
    for (std::size_t t = 0; t < kTokens; ++t) {
      std::vector<Tokens> tokens;
      std::vector<float> rows(kStreams * kVocab);
      for (std::size_t i = 0; i < kStreams; ++i) {
        tokens.push_back({random_tokens(thread * 100 + static_cast<unsigned>(i), kTokens)[t]});
      }
      std::vector<core::BatchItem> items;
      for (std::size_t i = 0; i < kStreams; ++i) {
        items.push_back(
            {streams[i].get(), tokens[i].data(), nullptr, 1, TITANS_OUTPUT_LAST, &rows[i * kVocab], kVocab});
      }
      for (const core::Failure& outcome : run_batch(*session_, items)) EXPECT_EQ(outcome.status, TITANS_OK);
      for (std::size_t i = 0; i < kStreams; ++i) {
        logits[i].insert(logits[i].end(), &rows[i * kVocab], &rows[i * kVocab] + kVocab);
      }
    }
    for (std::size_t i = 0; i < kStreams; ++i) {
      EXPECT_EQ(logits[i], expected_logits(random_tokens(thread * 100 + static_cast<unsigned>(i), kTokens)));
    }
  });
  done = true;
  watcher.join();
}

// A stream among hundreds that misbehave: NaN states, failures, resets, forks, loaded states, and closing.
TEST_P(ThreadsTest, NoBitOfAnothers) {
  constexpr std::size_t kNeighbours = 240, kRounds = 4, kWatched = 3;
  std::vector<std::unique_ptr<Stream>> watched, neighbours;
  std::vector<std::vector<float>> logits(kWatched);
  for (std::size_t i = 0; i < kWatched; ++i) watched.push_back(std::make_unique<Stream>(session_));
  for (std::size_t i = 0; i < kNeighbours; ++i) neighbours.push_back(std::make_unique<Stream>(session_));
  std::mt19937 random(5);
  for (std::size_t round = 0; round < kRounds; ++round) {
    for (std::size_t i = 0; i < 30; ++i) {
      std::unique_ptr<Stream>& one = neighbours[random() % kNeighbours];
      std::unique_ptr<Stream> other;
      switch (random() % 5) {
        case 0: {
          const Stream::Use use(*one);
          core::StreamState state = one->state();
          for (core::Bytes& tensor : state.tensors) {
            for (std::size_t at = 0; at < tensor.size(); at += sizeof(float)) {
              const float nan = std::nanf("");
              std::memcpy(tensor.data() + at, &nan, sizeof(nan));
            }
          }
          state.position = 1 + random() % 1000;
          one->set_state(state);
          break;
        }
        case 1: {
          const Stream::Use use(*one);
          one->reset();
          break;
        }
        case 2: {
          const Stream::Use use(*one);
          other = one->fork();
          break;
        }
        case 3: {
          const Stream::Use use(*one);
          other = std::make_unique<Stream>(session_, one->state());
          break;
        }
        default:
          other = std::make_unique<Stream>(session_);
      }
      if (other != nullptr) one = std::move(other);  // the previous one is closed here
    }
    std::vector<Tokens> tokens;
    std::vector<Stream*> streams;
    for (std::size_t i = 0; i < kNeighbours; ++i) {
      if (i % (kNeighbours / kWatched) == 40) {
        const std::size_t index = i / (kNeighbours / kWatched);
        streams.push_back(watched[index].get());
        const Tokens all = random_tokens(static_cast<unsigned>(index), 3 * kRounds);
        const auto at = all.begin() + static_cast<std::ptrdiff_t>(3 * round);
        tokens.emplace_back(at, at + 3);
      }
      if (random() % 8 != 0) continue;
      streams.push_back(neighbours[i].get());
      tokens.push_back(random_tokens(static_cast<unsigned>(random()), random() % 6));
      if (random() % 9 == 0) tokens.back().push_back(-1);  // rejected
    }
    std::vector<std::vector<float>> outputs;
    std::vector<core::BatchItem> items;
    for (std::size_t i = 0; i < streams.size(); ++i) {
      outputs.emplace_back(tokens[i].size() * kVocab);
      items.push_back({streams[i], tokens[i].data(), nullptr, tokens[i].size(), TITANS_OUTPUT_ALL, outputs[i].data(),
                       outputs[i].size()});
    }
    const std::vector<core::Failure> outcomes = run_batch(*session_, items);
    for (std::size_t i = 0; i < streams.size(); ++i) {
      for (std::size_t index = 0; index < kWatched; ++index) {
        if (streams[i] != watched[index].get()) continue;
        ASSERT_EQ(outcomes[i].status, TITANS_OK) << outcomes[i].text;
        append(logits[index], outputs[i]);
      }
    }
  }
  for (std::size_t index = 0; index < kWatched; ++index) {
    EXPECT_EQ(logits[index], expected_logits(random_tokens(static_cast<unsigned>(index), 3 * kRounds)));
  }
}

TEST_P(ThreadsTest, TwoInOneStreamAreRefused) {
  Stream stream(session_);
  std::mutex mutex;
  std::condition_variable changed;
  bool inside = false, leave = false;
  control_.before_call = [&] {
    expect_error(TITANS_INVALID_ARGUMENT, {"in use by another call"}, [&] { const Stream::Use use(stream); });
    std::unique_lock lock(mutex);
    inside = true;
    changed.notify_all();
    changed.wait(lock, [&] { return leave; });
  };
  std::thread other([&] { EXPECT_EQ(feed(stream, {3}), expected_logits({3})); });
  {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return inside; });
  }
  expect_error(TITANS_INVALID_ARGUMENT, {"in use by another call"}, [&] { const Stream::Use use(stream); });
  {
    const std::lock_guard lock(mutex);
    leave = true;
  }
  changed.notify_all();
  other.join();
  control_.before_call = nullptr;
  EXPECT_EQ(stream.position(), 1U);
  feed(stream, {4});
}

TEST(ThreadPool, EveryPartOnceAndInSeveralCallsAtOnce) {
  core::ThreadPool pool(3);
  EXPECT_EQ(pool.threads(), 3U);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      for (std::size_t count = 0; count < 60; ++count) {
        std::vector<std::atomic<int>> times(count);
        pool.run(count, [&](std::size_t part) { ++times[part]; });
        for (const auto& time : times) EXPECT_EQ(time, 1);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

}  // namespace
}  // namespace titans::test
