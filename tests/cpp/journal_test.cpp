#include "state/journal.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>

#include "fake_buffer.h"
#include "packed_executor.h"
#include "stream/stream.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

using core::Stream;
using Tokens = std::vector<std::int32_t>;

// The bytes that a token within a chunk may change: the coefficients and all of the memory without chunks, and one row
// of each field of the open chunk.
constexpr std::size_t kTokenBytes = kPackedHeads * kPackedCoefficientWords * sizeof(float) + kPackedOtherBytes;
constexpr std::size_t kRowBytes = 2 * kPackedHeads * sizeof(float);
constexpr std::size_t kAllBytes = kPackedHeads * kPackedRow * sizeof(float) + kPackedOtherBytes;

Tokens some_tokens(std::size_t count) {
  Tokens tokens;
  for (std::size_t i = 0; i < count; ++i) tokens.push_back(static_cast<std::int32_t>((5 * i * i + 3 * i + 1) % 8));
  return tokens;
}

class JournalTest : public testing::Test {
 protected:
  JournalTest() {
    write_packed_bundle(folder_.path());
    session_ = open_packed_session(folder_.path(), control_);
  }

  static std::vector<float> feed(Stream& stream, const Tokens& tokens) {
    std::vector<float> logits(tokens.size() * kFakeVocab);
    stream.feed(tokens.data(), tokens.size(), TITANS_OUTPUT_ALL, logits.data(), logits.size());
    return logits;
  }

  // Every field of both memories. Rows of the open chunk beyond its fill hold those of earlier chunks, which streams
  // with other calls need not share, so they are left out unless `whole`.
  std::vector<float> memory(const Stream& stream, bool whole = false) const {
    const auto fill = static_cast<std::ptrdiff_t>(stream.position() % static_cast<std::uint64_t>(kPackedChunk));
    std::vector<float> all;
    for (std::size_t index = 0; index < session_->memories().size(); ++index) {
      const core::MemoryView& field = session_->memories()[index];
      std::vector<float> values(field.elements);
      stream.read_memory(index, values.data(), values.size());
      const bool is_chunk =
          field.name.find("seen") != std::string::npos || field.name.find("wanted") != std::string::npos;
      for (auto head = values.begin(); head != values.end(); head += static_cast<std::ptrdiff_t>(field.extent)) {
        all.insert(all.end(), head, head + (is_chunk && !whole ? fill : static_cast<std::ptrdiff_t>(field.extent)));
      }
    }
    return all;
  }

  TemporaryFolder folder_;
  PackedControl control_;
  std::shared_ptr<core::Session> session_;
};

// The number of tokens before the failing feed, and in it.
class FailedFeedTest : public JournalTest, public testing::WithParamInterface<std::pair<std::size_t, std::size_t>> {};

INSTANTIATE_TEST_SUITE_P(Journal, FailedFeedTest,
                         testing::Values(std::pair{0, 1}, std::pair{1, 1}, std::pair{4, 2},  // within a chunk
                                         std::pair{3, 1}, std::pair{2, 2}, std::pair{4, 4},  // up to its end
                                         std::pair{1, 3}, std::pair{1, 26}, std::pair{3, 30}, std::pair{6, 25}),
                         [](const auto& info) {
                           return std::to_string(info.param.first) + "Then" + std::to_string(info.param.second);
                         });

TEST_P(FailedFeedTest, LeavesTheStreamAsItWasWhicheverCallFails) {
  const Tokens tokens = some_tokens(GetParam().first + GetParam().second + 9);
  const auto head_end = tokens.begin() + static_cast<std::ptrdiff_t>(GetParam().first);
  const auto tail_end = head_end + static_cast<std::ptrdiff_t>(GetParam().second);
  const Tokens head(tokens.begin(), head_end);
  const Tokens tail(head_end, tail_end);
  const Tokens rest(tail_end, tokens.end());

  Stream twin(session_);
  feed(twin, head);
  const std::vector<float> memory_before = memory(twin);
  const std::vector<float> last_before = twin.last_output();
  const std::size_t calls_before = control_.calls.size();
  const std::vector<float> tail_logits = feed(twin, tail);
  const auto calls = static_cast<int>(control_.calls.size() - calls_before);
  const std::vector<float> rest_logits = feed(twin, rest);
  ASSERT_TRUE(std::none_of(rest_logits.begin(), rest_logits.end(), [](float x) { return std::isnan(x); }));

  for (int call = 0; call < calls; ++call) {
    Stream stream(session_);
    feed(stream, head);
    const std::vector<float> whole_before = memory(stream, true);
    for (int again = 0; again < 2; ++again) {
      control_.fail_at = static_cast<int>(control_.calls.size()) + call;
      expect_error(TITANS_FAILED, {" failed"}, [&] { feed(stream, tail); });
      EXPECT_EQ(stream.position(), head.size());
      EXPECT_EQ(stream.last_output(), last_before);
      EXPECT_EQ(memory(stream), memory_before) << call;
      EXPECT_EQ(memory(stream, true), whole_before) << call;  // no trace of the tokens
    }
    const auto fork = stream.fork();
    for (Stream* one : {&stream, fork.get()}) {
      EXPECT_EQ(feed(*one, tail), tail_logits) << call;
      EXPECT_EQ(feed(*one, rest), rest_logits) << call;
      EXPECT_EQ(memory(*one), memory(twin)) << call;
    }
  }
}

