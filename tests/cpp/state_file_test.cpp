// State files: the written contents, all rejections, and states in another dtype.
#include "state/state_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/durable_file.h"
#include "base/file_descriptor.h"
#include "fake_executor.h"
#include "packed_executor.h"
#include "state/state_convert.h"
#include "stream/stream.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

using core::Stream;
using core::StreamState;
using nlohmann::json;
using Tokens = std::vector<std::int32_t>;

constexpr std::size_t kVocab = 8;
const Tokens kTokens{3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 0, 7, 7};
const core::StateKey kKey{1, 2, 3, 4, 5};

std::vector<float> feed(Stream& stream, const Tokens& tokens) {
  std::vector<float> logits(tokens.size() * kVocab);
  stream.feed(tokens.data(), tokens.size(), TITANS_OUTPUT_ALL, logits.data(), logits.size());
  return logits;
}

Tokens part(std::size_t begin, std::size_t end) {
  return {kTokens.begin() + static_cast<std::ptrdiff_t>(begin), kTokens.begin() + static_cast<std::ptrdiff_t>(end)};
}

std::vector<float> expected_tail(std::size_t cut) {
  const std::vector<float> all = expected_logits(kTokens);
  return {all.begin() + static_cast<std::ptrdiff_t>(cut * kVocab), all.end()};
}

class StateTest : public testing::TestWithParam<std::vector<bool>> {
 protected:
  StateTest() {
    std::filesystem::create_directory(folder_.path() / "model");
    write_bundle(folder_.path() / "model");
    control_.in_place = GetParam();
    session_ = open_fake_session(folder_.path() / "model", control_);
  }

  TemporaryFolder folder_;
  std::filesystem::path file_ = folder_.path() / "one.tstate";
  FakeControl control_;
  std::shared_ptr<core::Session> session_;
};

INSTANTIATE_TEST_SUITE_P(Buffers, StateTest,
                         testing::Values(std::vector<bool>{false, false}, std::vector<bool>{true, true},
                                         std::vector<bool>{true, false}),
                         [](const auto& info) {
                           return std::string(info.param[0] ? "InPlace" : "Swap") +
                                  (info.param[1] ? "InPlace" : "Swap");
                         });

TEST_P(StateTest, ARestoredStreamGoesOnAtAnyCut) {
  for (std::size_t cut = 0; cut <= kTokens.size(); ++cut) {
    for (const core::StateKey* key : {static_cast<const core::StateKey*>(nullptr), &kKey}) {
      Stream stream(session_);
      feed(stream, part(0, cut));
      save_state(file_, session_->state_schema(), stream.state(), key);
      Stream restored(session_, load_state(file_, session_->state_schema(), key));
      EXPECT_EQ(restored.position(), cut);
      EXPECT_EQ(restored.last_output(), stream.last_output());  // zeros, as of a fresh stream
      ASSERT_EQ(feed(restored, part(cut, kTokens.size())), expected_tail(cut)) << cut;
      ASSERT_EQ(feed(stream, part(cut, kTokens.size())), expected_tail(cut)) << cut;
    }
  }
  EXPECT_FALSE(std::filesystem::exists(file_.string() + ".tmp"));
}

TEST_P(StateTest, AFrozenStreamStaysFrozen) {
  Stream stream(session_);
  stream.set_learning(false);
  feed(stream, part(0, 3));
  save_state(file_, session_->state_schema(), stream.state(), nullptr);
  EXPECT_FALSE(Stream(session_, load_state(file_, session_->state_schema(), nullptr)).learning());
}

TEST_P(StateTest, AStateThatCannotBeTakenChangesNothing) {
  Stream stream(session_), other(session_);
  feed(stream, part(0, 5));
  feed(other, {7, 7, 7});
  for (int uploads = 0; uploads < 2; ++uploads) {
    control_.traffic.uploads_before_a_failure = uploads;
    expect_error(TITANS_FAILED, {"the upload failed"}, [&] { stream.set_state(other.state()); });
    control_.traffic.uploads_before_a_failure.reset();
    EXPECT_EQ(stream.position(), 5U);
  }
  StreamState short_one = other.state();
  short_one.tensors[0].pop_back();
  expect_error(TITANS_INVALID_ARGUMENT, {"state of another model"}, [&] { stream.set_state(short_one); });
  EXPECT_EQ(feed(stream, part(5, kTokens.size())), expected_tail(5));
}

