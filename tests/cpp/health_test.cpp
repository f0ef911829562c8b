// Limits of norms in a bundle: policies that set the memory back, restarts, and the health of streams. The reference is
// a stream that the test freezes and sets back by hand.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/log.h"
#include "packed_executor.h"
#include "stream/stream.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

using core::Stream;
using nlohmann::json;
using Tokens = std::vector<std::int32_t>;

constexpr std::int32_t kBad = 7;  // the token whose surprise exceeds the limit
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr auto kChunk = static_cast<std::size_t>(kPackedChunk);
constexpr const char* kSurprise = "layers.0.memory.velocity";
constexpr double kLimit = 1e5;

Tokens tokens_with(std::size_t count, const std::vector<std::size_t>& bad) {
  Tokens tokens;
  for (std::size_t i = 0; i < count; ++i) tokens.push_back(static_cast<std::int32_t>((5 * i * i + 3 * i + 1) % 7));
  for (const std::size_t at : bad) tokens[at] = kBad;
  return tokens;
}

Tokens part(const Tokens& tokens, std::size_t begin, std::size_t end) {
  return Tokens(tokens.begin() + static_cast<std::ptrdiff_t>(begin), tokens.begin() + static_cast<std::ptrdiff_t>(end));
}

std::vector<float> feed(Stream& stream, const Tokens& tokens) {
  const Stream::Use use(stream);
  std::vector<float> logits(tokens.size() * kFakeVocab);
  stream.feed(tokens.data(), tokens.size(), TITANS_OUTPUT_ALL, logits.data(), logits.size());
  return logits;
}

void feed_in_cuts(Stream& stream, const Tokens& tokens, std::size_t cut) {
  for (std::size_t at = 0; at < tokens.size(); at += cut) {
    feed(stream, part(tokens, at, std::min(at + cut, tokens.size())));
  }
}

// W and S: words 0 to 3 of each packed row.
std::vector<float*> learned_words(core::StreamState& state) {
  std::vector<float*> words;
  auto* packed = reinterpret_cast<float*>(state.tensors[0].data());
  for (std::size_t head = 0; head < kPackedHeads; ++head) {
    for (std::size_t word = 0; word < 4; ++word) words.push_back(packed + head * kPackedRow + word);
  }
  return words;
}

// Moves W and S by `share` of the way to `target`, in the reference.
void set_back(Stream& stream, core::StreamState target, float share) {
  core::StreamState state = stream.state();
  const std::vector<float*> now = learned_words(state), then = learned_words(target);
  for (std::size_t i = 0; i < now.size(); ++i) *now[i] = *then[i] + (*now[i] - *then[i]) * (1 - share);
  stream.set_state(state);
}

void expect_same(const Stream& a, const Stream& b) {
  core::StreamState left = a.state(), right = b.state();
  EXPECT_EQ(left.position, right.position);
  EXPECT_EQ(left.learning, right.learning);
  EXPECT_TRUE(std::equal(left.last_output.begin(), left.last_output.end(), right.last_output.begin()));
  const std::vector<float*> got = learned_words(left), wanted = learned_words(right);
  for (std::size_t i = 0; i < got.size(); ++i) EXPECT_EQ(*got[i], *wanted[i]) << i;
}

void write_guarded_bundle(const std::filesystem::path& folder, const json& guard) {
  write_packed_bundle(folder);
  json manifest = json::parse(read_file(folder / "manifest.json"));
  // Without a layout, the second memory's chunk length is unknown, so it becomes a cache here.
  manifest["state"][1].erase("layout");
  manifest["state"][1]["role"] = "conv";
  if (!guard.is_null()) manifest["guard"] = guard;
  write_manifest(folder, manifest);
}

json limits_json(const char* policy) {
  return {{"policy", policy}, {"fields", {{kSurprise, {{"seen", 1e4}, {"limit", kLimit}}}}}};
}

struct Repair {
  const char* policy;
  float share;  // of the way back
};

const Repair kRepairs[] = {{"rewind", 1.0F}, {"decay", 0.5F}, {"restart", 1.0F}};