TEST_F(JournalTest, ATokenWithinAChunkCopiesTheCoefficientsAndItsRow) {
  Stream stream(session_);
  const auto copied = [&](const Tokens& tokens) -> std::size_t {
    control_.traffic.bytes_copied = 0;
    feed(stream, tokens);
    return control_.traffic.bytes_copied;
  };
  for (int token = 0; token < 3; ++token) EXPECT_EQ(copied({1}), kTokenBytes + kRowBytes) << token;
  EXPECT_EQ(copied({1}), kAllBytes);                       // completes the chunk
  EXPECT_EQ(copied({1, 2}), kTokenBytes + 2 * kRowBytes);  // one call
  EXPECT_EQ(copied({1}), kTokenBytes + kRowBytes);         // to position 7
  EXPECT_EQ(copied(some_tokens(17)), kAllBytes);           // many calls, but each byte is copied at most once
  EXPECT_EQ(copied({}), 0U);
  EXPECT_EQ(stream.position(), 24U);
}

TEST_F(JournalTest, AResetThatFailsLeavesTheStreamAsItWas) {
  Stream stream(session_);
  Stream twin(session_);
  feed(stream, some_tokens(6));
  feed(twin, some_tokens(6));
  for (int uploads = 0; uploads < 3; ++uploads) {
    control_.traffic.uploads_before_a_failure = uploads;
    expect_error(TITANS_FAILED, {" failed"}, [&] { stream.reset(); });
    control_.traffic.uploads_before_a_failure.reset();
    EXPECT_EQ(memory(stream), memory(twin));
  }
  EXPECT_EQ(feed(stream, some_tokens(7)), feed(twin, some_tokens(7)));
  stream.reset();
  EXPECT_EQ(memory(stream), memory(Stream(session_)));
}

// A cache [1, 2, 11, 3]. Row r of the stream writes the rows 1 + r % 5 and 6 + r % 5. A row is a token, or two
// additional rows follow every three tokens.
class JournalOfACache : public testing::TestWithParam<core::StreamRows> {
 protected:
  static constexpr std::uint64_t kPeriod = 5;
  static constexpr std::size_t kRows = 11, kWidth = 3, kHeads = 2;

  JournalOfACache() {
    journal_.watch(state_, live_, backup_);
    std::iota(live_.values.begin(), live_.values.end(), 1.0F);
  }

  // A call that consumes the tokens and leaves values in their rows that must never become visible.
  void call(std::uint64_t position, std::uint64_t tokens) {
    journal_.save_for(position, tokens);
    for (std::uint64_t row_of_stream = state_.rows.before(position);
         row_of_stream < state_.rows.before(position + tokens); ++row_of_stream) {
      for (const std::size_t first : state_.written->first) {
        for (std::size_t head = 0; head < kHeads; ++head) {
          const auto row = static_cast<std::ptrdiff_t>(((head * kRows) + first + row_of_stream % kPeriod) * kWidth);
          std::fill_n(live_.values.begin() + row, kWidth, std::nanf(""));
        }
      }
    }
  }

  const core::StateTensor state_{"keys",
                                 "in",
                                 "out",
                                 core::DType::kFloat32,
                                 {1, kHeads, kRows, kWidth},
                                 kHeads * kRows * kWidth * sizeof(float),
                                 "cache",
                                 {},
                                 core::WrittenRows{2, {1, 6}, kPeriod},
                                 std::nullopt,
                                 GetParam()};
  FakeTraffic traffic_;
  FakeBuffer live_{state_.bytes, traffic_};
  FakeBuffer backup_{state_.bytes, traffic_};
  core::Journal journal_;
};

