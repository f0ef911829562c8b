#include "stream/stream.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include <gtest/gtest.h>

#include "bundle/schedule.h"
#include "fake_executor.h"
#include "stream/generator.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

using core::Stream;
using nlohmann::json;
using Tokens = std::vector<std::int32_t>;

constexpr std::size_t kVocab = 8;
const Tokens kTokens{3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 0, 7, 7};

// Both tensors swap, both are in place, or one of each.
class StreamTest : public testing::TestWithParam<std::vector<bool>> {
 protected:
  StreamTest() {
    write_bundle(folder_.path());
    control_.in_place = GetParam();
    session_ = open_fake_session(folder_.path(), control_);
  }

  static std::vector<float> feed(Stream& stream, const Tokens& tokens) {
    std::vector<float> logits(tokens.size() * kVocab);
    stream.feed(tokens.data(), tokens.size(), TITANS_OUTPUT_ALL, logits.data(), logits.size());
    return logits;
  }

  TemporaryFolder folder_;
  FakeControl control_;
  std::shared_ptr<core::Session> session_;
};

INSTANTIATE_TEST_SUITE_P(Buffers, StreamTest,
                         testing::Values(std::vector<bool>{false, false}, std::vector<bool>{true, true},
                                         std::vector<bool>{true, false}),
                         [](const auto& info) {
                           return std::string(info.param[0] ? "InPlace" : "Swap") +
                                  (info.param[1] ? "InPlace" : "Swap");
                         });

TEST_P(StreamTest, AnyCutGivesTheSameLogits) {
  const std::vector<float> expected = expected_logits(kTokens);
  for (std::size_t first = 0; first <= kTokens.size(); ++first) {
    for (std::size_t second = first; second <= kTokens.size(); ++second) {
      Stream stream(session_);
      std::vector<float> logits;
      const std::size_t cuts[] = {0, first, second, kTokens.size()};
      for (std::size_t i = 0; i < 3; ++i) {
        const auto part = feed(stream, Tokens(kTokens.begin() + static_cast<std::ptrdiff_t>(cuts[i]),
                                              kTokens.begin() + static_cast<std::ptrdiff_t>(cuts[i + 1])));
        logits.insert(logits.end(), part.begin(), part.end());
      }
      ASSERT_EQ(logits, expected) << first << ' ' << second;
      ASSERT_EQ(stream.position(), kTokens.size());
    }
  }
}

TEST_P(StreamTest, TakesTheLongestGraphThatFits) {
  Stream stream(session_);
  feed(stream, {1});            // decode, to position 1
  feed(stream, Tokens(10, 1));  // decode to 2, prefill to 6, prefill to 10, decode to 11
  feed(stream, Tokens(4, 1));   // decode to 12, chunk to 14, decode
  EXPECT_EQ(control_.calls, (std::vector<std::size_t>{2, 2, 0, 0, 2, 2, 1, 2}));
}

TEST_P(StreamTest, AFailureAnywhereLeavesTheStreamAsItWas) {
  const std::vector<float> expected = expected_logits(kTokens);
  const Tokens head(kTokens.begin(), kTokens.begin() + 3);
  const Tokens tail(kTokens.begin() + 3, kTokens.end());
  for (int call = 0; call < 4; ++call) {
    Stream stream(session_);
    feed(stream, head);
    const std::vector<float> last = stream.last_output();
    control_.fail_at = static_cast<int>(control_.calls.size()) + call;
    expect_error(TITANS_FAILED, {" failed"}, [&] { feed(stream, tail); });
    EXPECT_EQ(stream.position(), 3U);
    EXPECT_EQ(stream.last_output(), last);
    EXPECT_EQ(feed(stream, tail), std::vector<float>(expected.begin() + 3 * kVocab, expected.end())) << call;
  }
}

TEST_P(StreamTest, ATokenOutOfRangeIsSeenBeforeAnythingRuns) {
  Stream stream(session_);
  for (const std::int32_t wrong : {-1, 8}) {
    expect_error(TITANS_INVALID_ARGUMENT, {"token 2", "[0, 8)"}, [&] { feed(stream, {1, 2, wrong}); });
    std::vector<float> logprobs(3);
    const Tokens tokens{1, 2, wrong};
    expect_error(TITANS_INVALID_ARGUMENT, {"token 2"}, [&] { stream.score(tokens.data(), 3, logprobs.data()); });
  }
  EXPECT_TRUE(control_.calls.empty());
}