class RepairTest : public testing::TestWithParam<std::tuple<std::vector<bool>, Repair>> {
 protected:
  RepairTest() {
    control_.in_place = std::get<0>(GetParam());
    control_.surprising[kBad] = 1e8F;
    write_guarded_bundle(folder_.path(), limits_json(repair().policy));
    session_ = open_packed_session(folder_.path(), control_);
    core::SessionOptions off;
    off.guard = "off";
    plain_session_ = open_packed_session(folder_.path(), control_, off);
    initial_ = Stream(plain_session_).state();
  }
  static const Repair& repair() { return std::get<1>(GetParam()); }

  // The reference of a stream whose chunk [from, to) broke the limit: frozen over it, then set back to `target`.
  void skip_by_hand(Stream& plain, const Tokens& tokens, std::size_t to, const core::StreamState& target) const {
    plain.set_learning(false);
    feed(plain, part(tokens, static_cast<std::size_t>(plain.position()), to));
    plain.set_learning(true);
    set_back(plain, target, repair().share);
  }

  TemporaryFolder folder_;
  PackedControl control_;
  std::shared_ptr<core::Session> session_, plain_session_;
  core::StreamState initial_;
};

INSTANTIATE_TEST_SUITE_P(Policies, RepairTest,
                         testing::Combine(testing::Values(std::vector<bool>{false, false, false},
                                                          std::vector<bool>{true, true, true},
                                                          std::vector<bool>{true, false, false}),
                                          testing::ValuesIn(kRepairs)),
                         [](const auto& info) {
                           const std::vector<bool>& in_place = std::get<0>(info.param);
                           const char* buffers = !in_place[0] ? "Swap" : in_place[1] ? "InPlace" : "Mixed";
                           return std::string(buffers) + std::get<1>(info.param).policy;
                         });

// For any position of the bad token and any cut: the chunk is skipped, the memory set back, and the stream learns on.
TEST_P(RepairTest, SetsTheMemoryBackAfterTheChunk) {
  constexpr std::size_t kCount = 22;
  for (const std::size_t bad : {0U, 5U, 11U}) {
    const Tokens tokens = tokens_with(kCount, {bad});
    const std::size_t from = bad / kChunk * kChunk, to = from + kChunk;
    Stream plain(plain_session_);
    feed(plain, part(tokens, 0, from));
    skip_by_hand(plain, tokens, to, initial_);
    feed(plain, part(tokens, to, kCount));
    for (const std::size_t cut : {1U, 3U, 8U, 22U}) {
      Stream stream(session_);
      feed_in_cuts(stream, tokens, cut);
      const titans_guard_report report = stream.guard_report();
      EXPECT_EQ(report.reason, TITANS_GUARD_NORM) << bad << ' ' << cut;
      EXPECT_STREQ(report.field, kSurprise);
      EXPECT_EQ(report.position, to);
      EXPECT_EQ(report.layer, 0);
      EXPECT_GT(report.value, static_cast<float>(kLimit));
      EXPECT_EQ(report.limit, static_cast<float>(kLimit));
      EXPECT_EQ(report.rollbacks, 1U);
      EXPECT_EQ(report.repairs, 1U);
      expect_same(stream, plain);
      EXPECT_EQ(stream.health().state, TITANS_HEALTHY);
      EXPECT_EQ(stream.health().divergences, 0U);
    }
  }
  EXPECT_EQ(session_->metrics().repairs.value(), 12U);
  EXPECT_EQ(session_->metrics().rollbacks.value(), 12U);
}

// A call that fails after the repair leaves the stream as it was, and the same call then succeeds.
TEST_P(RepairTest, AFailureAfterTheRepairLeavesTheStreamAsItWas) {
  const Tokens tokens = tokens_with(22, {5});
  for (const std::size_t before : {0U, 2U, 4U}) {
    Stream stream(session_), twin(session_);
    for (Stream* one : {&stream, &twin}) feed(*one, part(tokens, 0, before));
    const auto stop = [](void* /*user*/, std::uint64_t done, std::uint64_t total) { return done == total ? 1 : 0; };
    stream.set_progress(stop, nullptr);
    expect_error(TITANS_CANCELLED, {}, [&] { feed(stream, part(tokens, before, 22)); });
    stream.set_progress(nullptr, nullptr);
    expect_same(stream, twin);
    for (Stream* one : {&stream, &twin}) feed(*one, part(tokens, before, 22));
    expect_same(stream, twin);
  }
}