INSTANTIATE_TEST_SUITE_P(Journal, JournalOfACache, testing::Values(core::StreamRows{}, core::StreamRows{3, 2}),
                         [](const auto& info) {
                           return info.param.longterm == 0 ? "RowsAreTokens" : "RowsFollowTokens";
                         });

TEST_P(JournalOfACache, PutsBackWhateverCallsHaveWritten) {
  const std::vector<float> before = live_.values;
  for (std::uint64_t start = 0; start < 2 * kPeriod; ++start) {
    for (std::uint64_t tokens = 1; tokens < 3 * kPeriod; ++tokens) {
      for (const std::uint64_t a_call : {1, 2, 3, 7}) {
        journal_.begin();
        for (std::uint64_t done = 0; done < tokens; done += a_call) call(start + done, std::min(a_call, tokens - done));
        journal_.restore();
        ASSERT_EQ(live_.values, before) << start << " " << tokens << " " << a_call;
      }
    }
  }
}

TEST_P(JournalOfACache, SavesTheRowsOfItsTokensAndNoneTwice) {
  constexpr std::size_t kToken = 2 * kHeads * kWidth * sizeof(float);
  const auto saved = [&](std::uint64_t start, std::uint64_t tokens) -> std::size_t {
    traffic_.bytes_copied = 0;
    journal_.begin();
    for (std::uint64_t done = 0; done < tokens; ++done) journal_.save_for(start + done, 1);
    return traffic_.bytes_copied;
  };
  if (state_.rows.longterm == 0) {
    EXPECT_EQ(saved(3, 1), kToken);
    EXPECT_EQ(saved(10, 1), kToken);
    EXPECT_EQ(saved(11, 3), 3 * kToken);
  } else {
    EXPECT_EQ(saved(2, 1), 3 * kToken);  // its own row and the two after it
    EXPECT_EQ(saved(3, 1), kToken);
    EXPECT_EQ(saved(3, 2), 2 * kToken);
  }
  for (const std::uint64_t tokens : {4, 5, 6, 50}) EXPECT_EQ(saved(12, tokens), kPeriod * kToken);
}

// Two rows of 16 words in chunks of 4, modified by `change`. Returns the bytes saved for a token within a chunk.
template <typename Change>
std::size_t bytes_saved_within_a_chunk(Change&& change) {
  using core::Written;
  core::StateTensor state{"memory", "in", "out", core::DType::kFloat32, {1, 2, 16}, 128, "memory", {}};
  state.chunk = 4;
  state.layout = {{"w", 0, {2}, core::FieldDtype::kFloat32, "weights", Written::kChunk},
                  {"rows", 2, {4}, core::FieldDtype::kFloat32, "open_chunk", Written::kRow},
                  {"x", 6, {3}},
                  {"y", 9, {3}},
                  {"z", 14, {}}};
  change(state);
  FakeTraffic traffic;
  FakeBuffer live(state.bytes, traffic);
  FakeBuffer backup(state.bytes, traffic);
  core::Journal journal;
  journal.watch(state, live, backup);
  journal.begin();
  journal.save_for(1, 1);
  return traffic.bytes_copied;
}