TEST_P(StreamTest, ForkAndResetAndFreeze) {
  Stream stream(session_);
  feed(stream, {1, 2, 3});
  const auto twin = stream.fork();
  EXPECT_EQ(twin->last_output(), stream.last_output());
  EXPECT_EQ(feed(*twin, {4, 5}), feed(stream, {4, 5}));
  feed(*twin, {6});
  stream.reset();
  EXPECT_EQ(stream.position(), 0U);
  EXPECT_EQ(twin->position(), 6U);
  stream.set_learning(false);
  EXPECT_EQ(feed(stream, kTokens), expected_logits(kTokens, false));
  stream.reset();
  EXPECT_FALSE(stream.learning());
}

TEST_P(StreamTest, AResetThatFailsLeavesTheStreamAsItWas) {
  const std::vector<float> expected = expected_logits(kTokens);
  for (int uploads = 0; uploads < 2; ++uploads) {
    Stream stream(session_);
    feed(stream, {3, 1, 4});
    control_.traffic.uploads_before_a_failure = uploads;
    expect_error(TITANS_FAILED, {" failed"}, [&] { stream.reset(); });
    control_.traffic.uploads_before_a_failure.reset();
    EXPECT_EQ(stream.position(), 3U);
    const Tokens tail(kTokens.begin() + 3, kTokens.end());
    EXPECT_EQ(feed(stream, tail), std::vector<float>(expected.begin() + 3 * kVocab, expected.end())) << uploads;
  }
}

TEST_P(StreamTest, WhatComputesTheMemoryIsInTheSessionsInfo) {
  EXPECT_NE(session_->info().find(R"("memory_kernel":"fake-kernel")"), std::string::npos) << session_->info();
}

TEST_P(StreamTest, LastLogits) {
  Stream stream(session_);
  std::vector<float> last(kVocab);
  expect_error(TITANS_INVALID_ARGUMENT, {"at least one token"},
               [&] { stream.feed(nullptr, 0, TITANS_OUTPUT_LAST, last.data(), kVocab); });
  stream.feed(kTokens.data(), 5, TITANS_OUTPUT_NONE, nullptr, 0);
  stream.feed(nullptr, 0, TITANS_OUTPUT_LAST, last.data(), kVocab);
  const std::vector<float> expected = expected_logits(kTokens);
  EXPECT_EQ(last, std::vector<float>(expected.begin() + 4 * kVocab, expected.begin() + 5 * kVocab));
}

TEST_P(StreamTest, RoomForLogits) {
  Stream stream(session_);
  std::vector<float> logits(2 * kVocab);
  expect_error(TITANS_INVALID_ARGUMENT, {"16", "15"},
               [&] { stream.feed(kTokens.data(), 2, TITANS_OUTPUT_ALL, logits.data(), 15); });
  expect_error(TITANS_INVALID_ARGUMENT, {"NULL"},
               [&] { stream.feed(kTokens.data(), 2, TITANS_OUTPUT_LAST, nullptr, 100); });
  expect_error(TITANS_INVALID_ARGUMENT, {"fit into memory"}, [&] {
    stream.feed(kTokens.data(), std::numeric_limits<std::size_t>::max() / 2, TITANS_OUTPUT_ALL, logits.data(), 16);
  });
  EXPECT_EQ(stream.position(), 0U);
}

TEST_P(StreamTest, ScoresAreThoseOfTheLogits) {
  const std::vector<float> logits = expected_logits(kTokens);
  for (const std::size_t cut : {std::size_t{0}, std::size_t{1}, std::size_t{5}, kTokens.size()}) {
    Stream stream(session_);
    std::vector<float> logprobs(kTokens.size());
    stream.score(kTokens.data(), cut, logprobs.data());
    stream.score(kTokens.data() + cut, kTokens.size() - cut, logprobs.data() + cut);
    EXPECT_FLOAT_EQ(logprobs[0], -std::log(8.0F));
    for (std::size_t i = 1; i < kTokens.size(); ++i) {
      double sum = 0.0;
      const auto row = logits.begin() + static_cast<std::ptrdiff_t>((i - 1) * kVocab);
      for (std::size_t v = 0; v < kVocab; ++v)
        sum += std::exp(static_cast<double>(row[static_cast<std::ptrdiff_t>(v)]));
      EXPECT_NEAR(logprobs[i], static_cast<double>(row[kTokens[i]]) - std::log(sum), 1e-4) << i;
    }
  }
}