TEST_P(StateTest, MarksAreGoneBackTo) {
  Stream stream(session_);
  const std::uint64_t bytes = stream.state_bytes();
  feed(stream, part(0, 3));
  EXPECT_EQ(stream.mark(), 3U);
  EXPECT_EQ(stream.state_bytes(), bytes + 5 * sizeof(float) + kVocab * sizeof(float));
  feed(stream, part(3, 6));
  EXPECT_EQ(stream.mark(), 6U);
  stream.set_learning(false);
  feed(stream, {7, 7, 7, 7, 7});
  stream.rewind(6);
  EXPECT_TRUE(stream.learning());
  EXPECT_EQ(stream.marks(), (std::vector<std::uint64_t>{3, 6}));
  EXPECT_EQ(feed(stream, part(6, kTokens.size())), expected_tail(6));
  stream.rewind(3);
  EXPECT_EQ(stream.marks(), (std::vector<std::uint64_t>{3}));
  EXPECT_EQ(stream.mark(), 3U);  // replaces the previous mark
  feed(stream, {1, 2});
  stream.rewind(3);
  EXPECT_EQ(feed(stream, part(3, kTokens.size())), expected_tail(3));
  expect_error(TITANS_INVALID_ARGUMENT, {"no mark at position 6", "marks are at 3"}, [&] { stream.rewind(6); });
  EXPECT_TRUE(stream.fork()->marks().empty());
  stream.unmark(3);
  EXPECT_EQ(stream.state_bytes(), bytes);
  expect_error(TITANS_INVALID_ARGUMENT, {"no marks"}, [&] { stream.unmark(3); });
  stream.mark();
  stream.reset();
  EXPECT_TRUE(stream.marks().empty());
  EXPECT_EQ(session_->metrics().state_bytes.value(), bytes);
}

TEST_P(StateTest, ARewindThatFailsChangesNothing) {
  Stream stream(session_);
  feed(stream, part(0, 2));
  stream.mark();
  feed(stream, part(2, 5));
  stream.mark();
  feed(stream, part(5, 8));
  control_.traffic.uploads_before_a_failure = 1;
  expect_error(TITANS_FAILED, {"the upload failed"}, [&] { stream.rewind(2); });
  control_.traffic.uploads_before_a_failure.reset();
  EXPECT_EQ(stream.marks(), (std::vector<std::uint64_t>{2, 5}));
  EXPECT_EQ(feed(stream, part(8, kTokens.size())), expected_tail(8));
}

// ---- rejected files ----

class StateFileTest : public testing::Test {
 protected:
  StateFileTest() {
    std::filesystem::create_directory(folder_.path() / "model");
    write_bundle(folder_.path() / "model");
    session_ = open_fake_session(folder_.path() / "model", control_);
    Stream stream(session_);
    feed(stream, kTokens);
    save_state(file_, session_->state_schema(), stream.state(), nullptr);
    content_ = read_file(file_);
  }

  // The header's JSON. The second function writes the file again with a changed header and the correct hash.
  json header() const {
    std::uint64_t length = 0;
    std::memcpy(&length, content_.data(), sizeof(length));
    return json::parse(content_.substr(8, length));
  }
  std::string data() const {
    std::uint64_t length = 0;
    std::memcpy(&length, content_.data(), sizeof(length));
    return content_.substr(8 + length);
  }
  void write_sealed(json changed, const std::string& tensors) const {
    const std::string zeros(32, '0');
    changed["__metadata__"]["xxh3_128"] = zeros;
    std::string whole = safetensors(changed.dump(), tensors);
    write_file(file_, whole);
    const std::string hash = core::MappedFile(file_).hash();
    const std::size_t at = whole.find(zeros);
    ASSERT_NE(at, std::string::npos);
    write_file(file_, whole.replace(at, zeros.size(), hash));
  }
  void refused(titans_status status, const std::vector<std::string>& words) const {
    std::vector<std::string> all = words;
    all.emplace_back("one.tstate");
    expect_error(status, all, [&] { load_state(file_, session_->state_schema(), nullptr); });
  }

