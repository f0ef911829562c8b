// Guards, progress and cancellation, on an engine with a packed row. The reference for a guarded stream is one that the
// test freezes by hand where the guard should intervene.
#include "stream/guard.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include <gtest/gtest.h>

#include "base/log.h"
#include "fake_executor.h"
#include "packed_executor.h"
#include "stream/stream.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

using core::Stream;
using Tokens = std::vector<std::int32_t>;

constexpr std::int32_t kBad = 7;  // the token that breaks a limit
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr auto kChunk = static_cast<std::size_t>(kPackedChunk);

// `count` tokens, with the bad one only at `bad`.
Tokens tokens_with(std::size_t count, std::size_t bad) {
  Tokens tokens;
  for (std::size_t i = 0; i < count; ++i) tokens.push_back(static_cast<std::int32_t>((5 * i * i + 3 * i + 1) % 7));
  tokens[bad] = kBad;
  return tokens;
}

Tokens part(const Tokens& tokens, std::size_t begin, std::size_t end) {
  return Tokens(tokens.begin() + static_cast<std::ptrdiff_t>(begin), tokens.begin() + static_cast<std::ptrdiff_t>(end));
}

struct Buffers {
  const char* name;
  std::vector<bool> in_place;
};

// The effect of kBad, and the limit that it exceeds.
struct Attack {
  const char* name;
  float surprise;
  float max_update_norm;
  float max_surprise;
  std::int32_t reason;
};

const Buffers kBuffers[] = {
    {"Swap", {false, false, false}}, {"InPlace", {true, true, true}}, {"Mixed", {true, false, false}}};
const Attack kLimits[] = {{"UpdateNorm", 1e8F, 1e5F, kInfinity, TITANS_GUARD_UPDATE_NORM},
                          {"Surprise", 1e8F, kInfinity, 1e5F, TITANS_GUARD_SURPRISE}};
const Attack kNotFinite[] = {{"NotANumber", std::nanf(""), kInfinity, kInfinity, TITANS_GUARD_OUTPUT},
                             {"Overflow", 1e36F, kInfinity, kInfinity, TITANS_GUARD_OUTPUT}};

class GuardTest : public testing::TestWithParam<std::tuple<Buffers, Attack>> {
 protected:
  GuardTest() {
    write_packed_bundle(folder_.path());
    // Without a layout, the second memory's chunk length is unknown, so it becomes a cache here.
    nlohmann::json manifest = nlohmann::json::parse(read_file(folder_.path() / "manifest.json"));
    manifest["state"][1].erase("layout");
    manifest["state"][1]["role"] = "conv";
    write_manifest(folder_.path(), manifest);
    control_.in_place = buffers().in_place;
    control_.surprising[kBad] = attack().surprise;
    session_ = open_packed_session(folder_.path(), control_);
  }

  static const Buffers& buffers() { return std::get<0>(GetParam()); }
  static const Attack& attack() { return std::get<1>(GetParam()); }
  static titans_guard guard(std::int32_t policy) {
    return {sizeof(titans_guard), policy, attack().max_update_norm, attack().max_surprise, 0, 1};
  }
  std::unique_ptr<Stream> guarded(std::int32_t policy) {
    auto stream = std::make_unique<Stream>(session_);
    stream->set_guard(guard(policy));
    return stream;
  }

  static std::vector<float> feed(Stream& stream, const Tokens& tokens) {
    std::vector<float> logits(tokens.size() * kFakeVocab);
    stream.feed(tokens.data(), tokens.size(), TITANS_OUTPUT_ALL, logits.data(), logits.size());
    return logits;
  }
  static void expect_same(Stream& a, Stream& b) {
    EXPECT_EQ(a.position(), b.position());
    EXPECT_EQ(a.learning(), b.learning());
    EXPECT_EQ(a.last_output(), b.last_output());
    // Later outputs depend on the whole state.
    const Tokens more = tokens_with(11, 10);
    EXPECT_EQ(feed(*a.fork(), part(more, 0, 10)), feed(*b.fork(), part(more, 0, 10)));
  }

  TemporaryFolder folder_;
  PackedControl control_;
  std::shared_ptr<core::Session> session_;
};