class MarkTest : public RepairTest {};
INSTANTIATE_TEST_SUITE_P(Rewind, MarkTest,
                         testing::Combine(testing::Values(std::vector<bool>{false, false, false},
                                                          std::vector<bool>{true, true, true}),
                                          testing::Values(kRepairs[0])));

// The first violation returns to the last mark, 1024 tokens into the stream; the second, before another mark, to the
// initial memory.
TEST_P(MarkTest, AMarkHelpsOnce) {
  const Tokens tokens = tokens_with(1100, {1030, 1050});
  Stream plain(plain_session_);
  feed(plain, part(tokens, 0, 1024));
  const core::StreamState mark = plain.state();
  feed(plain, part(tokens, 1024, 1028));
  skip_by_hand(plain, tokens, 1032, mark);
  feed(plain, part(tokens, 1032, 1048));
  skip_by_hand(plain, tokens, 1052, initial_);
  feed(plain, part(tokens, 1052, 1100));
  for (const std::size_t cut : {5U, 1100U}) {
    Stream stream(session_);
    feed_in_cuts(stream, tokens, cut);
    EXPECT_EQ(stream.guard_report().repairs, 2U);
    expect_same(stream, plain);
  }
}

// A fork has the mark; a stream that was reset has not.
TEST_P(MarkTest, ForksInheritTheMark) {
  const Tokens tokens = tokens_with(1040, {1030});
  Stream stream(session_);
  feed(stream, part(tokens, 0, 1025));
  const std::unique_ptr<Stream> twin = stream.fork();
  for (Stream* one : {&stream, twin.get()}) feed(*one, part(tokens, 1025, 1040));
  expect_same(stream, *twin);
  stream.reset();
  Stream fresh(session_);
  for (Stream* one : {&stream, &fresh}) feed(*one, tokens_with(12, {5}));
  expect_same(stream, fresh);
}

// A spilled stream comes back with its mark.
TEST_P(MarkTest, AMarkIsSpilledWithTheStream) {
  const Tokens tokens = tokens_with(1040, {1030});
  Stream whole(session_);
  feed(whole, tokens);
  TemporaryFolder spill;
  core::SessionOptions options;
  options.memory_budget = whole.state_bytes();
  options.spill_dir = spill.path();
  const auto session = open_packed_session(folder_.path(), control_, options);
  Stream stream(session);
  feed(stream, part(tokens, 0, 1025));
  {
    Stream other(session);
    feed(other, part(tokens, 0, 5));
    EXPECT_EQ(session->metrics().spilled.value(), 1U);
  }
  feed(stream, part(tokens, 1025, 1040));
  EXPECT_EQ(session->metrics().restored.value(), 1U);
  EXPECT_EQ(stream.guard_report().repairs, 1U);
  expect_same(stream, whole);
  EXPECT_EQ(session->metrics().state_bytes.value(), stream.state_bytes());
  EXPECT_EQ(session->metrics().resident_bytes.value(), stream.state_bytes());
}

class LimitsTest : public testing::Test {
 protected:
  LimitsTest() { control_.surprising[kBad] = 1e8F; }
  std::shared_ptr<core::Session> open(const json& guard, const std::string& name = "bundle") {
    write_guarded_bundle(folder_.path(), guard);
    core::SessionOptions options;
    options.guard = name;
    return open_packed_session(folder_.path(), control_, options);
  }

  TemporaryFolder folder_;
  PackedControl control_;
};

TEST_F(LimitsTest, EveryMemoryStartsAnewAfterSoManyTokens) {
  const auto session = open({{"policy", "restart"}, {"restart_every", 8}, {"fields", json::object()}});
  const Tokens tokens = tokens_with(21, {});
  Stream plain(open({}, "off"));
  const core::StreamState initial = plain.state();
  for (const std::size_t end : {8U, 16U, 21U}) {
    feed(plain, part(tokens, static_cast<std::size_t>(plain.position()), end));
    if (end < 21) set_back(plain, initial, 1.0F);
  }
  for (const std::size_t cut : {1U, 5U, 21U}) {
    Stream stream(session);
    feed_in_cuts(stream, tokens, cut);
    EXPECT_EQ(stream.guard_report().repairs, 2U);
    EXPECT_EQ(stream.guard_report().rollbacks, 0U);
    expect_same(stream, plain);
  }
  // A frozen memory stays as it is.
  Stream frozen(session);
  frozen.set_learning(false);
  feed(frozen, tokens);
  EXPECT_EQ(frozen.guard_report().repairs, 0U);
}