TEST_P(StreamTest, StateBytesAreConstant) {
  Stream stream(session_);
  const std::uint64_t before = stream.state_bytes();
  feed(stream, kTokens);
  EXPECT_EQ(stream.state_bytes(), before);
  const std::uint64_t memory = 16 * (control_.in_place[0] ? 2U : 3U);
  const std::uint64_t last = 4 * (control_.in_place[1] ? 2U : 3U);
  EXPECT_EQ(before, memory + last + kVocab * sizeof(float));
}

TEST_P(StreamTest, WorkspacesAreReused) {
  Stream one(session_);
  Stream two(session_);
  feed(one, kTokens);
  feed(two, kTokens);
  EXPECT_EQ(control_.workspaces, 1);
}

TEST_P(StreamTest, MemoryFields) {
  Stream stream(session_);
  ASSERT_EQ(session_->memories().size(), 2U);
  const core::MemoryView& field = session_->memories()[0];
  EXPECT_EQ(field.name, "layers.0.memory.W0");
  EXPECT_EQ(field.shape, (core::Shape{1, 1, 1, 2}));
  EXPECT_EQ(session_->memories()[1].shape, (core::Shape{1, 1, 2}));
  std::vector<float> values(2);
  stream.read_memory(0, values.data(), 2);
  EXPECT_EQ(values, (std::vector<float>{0.5F, 0.25F}));
  stream.read_memory(1, values.data(), 2);
  EXPECT_EQ(values, (std::vector<float>{0.0F, 3.0F}));
  feed(stream, {6});
  stream.read_memory(0, values.data(), 2);
  EXPECT_EQ(values[0], 6.25F);
  expect_error(TITANS_INVALID_ARGUMENT, {"layers.0.memory.W0"}, [&] { stream.read_memory(0, values.data(), 1); });
}

TEST_P(StreamTest, GeneratorFeedsWhatItReturns) {
  Stream stream(session_);
  expect_error(TITANS_INVALID_ARGUMENT, {"consumed a token"}, [&] { core::Generator(stream, {}, 3, {}); });
  feed(stream, {1, 2});
  core::Sampling greedy;
  greedy.temperature = 0.0;
  core::Generator generator(stream, greedy, 3, {});
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(generator.next(), 7);  // the last token is positive, so the logits grow with the token
    EXPECT_EQ(stream.position(), static_cast<std::uint64_t>(3 + i));
  }
  EXPECT_EQ(generator.next(), std::nullopt);
  core::Generator stopped(stream, greedy, -1, {3, 7});
  EXPECT_EQ(stopped.next(), std::nullopt);
  EXPECT_EQ(stopped.next(), std::nullopt);
  EXPECT_EQ(stream.position(), 5U);
}

TEST_P(StreamTest, AGeneratorOfAStreamThatWasReset) {
  Stream stream(session_);
  feed(stream, {1, 2});
  core::Generator generator(stream, {}, -1, {});
  generator.next();
  stream.reset();
  EXPECT_EQ(stream.last_output(), std::vector<float>(kVocab, 0.0F));
  expect_error(TITANS_INVALID_ARGUMENT, {"consumed a token"}, [&] { generator.next(); });
  EXPECT_EQ(stream.position(), 0U);
  feed(stream, {1});
  EXPECT_TRUE(generator.next());
}

TEST_P(StreamTest, ScoreOfLogitsThatAreNoDistribution) {
  for (const float wrong : {std::nanf(""), INFINITY, -INFINITY}) {
    Stream stream(session_);
    feed(stream, {1});
    const auto twin = stream.fork();
    control_.spoil = wrong;
    std::vector<float> logprobs(3);
    const Tokens tokens{1, 2, 3};
    expect_error(TITANS_FAILED, {"score", "finite maximum"}, [&] { stream.score(tokens.data(), 3, logprobs.data()); });
    EXPECT_EQ(stream.position(), 1U);
    control_.spoil.reset();
    EXPECT_EQ(feed(stream, {4, 5}), feed(*twin, {4, 5}));
  }
}

