// A memory budget: streams beyond it wait in files and come back exactly, whatever fails.
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include <gtest/gtest.h>

#include "base/log.h"
#include "fake_executor.h"
#include "packed_executor.h"
#include "state/state_crypto.h"
#include "stream/batch.h"
#include "stream/generator.h"
#include "stream/stream.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

namespace fs = std::filesystem;
using core::Stream;
using Tokens = std::vector<std::int32_t>;

constexpr std::size_t kVocab = kFakeVocab;
const Tokens kTokens{3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 0, 7, 7};
// For the bundle of test_bundle.h: [1, 1, 4] and [1, 1] three times, or twice if in place, plus the logits.
constexpr std::uint64_t kStreamBytes = 3 * 20 + kVocab * 4;
constexpr std::uint64_t kStreamBytesInPlace = 2 * 20 + kVocab * 4;

std::vector<fs::path> list(const fs::path& folder) {
  std::vector<fs::path> found;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file() && entry.path().filename() != "lock") found.push_back(entry.path());
  }
  return found;
}

std::vector<float> feed(Stream& stream, const Tokens& tokens) {
  const Stream::Use use(stream);
  std::vector<float> logits(tokens.size() * kVocab);
  stream.feed(tokens.data(), tokens.size(), TITANS_OUTPUT_ALL, logits.data(), logits.size());
  return logits;
}

std::vector<float> row(const std::vector<float>& logits, std::size_t index) {
  return {logits.begin() + static_cast<std::ptrdiff_t>(index * kVocab),
          logits.begin() + static_cast<std::ptrdiff_t>((index + 1) * kVocab)};
}

// While an object lives, files are limited to one byte.
class FullDisk {
 public:
  FullDisk() {
    ::signal(SIGXFSZ, SIG_IGN);
    EXPECT_EQ(::getrlimit(RLIMIT_FSIZE, &before_), 0);
    rlimit full = before_;
    full.rlim_cur = 1;
    EXPECT_EQ(::setrlimit(RLIMIT_FSIZE, &full), 0);
  }
  ~FullDisk() { EXPECT_EQ(::setrlimit(RLIMIT_FSIZE, &before_), 0); }
  FullDisk(const FullDisk&) = delete;
  FullDisk& operator=(const FullDisk&) = delete;

 private:
  rlimit before_{};
};

class SpillTest : public testing::TestWithParam<std::vector<bool>> {
 protected:
  SpillTest() {
    write_bundle(bundle_.path());
    control_.in_place = GetParam();
    bytes_ = GetParam()[0] ? kStreamBytesInPlace : kStreamBytes;
  }

  std::shared_ptr<core::Session> open(std::uint64_t streams, std::uint64_t more = 0) {
    core::SessionOptions options;
    options.memory_budget = streams * bytes_ + more;
    options.spill_dir = spill_.path();
    return open_fake_session(bundle_.path(), control_, options);
  }

  TemporaryFolder bundle_, spill_;
  FakeControl control_;
  std::uint64_t bytes_ = 0;
};

INSTANTIATE_TEST_SUITE_P(Buffers, SpillTest,
                         testing::Values(std::vector<bool>{false, false}, std::vector<bool>{true, true}),
                         [](const auto& info) { return info.param[0] ? "InPlace" : "Swap"; });

TEST_P(SpillTest, StreamsBeyondTheBudgetComeBackExactly) {
  const auto session = open(2);
  std::vector<std::unique_ptr<Stream>> streams;
  for (std::size_t i = 0; i < 6; ++i) streams.push_back(std::make_unique<Stream>(session));
  const std::vector<float> expected = expected_logits(kTokens);
  for (std::size_t t = 0; t < kTokens.size(); ++t) {
    for (const auto& stream : streams) ASSERT_EQ(feed(*stream, {kTokens[t]}), row(expected, t)) << t;
    titans_metrics metrics{};
    metrics.struct_size = sizeof(metrics);
    session->metrics().read(&metrics);
    ASSERT_EQ(metrics.resident_bytes, 2 * bytes_);
    ASSERT_EQ(metrics.state_bytes, 6 * bytes_);
    ASSERT_EQ(metrics.spilled, metrics.restored + 4);
    ASSERT_EQ(list(spill_.path()).size(), 4U);
  }
  // Calls that need no state do not reload the stream.
  EXPECT_EQ(streams[0]->position(), kTokens.size());
  EXPECT_TRUE(streams[0]->learning());
  EXPECT_EQ(streams[0]->state_bytes(), bytes_);
  streams[0]->set_learning(false);
  EXPECT_EQ(list(spill_.path()).size(), 4U);
  streams[1].reset();  // one spilled, one resident
  streams[5].reset();
  EXPECT_EQ(list(spill_.path()).size(), 3U);
  EXPECT_FALSE(streams[0]->learning());
  const std::vector<float> memory = [&] {
    const Stream::Use use(*streams[0]);
    std::vector<float> values(2);
    streams[0]->read_memory(0, values.data(), values.size());
    return values;
  }();
  const Stream::Use use(*streams[4]);
  std::vector<float> same(2);
  streams[4]->read_memory(0, same.data(), same.size());
  EXPECT_EQ(memory, same);
}