  TemporaryFolder folder_;
  std::filesystem::path file_ = folder_.path() / "one.tstate";
  FakeControl control_;
  std::shared_ptr<core::Session> session_;
  std::string content_;
};

TEST_F(StateFileTest, TensorsAreAligned) {
  std::uint64_t length = 0;
  std::memcpy(&length, content_.data(), sizeof(length));
  EXPECT_EQ((8 + length) % 64, 0U);
  write_sealed(header(), data());
  EXPECT_EQ(load_state(file_, session_->state_schema(), nullptr).position, kTokens.size());
}

TEST_F(StateFileTest, CutAtEveryLength) {
  for (std::size_t length = 0; length < content_.size(); ++length) {
    write_file(file_, content_.substr(0, length));
    refused(TITANS_FAILED, {});
    expect_error(TITANS_FAILED, {}, [&] { core::read_state(file_, nullptr); });
  }
  write_file(file_, content_.substr(0, content_.size() - 1));
  refused(TITANS_FAILED, {"truncated", "restore an older copy"});
  write_file(file_, content_ + "x");
  refused(TITANS_FAILED, {"extra bytes"});
}

TEST_F(StateFileTest, EveryByteAltered) {
  for (std::size_t at = 0; at < content_.size(); ++at) {
    for (const int flip : {1, 0x80, 0xFF}) {
      std::string altered = content_;
      altered[at] = static_cast<char>(altered[at] ^ flip);
      write_file(file_, altered);
      try {
        load_state(file_, session_->state_schema(), nullptr);
        ADD_FAILURE() << "byte " << at << " flipped by " << flip;
      } catch (const core::Error& error) {
        // If the byte is a digit of the version, the file appears to be of a newer version.
        EXPECT_TRUE(error.status() == TITANS_FAILED || error.status() == TITANS_UNSUPPORTED) << error.what();
      }
    }
  }
  content_[content_.size() - 1] = static_cast<char>(content_.back() ^ 1);
  write_file(file_, content_);
  refused(TITANS_FAILED, {"altered", "restore an older copy"});
}

TEST_F(StateFileTest, ANewerVersion) {
  json changed = header();
  changed["__metadata__"]["schema_version"] = "3";
  write_file(file_, safetensors(changed.dump(), data()));  // the version is checked before the hash
  refused(TITANS_UNSUPPORTED, {"newer schema", "schema_version 2", "got 3", "install", "TITANS-E0402"});
}

TEST_F(StateFileTest, AnOlderVersion) {
  json changed = header();
  changed["__metadata__"]["schema_version"] = "1";
  write_file(file_, safetensors(changed.dump(), data()));
  refused(TITANS_UNSUPPORTED, {"older schema", "schema_version 2", "got 1", "feed the stream again", "TITANS-E0403"});
}

TEST_F(StateFileTest, AnotherKindOfFile) {
  json changed = header();
  changed["__metadata__"]["format"] = "titans-bundle";
  write_sealed(changed, data());
  refused(TITANS_FAILED, {"not a state file"});
  changed.erase("__metadata__");
  write_file(file_, safetensors(changed.dump(), data()));
  refused(TITANS_FAILED, {"not a state file"});
  std::filesystem::remove(file_);
  refused(TITANS_FAILED, {"No such file"});
  std::filesystem::create_directory(file_);
  refused(TITANS_FAILED, {"not a regular file"});
}