TEST_P(StreamTest, AFailedDrawIsDrawnAgain) {
  Stream stream(session_);
  feed(stream, {1});
  const auto twin = stream.fork();
  core::Sampling hot;
  hot.temperature = 20.0;
  core::Generator whole(stream, hot, 10, {});
  core::Generator broken(*twin, hot, 10, {});
  for (int i = 0; i < 10; ++i) {
    control_.fail_at = static_cast<int>(control_.calls.size());
    expect_error(TITANS_FAILED, {" failed"}, [&] { broken.next(); });
    EXPECT_EQ(broken.next(), whole.next());
  }
}

// Vectors instead of tokens, and graph offsets.
class VectorStreamTest : public testing::TestWithParam<std::vector<bool>> {
 protected:
  VectorStreamTest() {
    json manifest = vectors_json();
    manifest["graphs"].push_back(manifest["graphs"][0]);
    manifest["graphs"][0].update({{"stride", 4}, {"offsets", {0, 1, 2}}});
    manifest["graphs"][3].update({{"name", "last"}, {"file", "last.onnx"}, {"stride", 4}, {"offsets", {3}}});
    write_bundle(folder_.path(), manifest);
    control_.in_place = GetParam();
    session_ = open_fake_session(folder_.path(), control_);
    for (std::size_t i = 0; i < kCount * kFakeInputs; ++i) vectors_.push_back(static_cast<float>((i * 7 + 3) % 11) - 4);
  }

  // Feeds `count` vectors from `first` on and returns the outputs.
  std::vector<float> feed(Stream& stream, std::size_t first, std::size_t count) const {
    std::vector<float> outputs(count * kFakeOutputs);
    stream.feed_vectors(vectors_.data() + first * kFakeInputs, count, TITANS_OUTPUT_ALL, outputs.data(),
                        outputs.size());
    return outputs;
  }
  std::vector<float> expected(std::size_t first, bool learning = true) const {
    const std::vector<float> all = expected_outputs(vectors_, learning);
    return {all.begin() + static_cast<std::ptrdiff_t>(first * kFakeOutputs), all.end()};
  }

  static constexpr std::size_t kCount = 13;
  TemporaryFolder folder_;
  FakeControl control_;
  std::shared_ptr<core::Session> session_;
  std::vector<float> vectors_;
};

INSTANTIATE_TEST_SUITE_P(Buffers, VectorStreamTest,
                         testing::Values(std::vector<bool>{false, false}, std::vector<bool>{true, true}));

TEST_P(VectorStreamTest, AnyCutGivesTheSameOutputs) {
  for (std::size_t cut = 0; cut <= kCount; ++cut) {
    Stream stream(session_);
    std::vector<float> outputs = feed(stream, 0, cut);
    const std::vector<float> rest = feed(stream, cut, kCount - cut);
    outputs.insert(outputs.end(), rest.begin(), rest.end());
    ASSERT_EQ(outputs, expected(0)) << cut;
    ASSERT_EQ(stream.position(), kCount);
  }
}

// The engine compares each call's position with the graph's offsets. The manifest's order is prefill, chunk, decode,
// last.
TEST_P(VectorStreamTest, TheGraphOfThePhaseRuns) {
  Stream stream(session_);
  for (std::size_t at = 0; at < 9; ++at) feed(stream, at, 1);
  EXPECT_EQ(control_.calls, (std::vector<std::size_t>{2, 2, 2, 3, 2, 2, 2, 3, 2}));
  control_.calls.clear();
  Stream other(session_);
  feed(other, 0, 3);
  feed(other, 3, 2);
  feed(other, 5, 8);
  EXPECT_EQ(control_.calls, (std::vector<std::size_t>{1, 2, 3, 2, 2, 0, 1, 2}));
}