TEST_P(SpillTest, FilesGoWithTheSession) {
  {
    const auto session = open(1);
    Stream a(session), b(session);
    feed(a, {1});
    EXPECT_EQ(list(spill_.path()).size(), 1U);
  }
  EXPECT_TRUE(fs::is_empty(spill_.path()));
}

TEST_P(SpillTest, TheOneUsedLongestAgoGoesFirst) {
  const auto session = open(2);
  Stream a(session), b(session);
  feed(a, {1});
  feed(b, {1});
  feed(a, {1});
  const auto restored = [&] { return session->metrics().restored.value(); };
  const std::uint64_t before = restored();
  Stream c(session);  // b is spilled
  feed(a, {1});
  EXPECT_EQ(restored(), before);
  feed(b, {1});
  EXPECT_EQ(restored(), before + 1);
}

TEST_P(SpillTest, AStreamInUseStays) {
  const auto session = open(1);
  Stream a(session), b(session);
  const Stream::Use use(a);
  feed(b, {1});  // exceeds the budget during the call
  EXPECT_EQ(session->metrics().resident_bytes.value(), bytes_);
  EXPECT_EQ(row(feed(b, {2}), 0), row(expected_logits({1, 2}), 1));
}

TEST_P(SpillTest, MarksForksAndGenerators) {
  const auto session = open(4);
  Stream a(session);
  feed(a, {3, 1, 4});
  const auto at_three = [&] {
    const Stream::Use use(a);
    return a.mark();
  }();
  feed(a, {1, 5});
  EXPECT_GT(a.state_bytes(), bytes_);
  {
    std::vector<std::unique_ptr<Stream>> others;
    for (std::size_t i = 0; i < 4; ++i) others.push_back(std::make_unique<Stream>(session));
    EXPECT_EQ(list(spill_.path()).size(), 2U) << "a and its mark";
  }
  const auto twin = [&] {
    const Stream::Use use(a);
    return a.fork();
  }();
  {
    const Stream::Use use(a);
    a.rewind(at_three);
  }
  EXPECT_EQ(feed(a, {7}), row(expected_logits({3, 1, 4, 7}), 3));
  EXPECT_EQ(feed(*twin, {2}), row(expected_logits({3, 1, 4, 1, 5, 2}), 5));
  std::vector<std::unique_ptr<Stream>> others;
  for (std::size_t i = 0; i < 4; ++i) others.push_back(std::make_unique<Stream>(session));
  core::Sampling greedy;
  greedy.temperature = 0;
  core::Generator generator(*twin, greedy, 1, {});
  const Stream::Use use(generator.stream());
  const std::vector<float> last = row(expected_logits({3, 1, 4, 1, 5, 2}), 5);
  EXPECT_EQ(generator.next(), std::max_element(last.begin(), last.end()) - last.begin());
}

TEST_P(SpillTest, FilesCannotBeReadByOthers) {
  const auto session = open(1);
  Stream a(session);
  feed(a, {3, 1, 4});
  Stream b(session);
  const std::vector<fs::path> files = list(spill_.path());
  ASSERT_EQ(files.size(), 1U);
  EXPECT_EQ(fs::status(files[0].parent_path()).permissions(), fs::perms::owner_all);
  EXPECT_EQ(fs::status(files[0]).permissions(), fs::perms::owner_read | fs::perms::owner_write);
  if (!core::has_crypto()) GTEST_SKIP() << "no libcrypto";
  EXPECT_EQ(read_file(files[0]).substr(0, 8), "TITANSE1");
}