TEST_F(StateFileTest, WhatIsSealedAndWrongAllTheSame) {
  const auto with = [&](const char* key, const std::string& value) {
    json changed = header();
    changed["__metadata__"][key] = value;
    write_sealed(changed, data());
  };
  with("position", "-1");
  refused(TITANS_FAILED, {"position", "a count of tokens"});
  with("position", "9223372036854775808");
  refused(TITANS_FAILED, {"position"});
  with("learning", "yes");
  refused(TITANS_FAILED, {"learning"});
  with("model", "[]");
  refused(TITANS_FAILED, {"a JSON object"});
  with("state", "{}");
  refused(TITANS_FAILED, {"state"});
  with("state", R"([{"name":"layers.0.memory","role":"memory","dtype":"float32","shape":[4611686018427387904,4]}])");
  refused(TITANS_FAILED, {"fits into memory"});
  with("state", "[]");
  refused(TITANS_FAILED, {"layers.0.memory", "got none", "of the model"});

  json states = json::parse(header()["__metadata__"]["state"].get<std::string>());
  states.push_back({{"name", "layers.9.more"}, {"role", "cache"}, {"dtype", "float32"}, {"shape", {1}}});
  with("state", states.dump());
  refused(TITANS_FAILED, {"layers.9.more", "a bundle without it"});
  states.erase(2);
  states[1]["shape"] = {1, 2};
  with("state", states.dump());
  refused(TITANS_FAILED, {"layers.0.last", "[1, 1]", "[1, 2]"});
  states[1]["shape"] = {1, 1};
  states[0]["layout"][0]["shape"] = {1, 1};
  with("state", states.dump());
  refused(TITANS_FAILED, {"layers.0.memory", "a field W0 [1, 1]"});
  states[0]["layout"][0] = {{"name", "W0"}, {"offset", 3}, {"shape", {1, 2}}};
  with("state", states.dump());
  refused(TITANS_FAILED, {"offset"});

  json changed = header();
  changed.erase("last_output");  // the last tensor in the file
  write_sealed(changed, data().substr(0, data().size() - kVocab * sizeof(float)));
  refused(TITANS_FAILED, {"missing tensor last_output"});
}

TEST_F(StateFileTest, AnotherModel) {
  TemporaryFolder other;
  json manifest = manifest_json();
  manifest["model"] = {{"name", "other"}, {"source", {{"weights_sha256", "abc123"}}}};
  write_bundle(other.path(), manifest);
  const auto session = open_fake_session(other.path(), control_);
  expect_error(TITANS_FAILED, {"expected other (weights abc123)", "fake (weights "},
               [&] { load_state(file_, session->state_schema(), nullptr); });
  // Another bundle of the same checkpoint is the same model, even if its files differ.
  save_state(file_, session->state_schema(), Stream(session).state(), nullptr);
  TemporaryFolder third;
  manifest["model"]["name"] = "other-quantised";
  write_bundle(third.path(), manifest);
  write_file(third.path() / "weights.safetensors",
             safetensors(R"({"E": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})", float_bytes({9, 9})));
  write_manifest(third.path(), manifest);
  EXPECT_EQ(load_state(file_, open_fake_session(third.path(), control_)->state_schema(), nullptr).position, 0U);
  manifest["model"]["source"]["weights_sha256"] = "abc124";
  write_manifest(third.path(), manifest);
  expect_error(TITANS_FAILED, {"expected other-quantised (weights abc124)", "other (weights abc123)"},
               [&] { load_state(file_, open_fake_session(third.path(), control_)->state_schema(), nullptr); });
}

TEST_F(StateFileTest, Encrypted) {
  Stream stream(session_);
  feed(stream, part(0, 4));
  save_state(file_, session_->state_schema(), stream.state(), &kKey);
  const std::string sealed = read_file(file_);
  EXPECT_EQ(sealed.substr(0, 8), "TITANSE1");
  EXPECT_EQ(sealed.find("titans-state"), std::string::npos);
  save_state(file_, session_->state_schema(), stream.state(), &kKey);
  EXPECT_NE(read_file(file_).substr(8, 12), sealed.substr(8, 12)) << "a nonce is used once";
  expect_error(TITANS_INVALID_ARGUMENT, {"one.tstate", "no key was given"},
               [&] { load_state(file_, session_->state_schema(), nullptr); });
  core::StateKey wrong = kKey;
  wrong[31] ^= 1;
  expect_error(TITANS_FAILED, {"one.tstate", "wrong key"},
               [&] { load_state(file_, session_->state_schema(), &wrong); });
  for (std::size_t at = 0; at < sealed.size(); ++at) {
    std::string altered = sealed;
    altered[at] = static_cast<char>(altered[at] ^ 1);
    write_file(file_, altered);
    expect_error(TITANS_FAILED, {"one.tstate"}, [&] { load_state(file_, session_->state_schema(), &kKey); });
    write_file(file_, sealed.substr(0, at));
    expect_error(TITANS_FAILED, {"one.tstate"}, [&] { load_state(file_, session_->state_schema(), &kKey); });
  }
  write_file(file_, content_);
  expect_error(TITANS_FAILED, {"a key was given", "without encryption"},
               [&] { load_state(file_, session_->state_schema(), &kKey); });
}