TEST_P(VectorStreamTest, AFailureAnywhereLeavesTheStreamAsItWas) {
  for (int call = 0; call < 4; ++call) {
    Stream stream(session_);
    feed(stream, 0, 3);
    const std::vector<float> last = stream.last_output();
    control_.fail_at = static_cast<int>(control_.calls.size()) + call;
    expect_error(TITANS_FAILED, {" failed"}, [&] { feed(stream, 3, kCount - 3); });
    EXPECT_EQ(stream.position(), 3U);
    EXPECT_EQ(stream.last_output(), last);
    EXPECT_EQ(feed(stream, 3, kCount - 3), expected(3)) << call;
  }
}

TEST_P(VectorStreamTest, NumbersThatAreNotFiniteAreSeenBeforeAnythingRuns) {
  Stream stream(session_);
  const std::vector<float> right = vectors_;
  for (const float wrong : {std::nanf(""), INFINITY, -INFINITY}) {
    vectors_ = right;
    vectors_[2 * 9 + 1] = wrong;
    expect_error(TITANS_INVALID_ARGUMENT, {"vector 9", "element 1", "finite"}, [&] { feed(stream, 0, kCount); });
  }
  EXPECT_TRUE(control_.calls.empty());
  vectors_ = right;
  EXPECT_EQ(feed(stream, 0, kCount), expected(0));
}

TEST_P(VectorStreamTest, ForkResetAndFreeze) {
  Stream stream(session_);
  feed(stream, 0, 6);
  const auto twin = stream.fork();
  EXPECT_EQ(twin->last_output(), stream.last_output());
  EXPECT_EQ(feed(*twin, 6, kCount - 6), expected(6));
  EXPECT_EQ(feed(stream, 6, kCount - 6), expected(6));
  stream.reset();
  EXPECT_EQ(stream.position(), 0U);
  stream.set_learning(false);
  EXPECT_EQ(feed(stream, 0, kCount), expected(0, /*learning=*/false));
}

TEST_P(VectorStreamTest, WhichOutputs) {
  Stream stream(session_);
  std::vector<float> last(kFakeOutputs);
  expect_error(TITANS_INVALID_ARGUMENT, {"at least one token", "outputs"},
               [&] { stream.feed_vectors(nullptr, 0, TITANS_OUTPUT_LAST, last.data(), last.size()); });
  expect_error(TITANS_INVALID_ARGUMENT, {"6 outputs", "5"},
               [&] { stream.feed_vectors(vectors_.data(), 2, TITANS_OUTPUT_ALL, last.data(), 5); });
  for (const std::size_t count :
       {std::numeric_limits<std::size_t>::max() / 2, std::numeric_limits<std::size_t>::max() / 8 + 1}) {
    expect_error(TITANS_INVALID_ARGUMENT, {"fit into memory"},
                 [&] { stream.feed_vectors(vectors_.data(), count, TITANS_OUTPUT_NONE, nullptr, 0); });
  }
  stream.feed_vectors(vectors_.data(), 5, TITANS_OUTPUT_NONE, nullptr, 0);
  stream.feed_vectors(nullptr, 0, TITANS_OUTPUT_LAST, last.data(), last.size());
  const std::vector<float> all = expected(0);
  EXPECT_EQ(last, std::vector<float>(all.begin() + 4 * kFakeOutputs, all.begin() + 5 * kFakeOutputs));
}

TEST_P(VectorStreamTest, WhatNeedsTokens) {
  Stream stream(session_);
  feed(stream, 0, 2);
  const std::int32_t token = 0;
  std::vector<float> values(8);
  const std::vector<std::string> words{"the bundle takes vectors", "got tokens"};
  expect_error(TITANS_INVALID_ARGUMENT, words,
               [&] { stream.feed(&token, 1, TITANS_OUTPUT_ALL, values.data(), values.size()); });
  expect_error(TITANS_INVALID_ARGUMENT, words, [&] { stream.score(&token, 1, values.data()); });
  expect_error(TITANS_INVALID_ARGUMENT, words, [&] { core::Generator(stream, {}, 3, {}); });
  EXPECT_EQ(stream.position(), 2U);
}

TEST_P(StreamTest, VectorsForABundleOfTokens) {
  Stream stream(session_);
  const std::vector<float> vectors(kVocab, 1.0F);
  expect_error(TITANS_INVALID_ARGUMENT, {"the bundle takes tokens", "got vectors"},
               [&] { stream.feed_vectors(vectors.data(), 1, TITANS_OUTPUT_NONE, nullptr, 0); });
  EXPECT_EQ(stream.position(), 0U);
}