// Calls that need room fail without losing data.
TEST_P(SpillTest, ADiskThatIsFull) {
  const auto session = open(2);
  Stream a(session), b(session);
  feed(a, {3, 1, 4});
  feed(b, {2, 7});
  std::optional<FullDisk> full(std::in_place);
  const auto another = [&] { Stream c(session); };
  expect_error(TITANS_FAILED, {"[spill]", "memory_budget", "no stream has changed"}, another);
  EXPECT_EQ(feed(a, {1}), row(expected_logits({3, 1, 4, 1}), 3));
  EXPECT_EQ(session->metrics().resident_bytes.value(), 2 * bytes_);
  EXPECT_TRUE(list(spill_.path()).empty());
  full.reset();
  another();
  auto c = std::make_unique<Stream>(session);
  feed(*c, {6});
  full.emplace();
  // Either a or b has been spilled. It stays in its file until there is room.
  const std::size_t spilled = list(spill_.path()).size();
  EXPECT_EQ(spilled, 1U);
  std::size_t failed = 0;
  for (Stream* stream : {&a, &b}) {
    try {
      feed(*stream, {});
    } catch (const core::Error& error) {
      EXPECT_EQ(error.status(), TITANS_FAILED);
      ++failed;
    }
  }
  EXPECT_EQ(failed, 1U);
  full.reset();
  EXPECT_EQ(feed(a, {5}), row(expected_logits({3, 1, 4, 1, 5}), 4));
  EXPECT_EQ(feed(b, {5}), row(expected_logits({2, 7, 5}), 2));
  EXPECT_EQ(feed(*c, {5}), row(expected_logits({6, 5}), 1));
}

// A stream that cannot be spilled at the end of its call is logged. The log function may call the library.
TEST_P(SpillTest, ALogFunctionClosesAStream) {
  const auto session = open(1);
  Stream a(session), b(session);
  auto c = std::make_unique<Stream>(session);
  std::vector<std::string> told;
  const auto tell = [&](const std::string& message) {
    told.push_back(message);
    c.reset();
  };
  core::set_log([](void* user, std::int32_t, const char* message) { (*static_cast<decltype(tell)*>(user))(message); },
                const_cast<void*>(static_cast<const void*>(&tell)), TITANS_LOG_WARNING);
  std::optional<FullDisk> full;
  {
    const Stream::Use one(a), other(b);  // both resident, so c is spilled
    full.emplace();
  }
  full.reset();
  core::set_log(nullptr, nullptr, TITANS_LOG_WARNING);
  ASSERT_EQ(told.size(), 2U);
  EXPECT_NE(told[0].find("memory_budget"), std::string::npos);
  EXPECT_EQ(session->metrics().streams.value(), 2U);
  EXPECT_EQ(session->metrics().resident_bytes.value(), 2 * bytes_);
}

// The first of a guard's two buffers fits and the second does not: neither is kept.
TEST_P(SpillTest, AGuardThatHasNoRoom) {
  const auto session = open(2, 16);
  Stream a(session), b(session);
  feed(a, {3, 1, 4});
  std::optional<FullDisk> full(std::in_place);
  titans_guard guard;
  titans_guard_init(&guard);
  const auto set = [&] {
    const Stream::Use use(a);
    a.set_guard(guard);
  };
  expect_error(TITANS_FAILED, {"memory_budget"}, set);
  EXPECT_EQ(a.state_bytes(), bytes_);
  EXPECT_EQ(session->metrics().state_bytes.value(), 2 * bytes_);
  EXPECT_EQ(session->metrics().resident_bytes.value(), 2 * bytes_);
  full.reset();
  set();
  EXPECT_GT(a.state_bytes(), bytes_);
  EXPECT_EQ(feed(a, {1}), row(expected_logits({3, 1, 4, 1}), 3));
}

TEST_P(SpillTest, AFileThatWasAlteredIsRefusedAndTheStreamIsNotLost) {
  const auto session = open(1);
  Stream a(session);
  feed(a, {3, 1, 4});
  Stream b(session);
  const fs::path file = list(spill_.path()).at(0);
  const std::string whole = read_file(file);
  std::string altered = whole;
  altered[altered.size() / 2] = static_cast<char>(altered[altered.size() / 2] ^ 1);
  write_file(file, altered);
  EXPECT_THROW(feed(a, {1}), core::Error);
  EXPECT_EQ(a.position(), 3U);
  write_file(file, whole);
  EXPECT_EQ(feed(a, {1}), row(expected_logits({3, 1, 4, 1}), 3));
}

TEST_P(SpillTest, WhatAKilledProcessHasLeftGoes) {
  const fs::path left = spill_.path() / "titans-spill-abc123";
  const fs::path empty = spill_.path() / "titans-spill-empty1";
  const fs::path foreign = spill_.path() / "titans-spill-foreign";
  const fs::path other = spill_.path() / "notes";
  for (const fs::path& folder : {left, empty, foreign, other}) fs::create_directory(folder);
  write_file(left / "lock", "");
  write_file(left / "0-0.tstate", "TITANSE1");
  write_file(left / "1-0.tstate.tmp", "TITANS");
  write_file(foreign / "lock", "");
  write_file(foreign / "letter.txt", "not ours");
  write_file(other / "0-0.tstate", "somebody's own");
  // Symbolic links to folders are not followed.
  fs::create_directory_symlink(other, spill_.path() / "titans-spill-link12");
  write_file(other / "lock", "");
  const auto session = open(1);
  EXPECT_FALSE(fs::exists(left));
  EXPECT_FALSE(fs::exists(empty));
  EXPECT_TRUE(fs::exists(foreign / "letter.txt"));
  EXPECT_TRUE(fs::exists(other / "0-0.tstate"));
}