TEST_F(StateFileTest, ASizeBeyondThisModelIsNotRead) {
  std::filesystem::resize_file(file_, std::uintmax_t{1} << 40);  // a sparse file
  refused(TITANS_FAILED, {"at most", "1099511627776"});
}

// Rejecting a header of a million small values takes time linear in its length.
TEST_F(StateFileTest, AHeaderOfManyValues) {
  json header = this->header();
  json& padding = header["__metadata__"]["pad"] = json::array();
  for (const auto& [count, word] : {std::pair(500'000, "a string"), std::pair(1'000'000, "more than 1048576 values")}) {
    while (padding.size() < static_cast<std::size_t>(count)) padding.push_back(json::object());
    write_sealed(header, data());
    expect_error(TITANS_FAILED, {word}, [&] { core::read_state(file_, nullptr); });
  }
  header["__metadata__"]["pad"] = std::string(std::size_t{17} << 20, ' ');
  write_sealed(header, data());
  expect_error(TITANS_FAILED, {"header"}, [&] { core::read_state(file_, nullptr); });
}

TEST_F(StateFileTest, WhatReadersWithoutTheModelRelyOn) {
  const auto refused_reading = [&](const json& header) {
    write_sealed(header, data());
    expect_error(TITANS_FAILED, {"damaged"}, [&] { core::read_state(file_, nullptr); });
  };
  for (const char* field : {"position", "learning", "model", "state"}) {
    json header = this->header();
    header["__metadata__"].erase(field);
    refused_reading(header);
  }
  const json good = header();
  json unknown = good;
  unknown["another"] = {{"dtype", "F8_E5M2"}, {"shape", {0}}, {"data_offsets", {0, 0}}};
  write_sealed(unknown, data());
  expect_error(TITANS_FAILED, {"a dtype that this runtime has"}, [&] { core::read_state(file_, nullptr); });
  unknown["another"]["dtype"] = "F32";
  write_sealed(unknown, data());
  expect_error(TITANS_FAILED, {"unexpected tensor another"}, [&] { core::read_state(file_, nullptr); });
  json bare = good;
  bare["__metadata__"]["state"] = "[]";
  write_sealed(bare, data());
  expect_error(TITANS_FAILED, {"unexpected tensor"}, [&] { core::read_state(file_, nullptr); });
}

TEST_F(StateFileTest, ASizeBeyondThisMachineIsNotRead) {
  std::filesystem::resize_file(file_, std::uintmax_t{1} << 43);
  expect_error(TITANS_FAILED, {"at most", "8796093022208"}, [&] { core::read_state(file_, nullptr); });
}

// ---- files that are renamed into place ----

TEST_F(StateFileTest, WhatAKilledWriterLeftIsRemoved) {
  const std::filesystem::path aside = file_.string() + ".tmp";
  write_file(aside, "half a state");
  Stream stream(session_);
  save_state(file_, session_->state_schema(), stream.state(), nullptr);
  EXPECT_FALSE(std::filesystem::exists(aside));
  EXPECT_EQ(load_state(file_, session_->state_schema(), nullptr).position, 0U);
  EXPECT_EQ(std::filesystem::status(file_).permissions(),
            std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
}

TEST_F(StateFileTest, AWriterWaitsForTheOneBefore) {
  const std::filesystem::path aside = file_.string() + ".tmp";
  write_file(aside, "");
  const int held = ::open(aside.c_str(), O_RDONLY);
  ASSERT_EQ(::flock(held, LOCK_EX), 0);
  bool released = false;
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    released = true;
    ::close(held);
  });
  save_state(file_, session_->state_schema(), Stream(session_).state(), nullptr);
  other.join();
  EXPECT_TRUE(released);
}

// Waits at most so long, and says which file is held.
TEST_F(StateFileTest, AWriterDoesNotWaitForEver) {
  const std::filesystem::path aside = file_.string() + ".tmp";
  write_file(aside, "");
  const core::FileDescriptor held(::open(aside.c_str(), O_RDONLY));
  ASSERT_EQ(::flock(held.get(), LOCK_EX), 0);
  const auto patience = std::exchange(core::FileAside::patience, std::chrono::milliseconds(50));
  expect_error(TITANS_FAILED, {"one.tstate", "another writer", "TITANS-E0412"},
               [&] { save_state(file_, session_->state_schema(), Stream(session_).state(), nullptr); });
  core::FileAside::patience = patience;
  EXPECT_EQ(read_file(file_), content_);
}

// The writer is killed while a child lives that it forked meanwhile. The child has no lock.
TEST_F(StateFileTest, AChildOfAKilledWriterHoldsNoLock) {
  int pipe[2];
  ASSERT_EQ(::pipe(pipe), 0);
  const pid_t writer = ::fork();
  if (writer == 0) {
    core::FileAside file(file_, core::Durability::kPower);
    file.append("half", 4);
    const pid_t child = ::fork();
    if (child == 0) {
      for (;;) ::pause();
    }
    if (::write(pipe[1], &child, sizeof(child)) == sizeof(child)) ::raise(SIGKILL);
    ::_exit(1);
  }
  pid_t child = 0;
  ASSERT_EQ(::read(pipe[0], &child, sizeof(child)), static_cast<ssize_t>(sizeof(child)));
  int status = 0;
  ASSERT_EQ(::waitpid(writer, &status, 0), writer);
  ASSERT_TRUE(WIFSIGNALED(status));
  const auto began = std::chrono::steady_clock::now();
  save_state(file_, session_->state_schema(), Stream(session_).state(), nullptr);
  EXPECT_LT(std::chrono::steady_clock::now() - began, std::chrono::seconds(20));
  ::kill(child, SIGKILL);
  ::close(pipe[0]);
  ::close(pipe[1]);
}

TEST_F(StateFileTest, ManyWritersOfOneFile) {
  std::vector<std::thread> writers;
  for (std::size_t writer = 0; writer < 4; ++writer) {
    writers.emplace_back([&, writer] {
      Stream stream(session_);
      feed(stream, part(0, writer + 1));
      for (int i = 0; i < 20; ++i) {
        save_state(file_, session_->state_schema(), stream.state(), nullptr);
        const StreamState read = load_state(file_, session_->state_schema(), nullptr);
        EXPECT_GE(read.position, 1U);
        EXPECT_LE(read.position, 4U + kTokens.size());
      }
    });
  }
  for (std::thread& writer : writers) writer.join();
  EXPECT_FALSE(std::filesystem::exists(file_.string() + ".tmp"));
}

TEST_F(StateFileTest, AFailedSaveLeavesTheOldFile) {
  {
    core::FileAside file(file_, core::Durability::kPower);
    file.append("half", 4);
    EXPECT_TRUE(std::filesystem::exists(file_.string() + ".tmp"));
  }
  EXPECT_FALSE(std::filesystem::exists(file_.string() + ".tmp"));
  EXPECT_EQ(read_file(file_), content_);
  const StreamState state = Stream(session_).state();
  expect_error(TITANS_FAILED, {"x.tstate", "No such file", "folder"},
               [&] { save_state(folder_.path() / "none" / "x.tstate", session_->state_schema(), state, nullptr); });
  expect_error(TITANS_INVALID_ARGUMENT, {"without a file name"},
               [&] { save_state(folder_.path() / "", session_->state_schema(), state, nullptr); });
  expect_error(TITANS_FAILED, {"model"},
               [&] { save_state(folder_.path() / "model", session_->state_schema(), state, nullptr); });
  EXPECT_FALSE(std::filesystem::exists(folder_.path() / "model.tmp"));
}

// ---- another dtype ----

core::MemoryField error_of(const char* rounded, core::Shape shape, core::FieldDtype dtype) {
  return {std::string("lost.") + rounded, 0, std::move(shape), dtype, "rounding_error", core::Written::kChunk, rounded};
}

core::MemoryField update_count() {
  return {"number", 0, {}, core::FieldDtype::kFloat32, "update_count", core::Written::kChunk};
}

// A tensor of one row with contiguous fields.
core::StateTensor memory_of(const std::vector<core::MemoryField>& fields) {
  core::StateTensor state{};
  state.name = "m";
  state.role = "memory";
  state.dtype = core::DType::kFloat32;
  std::size_t words = 0;
  for (core::MemoryField field : fields) {
    field.offset = words;
    words += core::field_words(field.dtype, field.shape);
    state.layout.push_back(std::move(field));
  }
  state.shape = {1, 1, static_cast<std::int64_t>(words)};
  state.bytes = words * sizeof(float);
  return state;
}

std::vector<float> convert(const core::StateTensor& from, const std::vector<float>& row, const core::StateTensor& to) {
  EXPECT_EQ(core::difference(from, to), std::nullopt);
  std::vector<float> out(to.bytes / sizeof(float), -1.0F);
  core::convert_state(from, reinterpret_cast<const std::byte*>(row.data()), to,
                      reinterpret_cast<std::byte*>(out.data()));
  return out;
}

std::vector<float> values_of(const core::StateTensor& state, const std::vector<float>& row, std::size_t index) {
  const core::MemoryField& field = state.layout[index];
  std::vector<float> values(*core::tensor_bytes(field.shape, core::DType::kInt8));
  core::unpack_field(field.dtype, row.data() + field.offset, values.size(),
                     field.shape.empty() ? 1 : static_cast<std::size_t>(field.shape.back()), values.data());
  return values;
}

using core::FieldDtype;

TEST(StateConversion, ToBfloat16AndBack) {
  const auto wide = memory_of({{"W0", 0, {1, 3}}, {"a", 0, {2}}});
  const auto narrow = memory_of({{"W0", 0, {1, 3}, FieldDtype::kBFloat16}, {"a", 0, {2}}});
  // 1 + 2^-8 is a tie and rounds to even.
  const std::vector<float> there = convert(wide, {1.00390625F, -3.0F, 1.01171875F, 5.0F, 6.0F}, narrow);
  EXPECT_EQ(values_of(narrow, there, 0), (std::vector<float>{1.0F, -3.0F, 1.015625F}));
  EXPECT_EQ(values_of(narrow, there, 1), (std::vector<float>{5.0F, 6.0F}));
  EXPECT_EQ(convert(narrow, there, wide), (std::vector<float>{1.0F, -3.0F, 1.015625F, 5.0F, 6.0F}));
}

TEST(StateConversion, KeptErrorsCount) {
  const auto wide = memory_of({{"W0", 0, {1, 2}}, {"gamma", 0, {2}}});
  const auto kept = memory_of({{"W0", 0, {1, 2}, FieldDtype::kBFloat16},
                               {"gamma", 0, {2}, FieldDtype::kBFloat16},
                               error_of("W0", {1, 2}, FieldDtype::kBFloat16),
                               error_of("gamma", {2}, FieldDtype::kBFloat16)});
  const std::vector<float> values{1.00390625F, -1.01171875F, 0.1F, 3.0F};
  const std::vector<float> there = convert(wide, values, kept);
  EXPECT_EQ(values_of(kept, there, 0), (std::vector<float>{1.0F, -1.015625F}));
  EXPECT_EQ(values_of(kept, there, 2), (std::vector<float>{0x1p-8F, 0x1p-8F}));
  const std::vector<float> back = convert(kept, there, wide);
  EXPECT_EQ(back[0], values[0]);
  EXPECT_EQ(back[1], values[1]);
  EXPECT_NEAR(back[2], values[2], 0.1F * 0x1p-17F);
  EXPECT_EQ(back[3], values[3]);
  // Without rounding errors: the sum, rounded.
  const auto plain = memory_of({{"W0", 0, {1, 2}, FieldDtype::kFloat16}, {"gamma", 0, {2}, FieldDtype::kFloat16}});
  EXPECT_EQ(values_of(plain, convert(kept, there, plain), 0), (std::vector<float>{1.00390625F, -1.01171875F}));
}

TEST(StateConversion, TheSameStorageKeepsItsBits) {
  const auto nearest = memory_of({{"W0", 0, {1, 33}, FieldDtype::kInt8}, {"a", 0, {1}}});
  const auto feedback =
      memory_of({{"W0", 0, {1, 33}, FieldDtype::kInt8}, error_of("W0", {1, 33}, FieldDtype::kInt8), {"a", 0, {1}}});
  const auto stochastic = memory_of({{"W0", 0, {1, 33}, FieldDtype::kInt8}, {"a", 0, {1}}, update_count()});
  std::vector<float> row(nearest.bytes / sizeof(float));
  for (std::size_t i = 0; i + 1 < row.size(); ++i) {
    const std::uint32_t bits = 0x3F400000U + static_cast<std::uint32_t>(i * 0x01020304U);
    std::memcpy(&row[i], &bits, sizeof(bits));
  }
  row.back() = 4.0F;
  const std::vector<float> there = convert(nearest, row, feedback);
  EXPECT_EQ(std::memcmp(there.data(), row.data(), 10 * sizeof(float)), 0);
  EXPECT_EQ(values_of(feedback, there, 1), std::vector<float>(33, 0.0F));
  EXPECT_EQ(there.back(), 4.0F);
  const std::vector<float> back = convert(feedback, there, nearest);
  EXPECT_EQ(values_of(nearest, back, 1), std::vector<float>{4.0F});
  std::vector<float> counted = convert(nearest, row, stochastic);
  EXPECT_EQ(std::memcmp(counted.data(), row.data(), row.size() * sizeof(float)), 0);
  EXPECT_EQ(counted.back(), 0.0F);
  counted.back() = 7.0F;
  EXPECT_EQ(convert(stochastic, counted, stochastic).back(), 7.0F);
  const auto narrower = memory_of({{"W0", 0, {1, 33}, FieldDtype::kBFloat16}, {"a", 0, {1}}, update_count()});
  EXPECT_EQ(convert(stochastic, counted, narrower).back(), 7.0F);
}

TEST(StateConversion, AnotherModel) {
  const auto one = memory_of({{"W0", 0, {1, 2}}, {"a", 0, {2}}});
  EXPECT_NE(core::difference(one, memory_of({{"W0", 0, {1, 2}}})), std::nullopt);
  EXPECT_NE(core::difference(memory_of({{"W0", 0, {1, 2}}}), one), std::nullopt);
  EXPECT_NE(core::difference(one, memory_of({{"W0", 0, {2, 1}}, {"a", 0, {2}}})), std::nullopt);
  core::StateTensor two = one;
  two.shape[1] = 2;
  EXPECT_NE(core::difference(one, two), std::nullopt);
  two = one;
  two.layout.clear();
  EXPECT_NE(core::difference(one, two), std::nullopt);
  two = one;
  two.layout[0].kind = "surprise";
  EXPECT_NE(core::difference(one, two), std::nullopt);
  // Rounding errors without a field, of another shape or of another dtype, and a count of more than one word.
  core::MemoryField counts = update_count();
  counts.shape = {2};
  for (const core::MemoryField& field :
       {error_of("none", {1, 2}, FieldDtype::kFloat32), error_of("W0", {2, 1}, FieldDtype::kFloat32),
        error_of("lost.W0", {1, 2}, FieldDtype::kFloat32), counts}) {
    const auto hostile = memory_of({{"W0", 0, {1, 2}}, {"a", 0, {2}}, field});
    EXPECT_NE(core::difference(one, hostile), std::nullopt) << field.of;
    EXPECT_NE(core::difference(hostile, one), std::nullopt) << field.of;
  }
}

}  // namespace
}  // namespace titans::test