core::Graph graph(std::int64_t tokens, std::int64_t stride, std::vector<std::int64_t> offsets = {0}) {
  return {std::to_string(tokens) + " at " + std::to_string(stride), "", tokens, stride, {}, std::move(offsets)};
}

TEST(Schedule, AlignmentHoldsAtEveryPosition) {
  const core::Schedule schedule({graph(128, 32), graph(32, 32), graph(1, 1)});
  EXPECT_EQ(schedule.next_graph(0, 128), 0U);
  EXPECT_EQ(schedule.next_graph(32, 500), 0U);
  EXPECT_EQ(schedule.next_graph(32, 127), 1U);
  EXPECT_EQ(schedule.next_graph(33, 500), 2U);
  EXPECT_EQ(schedule.next_graph(64, 31), 2U);
}

// Compares every position and number of remaining tokens with the rule of docs/bundle.md.
TEST(Schedule, TheLongestGraphOfThePhase) {
  const std::vector<core::Graph> graphs{graph(12, 6, {0, 3, 4}), graph(6, 6, {1}), graph(6, 4, {0, 2}),
                                        graph(1, 6, {0, 1, 3, 4}), graph(1, 6, {2, 5})};
  ASSERT_EQ(core::missing_of_schedule(graphs), "");
  const core::Schedule schedule(graphs);
  constexpr std::uint64_t kFar = std::uint64_t{1} << 40;
  for (const std::uint64_t start : {std::uint64_t{0}, kFar - kFar % 12}) {
    for (std::uint64_t position = start; position < start + 24; ++position) {
      for (std::size_t remaining = 1; remaining < 14; ++remaining) {
        const core::Graph* best = nullptr;
        for (const core::Graph& one : graphs) {
          const auto offset = static_cast<std::int64_t>(position % static_cast<std::uint64_t>(one.stride));
          const bool starts = std::count(one.offsets.begin(), one.offsets.end(), offset) > 0;
          if (!starts || one.tokens > static_cast<std::int64_t>(remaining)) continue;
          if (best == nullptr || one.tokens > best->tokens) best = &one;
        }
        ASSERT_EQ(&graphs[schedule.next_graph(position, remaining)], best) << position << ' ' << remaining;
      }
    }
  }
}

TEST(Schedule, TheDecodingGraphIsTheOneThatRunsMost) {
  EXPECT_EQ(core::Schedule({graph(8, 4), graph(1, 4, {3}), graph(1, 4, {0, 1, 2})}).decoding_graph(), 2U);
  EXPECT_EQ(core::Schedule({graph(8, 4), graph(1, 4, {0, 1, 2}), graph(1, 4, {3})}).decoding_graph(), 1U);
  EXPECT_EQ(core::Schedule({graph(8, 4, {0, 1, 2, 3}), graph(1, 1)}).decoding_graph(), 1U);
}

TEST(Schedule, WhatGraphsLack) {
  const auto expect = [](const std::vector<core::Graph>& graphs, const std::string& words) {
    const std::string missing = core::missing_of_schedule(graphs);
    EXPECT_NE(missing.find(words), std::string::npos) << missing;
  };
  expect({}, "tokens = 1");
  expect({graph(4, 1)}, "tokens = 1");
  expect({graph(1, 2)}, "also at 1 modulo 2");
  expect({graph(1, 4, {0, 1}), graph(1, 6, {2})}, "equal tokens");
  expect({graph(1, 4, {0, 1}), graph(1, 6, {3})}, "equal tokens");  // both at 9
  expect({graph(1, 2), graph(1, 4, {1})}, "also at 3 modulo 4");
  expect({graph(8, 4), graph(8, 6, {2}), graph(1, 1)}, "equal tokens");  // both at 8
  expect({graph(1, std::int64_t{1} << 21)}, "repeat within");
  expect({graph(1, 1024), graph(1, 1025 * 1024, {1})}, "repeat within");
  EXPECT_EQ(core::missing_of_schedule({graph(8, 4), graph(8, 4, {1}), graph(1, 1)}), "");
  EXPECT_EQ(core::missing_of_schedule({graph(1, 2), graph(1, 4, {1}), graph(1, 4, {3})}), "");
}

}  // namespace
}  // namespace titans::test