TEST_P(SpillTest, TwoSessionsInOneFolder) {
  const auto first = open(1);
  Stream a(first), b(first);
  feed(a, {3, 1});
  {
    const auto second = open(1);
    Stream c(second), d(second);
    feed(c, {2, 7});
    EXPECT_EQ(feed(a, {4}), row(expected_logits({3, 1, 4}), 2));
    EXPECT_EQ(feed(d, {4}), row(expected_logits({4}), 0));
    EXPECT_EQ(feed(c, {4}), row(expected_logits({2, 7, 4}), 2));
  }
  EXPECT_EQ(feed(b, {4}), row(expected_logits({4}), 0));
  EXPECT_EQ(feed(a, {4}), row(expected_logits({3, 1, 4, 4}), 3));
}

// A guard's checkpoint of an earlier position is spilled and restored with the stream.
TEST(SpillGuard, WhatAGuardWouldTakeBackIsTheSame) {
  for (const std::vector<bool>& in_place : {std::vector<bool>{true, true, true}, {false, false, false}}) {
    TemporaryFolder bundle, spill;
    write_packed_bundle(bundle.path());
    const auto run = [&](bool spilled) {
      PackedControl control;
      control.in_place = in_place;
      control.surprising[7] = 1e4F;
      core::SessionOptions options;
      const titans_guard limits{
          sizeof(titans_guard), TITANS_GUARD_SKIP, 1e3F, std::numeric_limits<float>::infinity(), 0, 1};
      if (spilled) {  // room for one guarded stream
        Stream probe(open_packed_session(bundle.path(), control));
        probe.set_guard(limits);
        options.memory_budget = probe.state_bytes();
        options.spill_dir = spill.path();
      }
      const auto session = open_packed_session(bundle.path(), control, options);
      Stream stream(session);
      {
        const Stream::Use use(stream);
        stream.set_guard(limits);
      }
      std::vector<float> logits;
      for (const std::int32_t token : {1, 2, 3, 4, 5, 7, 3, 2, 1, 6, 7, 2}) {
        if (spilled) {
          std::vector<std::unique_ptr<Stream>> others;
          while (list(spill.path()).empty()) others.push_back(std::make_unique<Stream>(session));
        }
        const auto one = feed(stream, {token});
        logits.insert(logits.end(), one.begin(), one.end());
      }
      EXPECT_GT(stream.guard_report().rollbacks, 0U);
      return logits;
    };
    EXPECT_EQ(run(true), run(false));
  }
}

// A process that is killed at any moment does not hinder the next one.
TEST(SpillKilled, TheNextSessionGoesOn) {
  TemporaryFolder bundle, spill;
  write_bundle(bundle.path());
  core::SessionOptions options;
  options.memory_budget = kStreamBytes;
  options.spill_dir = spill.path();
  const char* times = std::getenv("TITANS_TEST_KILLS");
  const int kills = times == nullptr ? 24 : std::atoi(times);
  for (int kill = 0; kill < kills; ++kill) {
    int ready[2];
    ASSERT_EQ(::pipe(ready), 0);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      FakeControl control;
      const auto session = open_fake_session(bundle.path(), control, options);
      Stream a(session), b(session);
      (void)!::write(ready[1], "!", 1);
      while (true) {
        feed(a, {1});
        feed(b, {1});
      }
    }
    char byte = 0;
    ASSERT_EQ(::read(ready[0], &byte, 1), 1);
    std::this_thread::sleep_for(std::chrono::microseconds(37 * kill % 4000));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    for (const int end : ready) ::close(end);
    FakeControl control;
    const auto session = open_fake_session(bundle.path(), control, options);
    EXPECT_EQ(std::distance(fs::directory_iterator(spill.path()), fs::directory_iterator()), 1) << "its own alone";
    Stream a(session), b(session);
    EXPECT_EQ(feed(a, {3, 1}), expected_logits({3, 1}));
    EXPECT_EQ(feed(b, {4}), expected_logits({4}));
    EXPECT_EQ(feed(a, {4}), row(expected_logits({3, 1, 4}), 2));
  }
  EXPECT_TRUE(fs::is_empty(spill.path()));
}

}  // namespace
}  // namespace titans::test