std::string case_name(const testing::TestParamInfo<std::tuple<Buffers, Attack>>& info) {
  return std::string(std::get<0>(info.param).name) + std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(Limits, GuardTest, testing::Combine(testing::ValuesIn(kBuffers), testing::ValuesIn(kLimits)),
                         case_name);
INSTANTIATE_TEST_SUITE_P(NotFinite, GuardTest,
                         testing::Combine(testing::ValuesIn(kBuffers), testing::ValuesIn(kNotFinite)), case_name);

// The bad token was consumed before the guard was set. NaN is then permanently in the outputs.
class LateGuardTest : public GuardTest {};
INSTANTIATE_TEST_SUITE_P(Limits, LateGuardTest,
                         testing::Combine(testing::ValuesIn(kBuffers), testing::ValuesIn(kLimits)), case_name);

// For any position of the bad token and any split into feeds, SKIP freezes its chunk.
TEST_P(GuardTest, SkipLeavesOutExactlyTheChunk) {
  constexpr std::size_t kCount = 22;
  for (const std::size_t bad : {0U, 3U, 5U, 7U, 9U, 14U}) {
    const Tokens tokens = tokens_with(kCount, bad);
    for (const std::size_t cut : {1U, 2U, 3U, 5U, 8U, 22U}) {
      const auto stream = guarded(TITANS_GUARD_SKIP);
      for (std::size_t at = 0; at < kCount; at += cut) feed(*stream, part(tokens, at, std::min(at + cut, kCount)));
      // The chunk up to the point of detection: its end or, if the output shows it, the end of that call.
      std::size_t from = bad / kChunk * kChunk, to = from + kChunk;
      const titans_guard_report report = stream->guard_report();
      ASSERT_EQ(report.rollbacks, 1U) << bad << ' ' << cut;
      to = static_cast<std::size_t>(report.position);
      ASSERT_TRUE(to > bad && to <= from + kChunk) << to;
      EXPECT_EQ(report.reason == TITANS_GUARD_NOT_FINITE ? TITANS_GUARD_OUTPUT : report.reason, attack().reason);
      EXPECT_EQ(report.layer, report.reason == TITANS_GUARD_OUTPUT ? -1 : 0);

      Stream plain(session_);
      feed(plain, part(tokens, 0, from));
      plain.set_learning(false);
      feed(plain, part(tokens, from, to));
      plain.set_learning(true);
      feed(plain, part(tokens, to, kCount));
      expect_same(*stream, plain);
    }
  }
}

TEST_P(GuardTest, FreezeLearnsNothingFromTheChunkOn) {
  const Tokens tokens = tokens_with(22, 9);
  for (const std::size_t cut : {1U, 3U, 22U}) {
    const auto stream = guarded(TITANS_GUARD_FREEZE);
    std::vector<float> logits;
    for (std::size_t at = 0; at < 22; at += cut) feed(*stream, part(tokens, at, std::min<std::size_t>(at + cut, 22)));
    Stream plain(session_);
    feed(plain, part(tokens, 0, 8));
    plain.set_learning(false);
    feed(plain, part(tokens, 8, 22));
    EXPECT_FALSE(stream->learning());
    expect_same(*stream, plain);
  }
}

// A feed returns the rows of the memory that it kept.
TEST_P(GuardTest, TheFeedsOwnLogitsAreThoseOfTheFrozenChunk) {
  const Tokens tokens = tokens_with(20, 10);
  const auto stream = guarded(TITANS_GUARD_SKIP);
  const std::vector<float> logits = feed(*stream, tokens);
  const auto to = static_cast<std::size_t>(stream->guard_report().position);
  Stream plain(session_);
  std::vector<float> expected = feed(plain, part(tokens, 0, 8));
  plain.set_learning(false);
  for (const float value : feed(plain, part(tokens, 8, to))) expected.push_back(value);
  plain.set_learning(true);
  for (const float value : feed(plain, part(tokens, to, 20))) expected.push_back(value);
  EXPECT_EQ(logits, expected);
}

TEST_P(GuardTest, RaiseLeavesTheStreamAsItWas) {
  for (const std::size_t head : {0U, 3U, 9U}) {
    const Tokens tokens = tokens_with(24, 12);
    const auto stream = guarded(TITANS_GUARD_RAISE);
    Stream plain(session_);
    feed(*stream, part(tokens, 0, head));
    feed(plain, part(tokens, 0, head));
    expect_error(TITANS_FAILED, {"[guard]", "up to position", "skip or freeze"},
                 [&] { feed(*stream, part(tokens, head, 24)); });
    EXPECT_EQ(stream->guard_report().rollbacks, 1U);
    expect_same(*stream, plain);
    // Harmless tokens still work afterwards.
    EXPECT_EQ(feed(*stream, part(tokens, 0, 9)), feed(plain, part(tokens, 0, 9)));
  }
}

// If the backend fails while the chunk is consumed again, the stream also returns to its state before the feed.
TEST_P(GuardTest, AFailureOnTheWayBackLeavesTheStreamAsItWas) {
  const Tokens tokens = tokens_with(16, 7);
  int failures = 0;
  for (int call = 0; call < 12; ++call) {
    const auto stream = guarded(TITANS_GUARD_SKIP);
    Stream plain(session_);
    feed(*stream, part(tokens, 0, 6));
    feed(plain, part(tokens, 0, 6));
    control_.fail_at = static_cast<int>(control_.calls.size()) + call;
    bool failed = false;
    try {
      feed(*stream, part(tokens, 6, 16));
    } catch (const core::Error&) {
      failed = true;
    }
    control_.fail_at = -1;
    failures += failed ? 1 : 0;
    if (failed) {
      expect_same(*stream, plain);
      feed(*stream, part(tokens, 6, 16));
    }
    EXPECT_EQ(stream->position(), 16U);
    for (const float value : stream->last_output()) EXPECT_TRUE(std::isfinite(value));
  }
  EXPECT_GT(failures, 0);  // of a frozen call; a learning one is consumed frozen if it fails
}

TEST_P(GuardTest, ACallThatFailsWhileItLearnsIsTakenBack) {
  const Tokens tokens = tokens_with(17, 16);
  const auto stream = guarded(TITANS_GUARD_SKIP);
  feed(*stream, part(tokens, 0, 6));
  control_.fail_at = static_cast<int>(control_.calls.size());
  feed(*stream, part(tokens, 6, 16));
  EXPECT_EQ(stream->guard_report().reason, TITANS_GUARD_CALL);
  EXPECT_EQ(stream->guard_report().position, 8U);
  Stream plain(session_);
  feed(plain, part(tokens, 0, 4));
  plain.set_learning(false);
  feed(plain, part(tokens, 4, 8));
  plain.set_learning(true);
  feed(plain, part(tokens, 8, 16));
  expect_same(*stream, plain);
}

// The guard is set after the open chunk has learned the bad token, on the stream and on a fork.
TEST_P(LateGuardTest, WhatTheOpenChunkHadLearnedBeforeTheGuardIsDropped) {
  const Tokens tokens = tokens_with(12, 5);
  Stream stream(session_);
  feed(stream, part(tokens, 0, 6));
  stream.set_guard(guard(TITANS_GUARD_SKIP));
  const auto twin = stream.fork();
  for (Stream* one : {&stream, twin.get()}) {
    feed(*one, part(tokens, 6, 12));
    Stream plain(session_);
    feed(plain, part(tokens, 0, 4));
    plain.set_learning(false);
    feed(plain, part(tokens, 4, 8));
    plain.set_learning(true);
    feed(plain, part(tokens, 8, 12));
    for (std::size_t index = 0; index < 2; ++index) {  // W0 and S0
      std::vector<float> got(2 * kPackedHeads), expected(2 * kPackedHeads);
      one->read_memory(index, got.data(), got.size());
      plain.read_memory(index, expected.data(), expected.size());
      EXPECT_EQ(got, expected);
    }
  }
}

// A failed call leaves no checkpoint: the stream returns to the call's start.
TEST_P(GuardTest, ACallThatFailedLeavesNoCheckpoint) {
  const Tokens harmless = part(tokens_with(17, 16), 0, 16), tokens = tokens_with(16, 7);
  const auto stream = guarded(TITANS_GUARD_SKIP);
  feed(*stream, part(tokens, 0, 6));
  stream->set_progress([](void*, std::uint64_t done, std::uint64_t total) -> int { return done == total; }, nullptr);
  expect_error(TITANS_CANCELLED, {"after 10"}, [&] { feed(*stream, part(harmless, 6, 16)); });
  stream->set_progress(nullptr, nullptr);
  feed(*stream, part(tokens, 6, 16));
  const auto to = static_cast<std::size_t>(stream->guard_report().position);
  Stream plain(session_);
  feed(plain, part(tokens, 0, 6));
  plain.set_learning(false);
  feed(plain, part(tokens, 6, to));
  plain.set_learning(true);
  feed(plain, part(tokens, to, 16));
  expect_same(*stream, plain);
}

TEST_P(GuardTest, AfterAResetItStartsAnew) {
  const Tokens tokens = tokens_with(12, 5);
  const auto stream = guarded(TITANS_GUARD_SKIP);
  feed(*stream, part(tokens, 0, 5));
  stream->reset();
  feed(*stream, tokens);
  const auto fresh = guarded(TITANS_GUARD_SKIP);
  feed(*fresh, tokens);
  expect_same(*stream, *fresh);
}

TEST_P(GuardTest, OffItIsAsWithout) {
  const Tokens tokens = tokens_with(12, 11);
  const auto stream = guarded(TITANS_GUARD_RAISE);
  feed(*stream, part(tokens, 0, 6));
  stream->set_guard({sizeof(titans_guard), TITANS_GUARD_OFF, kInfinity, kInfinity, 0, 1});
  feed(*stream, part(tokens, 6, 12));
  std::vector<float> memory(2 * kPackedHeads);
  stream->read_memory(0, memory.data(), memory.size());
  EXPECT_FALSE(std::all_of(memory.begin(), memory.end(), [](float value) { return std::abs(value) < 1e3F; }));
}

class GuardedStream : public testing::Test {
 protected:
  GuardedStream() {
    write_packed_bundle(folder_.path());
    session_ = open_packed_session(folder_.path(), control_);
  }

  TemporaryFolder folder_;
  PackedControl control_;
  std::shared_ptr<core::Session> session_;
  const Tokens tokens_ = part(tokens_with(21, 20), 0, 20);
};

TEST_F(GuardedStream, NumbersAreThoseOfWAndS) {
  Stream stream(session_);
  titans_guard guard;
  titans_guard_init(&guard);
  EXPECT_EQ(guard.policy, TITANS_GUARD_RAISE);
  stream.set_guard(guard);
  const auto read = [&](std::size_t index) {
    std::vector<float> values(session_->memories()[index].elements);
    stream.read_memory(index, values.data(), values.size());
    return values;
  };
  const auto norm = [](float a, float b) { return std::sqrt(a * a + b * b); };
  float update = 0, surprise = 0;
  for (const std::int32_t token : tokens_) {
    std::vector<std::pair<std::size_t, std::vector<float>>> before;
    for (std::size_t index = 0; index < session_->memories().size(); ++index) {
      const std::string& name = session_->memories()[index].name;
      if (name.find(".kernel") != std::string::npos) before.emplace_back(index, read(index));
    }
    stream.feed(&token, 1, TITANS_OUTPUT_NONE, nullptr, 0);
    for (const auto& [index, old] : before) {
      const std::vector<float> now = read(index), s = read(index + 1);
      for (std::size_t head = 0; head < now.size(); head += 2) {
        const float change = norm(now[head] - old[head], now[head + 1] - old[head + 1]);
        update = std::max(update, change / norm(old[head], old[head + 1]));
        surprise = std::max(surprise, norm(s[head], s[head + 1]));
      }
    }
  }
  const titans_guard_report report = stream.guard_report();
  EXPECT_EQ(report.rollbacks, 0U);
  EXPECT_GT(report.peak_update_norm, 0.0F);
  EXPECT_NEAR(report.peak_update_norm, update, 1e-5F * update);
  EXPECT_NEAR(report.peak_surprise, surprise, 1e-5F * surprise);
  EXPECT_EQ(report.chunks, 20U / kChunk + 20U);  // of the packed memory, and of the one that changes with every token
}

// A frozen chunk leaves the memory unchanged and exceeds no limit, even if S is already above it.
TEST_F(GuardedStream, ALimitBelowWhatIsThereStopsNoStream) {
  Stream stream(session_), plain(session_);
  for (Stream* one : {&stream, &plain}) one->feed(tokens_.data(), 8, TITANS_OUTPUT_NONE, nullptr, 0);
  titans_guard guard;
  titans_guard_init(&guard);
  guard.policy = TITANS_GUARD_FREEZE;
  guard.max_surprise = 1e-3F;
  stream.set_guard(guard);
  plain.set_learning(false);
  for (Stream* one : {&stream, &plain}) one->feed(tokens_.data(), 9, TITANS_OUTPUT_NONE, nullptr, 0);
  EXPECT_EQ(stream.guard_report().reason, TITANS_GUARD_SURPRISE);
  EXPECT_EQ(stream.last_output(), plain.last_output());
}

// A token of a stream with more rows than tokens may complete two chunks, which are measured as one.
TEST_F(GuardedStream, ATokenThatCompletesTwoChunksIsMeasured) {
  const TemporaryFolder folder;
  nlohmann::json manifest = manifest_json();
  manifest["state"][0]["chunk"] = 2;
  manifest["state"][0]["rows"] = {{"segment", 2}, {"longterm", 2}};
  write_bundle(folder.path(), manifest);
  FakeControl control;
  const auto session = open_fake_session(folder.path(), control);
  titans_guard limits;
  titans_guard_init(&limits);
  limits.max_update_norm = 0.5F;
  core::Guard guard(*session, limits);
  EXPECT_EQ(guard.reach(0, 9), 2U);  // rows 0, then 1 to 3
  EXPECT_EQ(guard.reach(1, 9), 1U);
  FakeBuffer before(16, control.traffic), after(16, control.traffic);
  before.values = {1, 0, 0, 0};
  after.values = {2, 0, 0, 0};
  const std::vector<float> output(kFakeVocab, 0.0F);
  const core::Violation violation = guard.look({&before, &before}, {&after, &after}, 1, 1, output.data());
  EXPECT_EQ(violation.reason, TITANS_GUARD_UPDATE_NORM);
  EXPECT_EQ(guard.report().chunks, 2U);
}

TEST_F(GuardedStream, RefusesWhatIsNoGuard) {
  Stream stream(session_);
  titans_guard guard;
  titans_guard_init(&guard);
  for (const std::int32_t policy : {-1, 7}) {
    guard.policy = policy;
    expect_error(TITANS_INVALID_ARGUMENT, {"titans_guard_policy"}, [&] { stream.set_guard(guard); });
  }
  for (const float limit : {0.0F, -1.0F, std::nanf("")}) {
    titans_guard_init(&guard);
    guard.max_update_norm = limit;
    expect_error(TITANS_INVALID_ARGUMENT, {"above 0"}, [&] { stream.set_guard(guard); });
    titans_guard_init(&guard);
    guard.max_surprise = limit;
    expect_error(TITANS_INVALID_ARGUMENT, {"above 0"}, [&] { stream.set_guard(guard); });
  }
}

TEST_F(GuardedStream, CostsTheBuffersOfOneState) {
  Stream plain(session_), guarded(session_);
  titans_guard guard;
  titans_guard_init(&guard);
  guarded.set_guard(guard);
  std::uint64_t state = 0;
  for (const auto& tensor : session_->manifest().state) state += tensor.bytes;
  EXPECT_EQ(guarded.state_bytes() - plain.state_bytes(), state);
  EXPECT_EQ(session_->metrics().state_bytes.value(), plain.state_bytes() + guarded.state_bytes());
}

// Low-precision memories are measured by their decoded values: W from (1, 2) to (1, 4), S = (3, 4).
struct Packed {
  const char* dtype;
  std::vector<std::uint32_t> before, after, broken;
  std::size_t surprise_at;  // in words
};

class GuardStorage : public testing::TestWithParam<Packed> {};

INSTANTIATE_TEST_SUITE_P(
    Guard, GuardStorage,
    testing::Values(Packed{"float32",
                           {0x3F800000, 0x40000000, 0, 0},
                           {0x3F800000, 0x40800000, 0x40400000, 0x40800000},
                           {0x3F800000, 0x7F800000, 0, 0},
                           2},
                    Packed{"bfloat16", {0x40003F80, 0, 0, 0}, {0x40803F80, 0x40804040, 0, 0}, {0x7F803F80, 0, 0, 0}, 1},
                    Packed{"float16", {0x40003C00, 0, 0, 0}, {0x44003C00, 0x44004200, 0, 0}, {0x7E003C00, 0, 0, 0}, 1},
                    // Elements, then a scale of 0.5; then a scale of NaN.
                    Packed{
                        "int8", {0x0402, 0x3F00, 0, 0}, {0x0802, 0x3F00, 0x0806, 0x3F00}, {0x0402, 0x7FC0, 0, 0}, 2}),
    [](const auto& info) { return std::string(info.param.dtype); });

TEST_P(GuardStorage, NumbersAreWhatTheBitsStandFor) {
  const TemporaryFolder folder;
  nlohmann::json manifest = manifest_json();
  nlohmann::json& layout = manifest["state"][0]["layout"];
  for (nlohmann::json& field : layout) field["dtype"] = GetParam().dtype;
  layout[1]["offset"] = GetParam().surprise_at;
  write_bundle(folder.path(), manifest);
  FakeControl control;
  const auto session = open_fake_session(folder.path(), control);
  titans_guard limits;
  titans_guard_init(&limits);
  const auto look = [&](const std::vector<std::uint32_t>& words) {
    FakeBuffer before(16, control.traffic), after(16, control.traffic);
    before.upload(reinterpret_cast<const std::byte*>(GetParam().before.data()));
    after.upload(reinterpret_cast<const std::byte*>(words.data()));
    const std::vector<float> output(kFakeVocab, 0.0F);
    core::Guard guard(*session, limits);
    return guard.look({&before, &before}, {&after, &after}, 0, 1, output.data());
  };
  core::Violation violation = look(GetParam().after);
  EXPECT_EQ(violation.reason, TITANS_GUARD_GOOD);
  EXPECT_FLOAT_EQ(violation.update_norm, 2.0F / std::sqrt(5.0F));
  EXPECT_FLOAT_EQ(violation.surprise, 5.0F);
  limits.max_update_norm = 0.89F;
  EXPECT_EQ(look(GetParam().after).reason, TITANS_GUARD_UPDATE_NORM);
  limits.max_update_norm = 0.9F;
  limits.max_surprise = 4.99F;
  EXPECT_EQ(look(GetParam().after).reason, TITANS_GUARD_SURPRISE);
  EXPECT_EQ(look(GetParam().broken).reason, TITANS_GUARD_NOT_FINITE);
}

TEST_F(GuardedStream, ProgressIsTold) {
  Stream stream(session_);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> told;
  stream.set_progress(
      [](void* user, std::uint64_t done, std::uint64_t total) {
        static_cast<decltype(told)*>(user)->emplace_back(done, total);
        return 0;
      },
      &told);
  stream.feed(tokens_.data(), 15, TITANS_OUTPUT_NONE, nullptr, 0);
  const decltype(told) expected{{8, 15}, {12, 15}, {14, 15}, {15, 15}};
  EXPECT_EQ(told, expected);
  stream.set_progress(nullptr, nullptr);
  stream.feed(tokens_.data(), 5, TITANS_OUTPUT_NONE, nullptr, 0);
  EXPECT_EQ(told, expected);
}

TEST_F(GuardedStream, AProgressFunctionEndsTheCall) {
  for (const bool guarded : {false, true}) {
    for (std::uint64_t at : {8U, 12U, 15U}) {
      Stream stream(session_), plain(session_);
      titans_guard guard;
      titans_guard_init(&guard);
      if (guarded) stream.set_guard(guard);
      stream.feed(tokens_.data(), 4, TITANS_OUTPUT_NONE, nullptr, 0);
      plain.feed(tokens_.data(), 4, TITANS_OUTPUT_NONE, nullptr, 0);
      stream.set_progress([](void* user, std::uint64_t done,
                             std::uint64_t) -> int { return done == *static_cast<std::uint64_t*>(user); },
                          &at);
      const std::uint64_t cancelled = session_->metrics().cancelled.value();
      expect_error(TITANS_CANCELLED, {"after " + std::to_string(at)},
                   [&] { stream.feed(tokens_.data(), 15, TITANS_OUTPUT_NONE, nullptr, 0); });
      EXPECT_EQ(session_->metrics().cancelled.value(), cancelled + 1);
      stream.set_progress(nullptr, nullptr);
      EXPECT_EQ(stream.position(), 4U);
      stream.feed(tokens_.data(), 15, TITANS_OUTPUT_NONE, nullptr, 0);
      plain.feed(tokens_.data(), 15, TITANS_OUTPUT_NONE, nullptr, 0);
      EXPECT_EQ(stream.last_output(), plain.last_output());
    }
  }
}

TEST_F(GuardedStream, CancelEndsTheCallThatRuns) {
  Stream stream(session_), plain(session_);
  stream.cancel();  // no call is running, so nothing is cancelled
  stream.feed(tokens_.data(), 3, TITANS_OUTPUT_NONE, nullptr, 0);
  plain.feed(tokens_.data(), 3, TITANS_OUTPUT_NONE, nullptr, 0);
  std::size_t calls = 0;
  control_.before_call = [&] {
    if (++calls == 2) stream.cancel();
  };
  expect_error(TITANS_CANCELLED, {"cancelled after"},
               [&] { stream.feed(tokens_.data(), 20, TITANS_OUTPUT_NONE, nullptr, 0); });
  control_.before_call = nullptr;
  EXPECT_EQ(calls, 2U);
  EXPECT_EQ(stream.position(), 3U);
  stream.feed(tokens_.data(), 20, TITANS_OUTPUT_NONE, nullptr, 0);
  plain.feed(tokens_.data(), 20, TITANS_OUTPUT_NONE, nullptr, 0);
  EXPECT_EQ(stream.last_output(), plain.last_output());
}

class LogTest : public GuardedStream {
 protected:
  ~LogTest() override { core::set_log(nullptr, nullptr, TITANS_LOG_DEBUG); }
  void listen(std::int32_t level) {
    core::set_log(
        [](void* user, std::int32_t at, const char* message) {
          static_cast<LogTest*>(user)->lines_.emplace_back(at, message);
          core::log(TITANS_LOG_ERROR, "test", "what the function causes itself");
        },
        this, level);
  }
  std::vector<std::pair<std::int32_t, std::string>> lines_;
};

TEST_F(LogTest, TellsWhatIsAsSevereAsWanted) {
  Stream stream(session_);
  titans_guard guard;
  titans_guard_init(&guard);
  guard.policy = TITANS_GUARD_SKIP;
  stream.set_guard(guard);
  control_.surprising[5] = std::nanf("");
  const std::int32_t token = 5;
  listen(TITANS_LOG_ERROR);
  stream.feed(&token, 1, TITANS_OUTPUT_NONE, nullptr, 0);
  EXPECT_TRUE(lines_.empty());
  listen(TITANS_LOG_WARNING);
  stream.feed(&token, 1, TITANS_OUTPUT_NONE, nullptr, 0);
  ASSERT_EQ(lines_.size(), 1U);
  EXPECT_EQ(lines_[0].first, TITANS_LOG_WARNING);
  EXPECT_EQ(lines_[0].second.rfind("[guard] logits without a finite maximum", 0), 0U) << lines_[0].second;
  guard.policy = TITANS_GUARD_OFF;  // with SKIP, a failed call would be repeated
  stream.set_guard(guard);
  control_.fail_at = static_cast<int>(control_.calls.size());
  EXPECT_THROW(stream.feed(&token, 1, TITANS_OUTPUT_NONE, nullptr, 0), core::Error);
  ASSERT_EQ(lines_.size(), 2U);
  EXPECT_EQ(lines_[1].first, TITANS_LOG_ERROR);
  core::log(TITANS_LOG_WARNING, "test", "two\nlines");
  EXPECT_EQ(lines_[2].second, "[test] two lines");
  core::set_log(nullptr, nullptr, TITANS_LOG_DEBUG);
  core::log(TITANS_LOG_ERROR, "test", "nobody");
  EXPECT_EQ(lines_.size(), 3U);
}

TEST_F(LogTest, RefusesLevelsThatAreNone) {
  for (const std::int32_t level : {0, 5}) {
    expect_error(TITANS_INVALID_ARGUMENT, {"titans_log_level"}, [&] { listen(level); });
  }
}

}  // namespace
}  // namespace titans::test