// Calls of every size from every position write rows, coefficients and, at the end of a chunk, all other fields.
// Whichever of them a change makes, it leaves no trace.
TEST(Journal, LeavesNoRowOfAFailedCall) {
  using core::FieldDtype;
  using core::Written;
  constexpr std::uint64_t kChunk = 4;
  for (const FieldDtype dtype : {FieldDtype::kFloat32, FieldDtype::kBFloat16, FieldDtype::kInt8}) {
    const core::Shape shape{static_cast<std::int64_t>(kChunk), 3};  // with 16 bits, rows share words
    const std::size_t words = core::field_words(dtype, shape);
    const auto row = static_cast<std::int64_t>(4 + words);
    core::StateTensor state{"memory", "in", "out", core::DType::kFloat32, {1, 2, row}, 8 * (4 + words), "memory", {}};
    state.chunk = kChunk;
    state.layout = {{"w", 0, {2}, FieldDtype::kFloat32, "weights", Written::kChunk},
                    {"rows", 2, shape, dtype, "open_chunk", Written::kRow},
                    {"x", 2 + words, {2}}};
    FakeTraffic traffic;
    FakeBuffer live(state.bytes, traffic);
    FakeBuffer backup(state.bytes, traffic);
    std::iota(live.values.begin(), live.values.end(), 1.0F);
    const std::vector<float> before = live.values;
    core::Journal journal;
    journal.watch(state, live, backup);
    const auto call = [&](std::uint64_t position, std::uint64_t tokens) {
      journal.save_for(position, tokens);
      for (std::uint64_t token = position; token < position + tokens; ++token) {
        for (std::size_t head = 0; head < 2; ++head) {
          float* const packed = live.values.data() + head * static_cast<std::size_t>(row);
          auto* const bytes = reinterpret_cast<unsigned char*>(packed + 2);
          const std::size_t size = dtype == FieldDtype::kFloat32 ? 12 : dtype == FieldDtype::kBFloat16 ? 6 : 3;
          std::fill_n(bytes + token % kChunk * size, size, static_cast<unsigned char>(0x40 + token));
          packed[2 + words] = packed[3 + words] = -1.0F;
          if (token % kChunk == kChunk - 1) packed[0] = packed[1] = -2.0F;
        }
      }
    };
    for (std::uint64_t start = 0; start < 2 * kChunk; ++start) {
      for (std::uint64_t tokens = 1; tokens < 3 * kChunk; ++tokens) {
        for (const std::uint64_t a_call : {1, 2, 3, 5}) {
          journal.begin();
          for (std::uint64_t done = 0; done < tokens; done += a_call) {
            call(start + done, std::min(a_call, tokens - done));
          }
          if (tokens % 2 == 0) journal.save_all();
          journal.restore();
          ASSERT_EQ(0, std::memcmp(live.values.data(), before.data(), state.bytes))
              << start << " " << tokens << " " << a_call;
        }
      }
    }
  }
}

TEST(Journal, SavesTheFieldsThatATokenWrites) {
  using core::StateTensor;
  using core::Written;
  const auto words = [](auto&& change) { return bytes_saved_within_a_chunk(change) / 2 / sizeof(float); };
  EXPECT_EQ(words([](StateTensor&) {}), 8U);
  EXPECT_EQ(words([](StateTensor& state) { std::reverse(state.layout.begin(), state.layout.end()); }), 8U);
  EXPECT_EQ(words([](StateTensor& state) { state.layout[3].written = Written::kChunk; }), 5U);
  EXPECT_EQ(words([](StateTensor& state) { state.layout[0].written = Written::kToken; }), 10U);
  EXPECT_EQ(words([](StateTensor& state) { state.layout[3].offset = 7; }), 6U);  // overlapping fields are saved once
  EXPECT_EQ(words([](StateTensor& state) { state.layout[2] = {"x", 6, {3}, core::FieldDtype::kBFloat16}; }), 7U);
  EXPECT_EQ(words([](StateTensor& state) { state.layout.clear(); }), 0U);
  // A tensor without chunks is saved whole.
  EXPECT_EQ(words([](StateTensor& state) { state.chunk.reset(); }), 16U);
}

TEST(Journal, AMemoryWithOneGateAChunkIsSavedWhereOneEnds) {
  core::StateTensor state{"memory", "in", "out", core::DType::kFloat32, {1, 2, 16}, 128, "memory", {}};
  state.chunk = 4;
  state.rows = {6, 2};
  FakeTraffic traffic;
  FakeBuffer live(state.bytes, traffic);
  FakeBuffer backup(state.bytes, traffic);
  std::iota(live.values.begin(), live.values.end(), 1.0F);
  const std::vector<float> before = live.values;
  core::Journal journal;
  journal.watch(state, live, backup);
  // Chunks end with rows 3 and 7: those of token 3, and the additional rows after token 5.
  for (std::uint64_t position = 0; position < 12; ++position) {
    traffic.bytes_copied = 0;
    journal.begin();
    journal.save_for(position, 1);
    const bool ends = position % 6 == 3 || position % 6 == 5;
    EXPECT_EQ(traffic.bytes_copied, ends ? 128U : 0U) << position;
    if (ends) std::fill(live.values.begin(), live.values.end(), -1.0F);
    journal.restore();
    EXPECT_EQ(live.values, before) << position;
  }
  journal.begin();
  journal.save_for(0, 6);
  EXPECT_EQ(traffic.bytes_copied, 3 * 128U);  // and the copies that undo the last change
}

}  // namespace
}  // namespace titans::test