TEST_F(LimitsTest, TheOptionOfTheSessionOverridesTheBundle) {
  const Tokens tokens = tokens_with(12, {5});
  EXPECT_EQ(Stream(open(limits_json("freeze"), "off")).guard_report().chunks, 0U);
  {
    Stream stream(open(limits_json("freeze")));
    feed(stream, tokens);
    EXPECT_FALSE(stream.learning());
    EXPECT_EQ(stream.guard_report().position, 8U);
    EXPECT_EQ(stream.guard_report().reason, TITANS_GUARD_NORM);
  }
  {
    Stream stream(open(limits_json("off"), "skip"));
    feed(stream, tokens);
    EXPECT_TRUE(stream.learning());
    EXPECT_EQ(stream.guard_report().rollbacks, 1U);
    EXPECT_EQ(stream.guard_report().repairs, 0U);
  }
  {
    Stream stream(open(limits_json("freeze"), "raise"));
    expect_error(TITANS_FAILED, {kSurprise, "of at most 100000"}, [&] { feed(stream, tokens); });
    EXPECT_EQ(stream.position(), 0U);
  }
  expect_error(TITANS_INVALID_ARGUMENT, {"unknown guard", "rewind"}, [&] { open({}, "never"); });
}

TEST_F(LimitsTest, AGuardWithoutTheBundlesLimitsDoesNotUseThem) {
  const auto session = open(limits_json("freeze"));
  const Tokens tokens = tokens_with(12, {5});
  Stream stream(session);
  stream.set_guard({sizeof(titans_guard), TITANS_GUARD_SKIP, kInfinity, kInfinity, 0, 0});
  feed(stream, tokens);
  EXPECT_EQ(stream.guard_report().rollbacks, 0U);
  expect_error(TITANS_INVALID_ARGUMENT, {"bundle_limits"},
               [&] { stream.set_guard({sizeof(titans_guard), TITANS_GUARD_SKIP, kInfinity, kInfinity, 0, 2}); });
}

class HealthTest : public LimitsTest {
 protected:
  ~HealthTest() override { core::set_log(nullptr, nullptr, TITANS_LOG_DEBUG); }
  // Without limits a norm of 32 times the one that calibration saw counts as diverging.
  std::shared_ptr<core::Session> open_seen(double seen) { return open({{"fields", {{kSurprise, {{"seen", seen}}}}}}); }
};

TEST_F(HealthTest, AStreamWithoutLimitsSaysThatItDiverges) {
  std::vector<std::string> lines;
  core::set_log([](void* user, std::int32_t /*level*/,
                   const char* message) { static_cast<std::vector<std::string>*>(user)->emplace_back(message); },
                &lines, TITANS_LOG_WARNING);
  const auto session = open_seen(1e4);
  const auto interval = static_cast<std::size_t>(session->check_interval());
  ASSERT_GT(interval, kChunk);
  Stream stream(session);
  feed(stream, tokens_with(2 * interval, {}));
  EXPECT_EQ(stream.health().state, TITANS_HEALTHY);
  EXPECT_EQ(stream.health().checks, 2U);
  EXPECT_EQ(stream.health().position, 0U);
  EXPECT_EQ(stream.health().field, nullptr);
  stream.mark();
  const std::unique_ptr<Stream> twin = stream.fork();

  // The bad token is the last of a chunk that ends where a check is due.
  const std::size_t end = (3 * interval + kChunk - 1) / kChunk * kChunk - 2 * interval;
  const Tokens bad = tokens_with(end, {end - 2});
  feed(stream, bad);
  titans_health health = stream.health();
  EXPECT_EQ(health.state, TITANS_DIVERGING);
  EXPECT_EQ(health.divergences, 1U);
  EXPECT_GE(health.position, 3 * interval);
  EXPECT_STREQ(health.field, kSurprise);
  EXPECT_EQ(health.layer, 0);
  EXPECT_GE(health.head, 0);
  EXPECT_EQ(health.limit, 32e4F);
  EXPECT_GT(health.value, health.limit);
  ASSERT_EQ(lines.size(), 1U);
  for (const std::string& word : {std::string("[stream] the memory diverges at position "),
                                  std::to_string(health.position), std::string(kSurprise), std::string("320000")}) {
    EXPECT_NE(lines[0].find(word), std::string::npos) << lines[0];
  }
  EXPECT_EQ(session->metrics().diverging.value(), 1U);

  // A fork diverges too, and a call that fails does not.
  {
    const std::unique_ptr<Stream> fork = stream.fork();
    EXPECT_EQ(fork->health().state, TITANS_DIVERGING);
    EXPECT_EQ(session->metrics().diverging.value(), 2U);
  }
  twin->set_progress([](void* /*user*/, std::uint64_t done, std::uint64_t total) { return done == total ? 1 : 0; },
                     nullptr);
  EXPECT_THROW(feed(*twin, bad), core::Error);
  EXPECT_EQ(twin->health().state, TITANS_HEALTHY);
  EXPECT_EQ(twin->health().divergences, 0U);
  EXPECT_EQ(session->metrics().diverging.value(), 1U);

  // The surprise decays, so the stream recovers; what happened stays in the report.
  feed(stream, tokens_with(2 * interval, {}));
  EXPECT_EQ(stream.health().state, TITANS_HEALTHY);
  EXPECT_EQ(stream.health().divergences, 1U);
  EXPECT_EQ(session->metrics().diverging.value(), 0U);
  stream.reset();
  EXPECT_EQ(stream.health().divergences, 0U);
}

TEST_F(HealthTest, AStateThatDivergedIsSeenAtOnce) {
  const auto session = open_seen(1e4);
  const auto interval = static_cast<std::size_t>(session->check_interval());
  Stream stream(session);
  stream.mark();
  const std::size_t end = (interval + kChunk - 1) / kChunk * kChunk;
  feed(stream, tokens_with(end, {end - 2}));
  ASSERT_EQ(stream.health().state, TITANS_DIVERGING);
  {
    const Stream restored(session, stream.state());
    EXPECT_EQ(restored.health().state, TITANS_DIVERGING);
    EXPECT_EQ(session->metrics().diverging.value(), 2U);
  }
  stream.rewind(0);
  EXPECT_EQ(stream.health().state, TITANS_HEALTHY);
  EXPECT_EQ(session->metrics().diverging.value(), 0U);
  EXPECT_EQ(session->metrics().divergences.value(), 2U);
}

// Against sums in the test, over both heads.
TEST_F(HealthTest, PeakNormsAreThoseOfWAndS) {
  const auto session = open({});
  Stream stream(session);
  titans_guard guard{sizeof(titans_guard), TITANS_GUARD_RAISE, kInfinity, kInfinity, 0, 1};
  stream.set_guard(guard);
  std::vector<double> wanted(session->memories().size(), -1.0);
  for (const std::int32_t token : tokens_with(24, {})) {
    feed(stream, {token});
    if (stream.position() % kChunk != 0) continue;
    for (std::size_t index = 0; index < wanted.size(); ++index) {
      const core::MemoryView& memory = session->memories()[index];
      const std::string field = memory.name.substr(memory.name.rfind('.') + 1);
      if (field != "kernel" && field != "velocity") continue;
      std::vector<float> values(memory.elements);
      stream.read_memory(index, values.data(), values.size());
      for (std::size_t head = 0; head < values.size(); head += memory.extent) {
        double sum = 0;
        for (std::size_t i = 0; i < memory.extent; ++i) sum += std::pow(static_cast<double>(values[head + i]), 2);
        wanted[index] = std::max(wanted[index], std::sqrt(sum));
      }
    }
  }
  std::vector<float> peaks(session->memories().size());
  stream.peak_norms(peaks.data(), peaks.size());
  std::size_t measured = 0;
  for (std::size_t index = 0; index < wanted.size(); ++index) {
    EXPECT_NEAR(peaks[index], wanted[index], 1e-6 * std::abs(wanted[index])) << session->memories()[index].name;
    if (wanted[index] > 0) ++measured;
  }
  EXPECT_EQ(measured, 2U);
  expect_error(TITANS_INVALID_ARGUMENT, {"room for"}, [&] { stream.peak_norms(peaks.data(), 1); });
}

}  // namespace
}  // namespace titans::test
