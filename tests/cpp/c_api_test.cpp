// The C interface. The first tests cover bad pointers, sizes, and the lifetime of errors. The others feed tokens and
// vectors to the fake backend, also through the C++ header.
#include "titans/titans.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <functional>
#include <string>
#include <thread>

#include <gtest/gtest.h>

#include "fake_executor.h"
#include "test_bundle.h"
#include "titans/titans.hpp"

namespace titans::test {
namespace {

bool last_error_has(const std::string& word) {
  return std::string(titans_last_error()).find(word) != std::string::npos;
}

titans_session_options default_options() {
  titans_session_options options{};
  options.struct_size = sizeof(options);
  return options;
}

TEST(CApi, Version) {
  EXPECT_EQ(titans_version(), std::to_string(TITANS_VERSION_MAJOR) + "." + std::to_string(TITANS_VERSION_MINOR) + "." +
                                  std::to_string(TITANS_VERSION_PATCH));
}

TEST(CApi, NullIsAnErrorEverywhere) {
  int done = 0;
  int32_t token = 0;
  float number = 0.0F;
  titans_session* session = nullptr;
  titans_stream* stream = nullptr;
  titans_generator* generator = nullptr;
  titans_memory_info info;
  titans_sampling sampling;
  titans_sampling_init(&sampling);
  titans_guard guard;
  titans_guard_init(&guard);
  titans_guard_report report{};
  titans_health health{};
  report.struct_size = sizeof(report);
  titans_metrics metrics{};
  metrics.struct_size = sizeof(metrics);
  std::size_t size = 0;
  const titans_status statuses[] = {
      titans_session_open("/nowhere", nullptr, nullptr),
      titans_session_open(nullptr, nullptr, &session),
      titans_stream_create(nullptr, &stream),
      titans_stream_create(nullptr, nullptr),
      titans_stream_fork(nullptr, &stream),
      titans_stream_fork(nullptr, nullptr),
      titans_stream_reset(nullptr),
      titans_stream_feed(nullptr, &token, 1, TITANS_OUTPUT_NONE, nullptr, 0),
      titans_stream_feed_vectors(nullptr, &number, 1, TITANS_OUTPUT_NONE, nullptr, 0),
      titans_stream_step(nullptr, 0, &number),
      titans_stream_score(nullptr, &token, 1, &number),
      titans_stream_set_learning(nullptr, 1),
      titans_stream_set_guard(nullptr, &guard),
      titans_stream_guard_report(nullptr, &report),
      titans_stream_health(nullptr, &health),
      titans_stream_peak_norms(nullptr, nullptr, 0),
      titans_stream_set_progress(nullptr, nullptr, nullptr),
      titans_stream_cancel(nullptr),
      titans_session_metrics(nullptr, &metrics),
      titans_session_metrics_text(nullptr, nullptr, 0, &size),
      titans_stream_memory_info(nullptr, 0, &info),
      titans_stream_memory_read(nullptr, 0, &number, 1),
      titans_generator_create(nullptr, &sampling, &generator),
      titans_generator_create(nullptr, nullptr, nullptr),
      titans_generator_next(nullptr, &token, &done),
  };
  for (const titans_status status : statuses) EXPECT_EQ(status, TITANS_INVALID_ARGUMENT);
  EXPECT_TRUE(last_error_has("NULL"));
}

TEST(CApi, NullReadsAsNothing) {
  titans_session_close(nullptr);
  titans_stream_destroy(nullptr);
  titans_generator_destroy(nullptr);
  titans_sampling_init(nullptr);
  EXPECT_STREQ(titans_session_info(nullptr), "");
  EXPECT_EQ(titans_session_vocab_size(nullptr), 0);
  EXPECT_STREQ(titans_session_input_kind(nullptr), "");
  EXPECT_EQ(titans_session_input_size(nullptr), 0U);
  EXPECT_EQ(titans_session_output_size(nullptr), 0U);
  EXPECT_EQ(titans_stream_learning(nullptr), 0);
  EXPECT_EQ(titans_stream_position(nullptr), 0U);
  EXPECT_EQ(titans_stream_state_bytes(nullptr), 0U);
  EXPECT_EQ(titans_stream_memory_count(nullptr), 0U);
}

TEST(CApi, OptionsOfAnotherSize) {
  titans_session_options options = default_options();
  titans_session* session = nullptr;
  options.struct_size = sizeof(options) + 8;  // of a newer version
  EXPECT_EQ(titans_session_open("/nowhere", &options, &session), TITANS_FAILED);
  EXPECT_TRUE(last_error_has("/nowhere"));
  for (const std::size_t size : {std::size_t{0}, offsetof(titans_session_options, threads)}) {
    options.struct_size = size;
    EXPECT_EQ(titans_session_open("/nowhere", &options, &session), TITANS_INVALID_ARGUMENT);
    EXPECT_TRUE(last_error_has("struct_size"));
    EXPECT_EQ(session, nullptr);
  }
}

TEST(CApi, AnOptionThatTheCallersVersionDoesNotHave) {
  titans_session_options options = default_options();
  titans_session* session = nullptr;
  options.memory_kernel = "sometimes";
  options.struct_size = offsetof(titans_session_options, memory_kernel);
  EXPECT_EQ(titans_session_open("/nowhere", &options, &session), TITANS_FAILED);
  EXPECT_TRUE(last_error_has("/nowhere"));
}

TEST(CApi, MemoryKernels) {
  titans_session_options options = default_options();
  titans_session* session = nullptr;
  for (const char* choice : {static_cast<const char*>(nullptr), "auto", "require", "off"}) {
    options.memory_kernel = choice;
    EXPECT_EQ(titans_session_open("/nowhere", &options, &session), TITANS_FAILED);
  }
  for (const char* wrong : {"", "on", "Auto", "off "}) {
    options.memory_kernel = wrong;
    EXPECT_EQ(titans_session_open("/nowhere", &options, &session), TITANS_INVALID_ARGUMENT);
    EXPECT_TRUE(last_error_has("auto, require or off"));
  }
}

TEST(CApi, Engines) {
  TemporaryFolder folder;
  write_bundle(folder.path());
  titans_session_options options = default_options();
  titans_session* session = nullptr;
  options.engine = "orin";
  EXPECT_EQ(titans_session_open(folder.path().c_str(), &options, &session), TITANS_INVALID_ARGUMENT);
  EXPECT_TRUE(last_error_has("no engine")) << titans_last_error();
  // No backend is installed beside the test, so a valid call fails with this error.
  const auto expect_no_backend = [&] {
    EXPECT_EQ(titans_session_open(folder.path().c_str(), &options, &session), TITANS_UNSUPPORTED);
    EXPECT_TRUE(last_error_has("libtitans_backend_onnxruntime.so")) << titans_last_error();
  };
  options.plugin_dir = folder.path().c_str();
  options.struct_size = offsetof(titans_session_options, engine);
  expect_no_backend();
  options.struct_size = sizeof(options);
  options.engine = "none";
  expect_no_backend();
}

TEST(CApi, BackendsAndDevices) {
  TemporaryFolder folder;
  write_bundle(folder.path());
  titans_session* session = nullptr;
  titans_session_options options = default_options();
  options.device = "abacus:0";
  EXPECT_EQ(titans_session_open(folder.path().c_str(), &options, &session), TITANS_UNSUPPORTED);
  EXPECT_TRUE(last_error_has("abacus:0"));
  options = default_options();
  options.backend = "../onnxruntime";
  EXPECT_EQ(titans_session_open(folder.path().c_str(), &options, &session), TITANS_UNSUPPORTED);
  EXPECT_TRUE(last_error_has("../onnxruntime"));
  options = default_options();
  options.plugin_dir = folder.path().c_str();
  EXPECT_EQ(titans_session_open(folder.path().c_str(), &options, &session), TITANS_UNSUPPORTED);
  EXPECT_TRUE(last_error_has("libtitans_backend_onnxruntime.so"));
}

// On the fake backend, with a bundle of either kind.
class CApiStream : public testing::Test {
 protected:
  CApiStream() { std::filesystem::copy(FAKE_BACKEND, folder_.path() / "libtitans_backend_onnxruntime.so"); }

  Session open(const nlohmann::json& manifest) const {
    const std::filesystem::path bundle = folder_.path() / "bundle";
    std::filesystem::create_directories(bundle);
    write_bundle(bundle, manifest);
    SessionOptions options;
    options.plugin_dir = folder_.path();
    return Session(bundle, options);
  }

  template <typename Action>
  static void expect_invalid(const std::vector<std::string>& words, Action&& action) {
    try {
      action();
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), TITANS_INVALID_ARGUMENT);
      for (const std::string& word : words) EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << word;
    }
  }

  TemporaryFolder folder_;
};

TEST_F(CApiStream, Vectors) {
  const std::vector<float> vectors{1, 2, -3, 0.5, 0, 1, 4, -2, 2, 2};
  const std::vector<float> expected = expected_outputs(vectors);
  Session session = open(vectors_json());
  EXPECT_EQ(session.input_kind(), "vectors");
  EXPECT_EQ(session.input_size(), kFakeInputs);
  EXPECT_EQ(session.output_size(), kFakeOutputs);
  EXPECT_EQ(session.vocab_size(), 0);
  const nlohmann::json info = nlohmann::json::parse(session.info());
  EXPECT_EQ(info["input"], nlohmann::json::parse(R"({"kind": "vectors", "name": "x", "dtype": "float32", "size": 2})"));
  EXPECT_EQ(info["output"],
            nlohmann::json::parse(R"({"kind": "vectors", "name": "y", "dtype": "float32", "size": 3})"));
  EXPECT_TRUE(info["vocab_size"].is_null());

  Stream stream = session.stream();
  EXPECT_EQ(stream.feed_vectors(vectors), expected);
  EXPECT_EQ(stream.position(), 5U);
  stream.reset();
  stream.feed_vectors_none({1, 2, -3, 0.5});
  Stream twin = stream.fork();
  EXPECT_EQ(stream.feed_vectors_last({0, 1}), std::vector<float>(expected.begin() + 6, expected.begin() + 9));
  EXPECT_EQ(twin.feed_vectors({0, 1, 4, -2, 2, 2}), std::vector<float>(expected.begin() + 6, expected.end()));
  expect_invalid({"vectors of 2 floats", "3 floats"}, [&] { twin.feed_vectors({1, 2, 3}); });
  expect_invalid({"vector 1", "finite"}, [&] { twin.feed_vectors({1, 2, 3, HUGE_VALF}); });
  expect_invalid({"vectors is NULL"}, [&] { twin.feed_vectors(nullptr, 1, TITANS_OUTPUT_NONE, nullptr, 0); });
  expect_invalid({"titans_output"},
                 [&] { twin.feed_vectors(vectors.data(), 1, static_cast<titans_output>(3), nullptr, 0); });
  expect_invalid({"room for 6 outputs"},
                 [&] { twin.feed_vectors(vectors.data(), 2, TITANS_OUTPUT_ALL, std::vector<float>(5).data(), 5); });
  const std::vector<std::string> words{"takes vectors", "got tokens"};
  expect_invalid(words, [&] { twin.feed({1}); });
  expect_invalid(words, [&] { twin.feed_last({1}); });
  expect_invalid(words, [&] { twin.step(1); });
  expect_invalid(words, [&] { twin.score({1}); });
  expect_invalid(words, [&] { twin.generate(); });
  EXPECT_EQ(twin.position(), 5U);
}

TEST_F(CApiStream, Tokens) {
  Session session = open(manifest_json());
  EXPECT_EQ(session.input_kind(), "tokens");
  EXPECT_EQ(session.input_size(), kFakeVocab);
  EXPECT_EQ(session.output_size(), kFakeVocab);
  EXPECT_EQ(session.vocab_size(), static_cast<std::int32_t>(kFakeVocab));
  const nlohmann::json info = nlohmann::json::parse(session.info());
  EXPECT_EQ(info["vocab_size"], kFakeVocab);
  EXPECT_EQ(info["input"]["kind"], "tokens");
  EXPECT_EQ(info["output"]["kind"], "logits");
  Stream stream = session.stream();
  const Tokens tokens{3, 1, 4, 1, 5, 2, 6};
  EXPECT_EQ(stream.feed(tokens), expected_logits(tokens));
  expect_invalid({"takes tokens", "got vectors"},
                 [&] { stream.feed_vectors(std::vector<float>(2 * kFakeVocab, 1.0F)); });
  EXPECT_EQ(stream.position(), tokens.size());
}

TEST_F(CApiStream, StatesAndMarks) {
  Session session = open(manifest_json());
  const Tokens tokens{3, 1, 4, 1, 5, 2, 6};
  const std::vector<float> expected = expected_logits(tokens);
  const std::vector<float> tail(expected.begin() + 3 * kFakeVocab, expected.end());
  const Key key(32, 7);
  const std::string plain = folder_.path() / "plain.tstate", sealed = folder_.path() / "sealed.tstate";
  Stream stream = session.stream();
  stream.feed_none({3, 1, 4});
  EXPECT_EQ(stream.mark(), 3U);
  stream.save(plain);
  stream.save(sealed, key);
  EXPECT_EQ(stream.feed({1, 5, 2, 6}), tail);
  stream.rewind(3);
  EXPECT_EQ(stream.marks(), (std::vector<std::uint64_t>{3}));
  EXPECT_EQ(stream.feed({1, 5, 2, 6}), tail);
  stream.unmark(3);
  expect_invalid({"no marks"}, [&] { stream.rewind(3); });
  EXPECT_EQ(session.restore(plain).feed({1, 5, 2, 6}), tail);
  EXPECT_EQ(session.restore(sealed, key).feed({1, 5, 2, 6}), tail);
  expect_invalid({"no key was given"}, [&] { session.restore(sealed); });
  expect_invalid({"32 bytes", "got 31"}, [&] { stream.save(sealed, Key(31)); });
  const std::vector<std::uint8_t> bytes = read_state(plain);
  EXPECT_EQ(std::string(bytes.begin(), bytes.end()), read_file(plain));
  EXPECT_EQ(read_state(sealed, key).size(), bytes.size());
}

TEST_F(CApiStream, StatesRefuseWhatIsWrong) {
  Session session = open(manifest_json());
  const std::string path = folder_.path() / "one.tstate";
  session.stream().save(path);
  titans_state_options options{};
  std::uint8_t byte = 0;
  std::size_t size = 0;
  EXPECT_EQ(titans_state_read(path.c_str(), &options, nullptr, 0, &size), TITANS_INVALID_ARGUMENT);  // struct_size
  options = {sizeof(options), nullptr, 32};
  EXPECT_EQ(titans_state_read(path.c_str(), &options, nullptr, 0, &size), TITANS_INVALID_ARGUMENT);
  EXPECT_EQ(titans_state_read(path.c_str(), nullptr, &byte, 1, &size), TITANS_INVALID_ARGUMENT);
  EXPECT_TRUE(last_error_has("room for"));
  EXPECT_EQ(size, std::filesystem::file_size(path));
  EXPECT_EQ(titans_state_read(path.c_str(), nullptr, nullptr, 1, &size), TITANS_INVALID_ARGUMENT);
  EXPECT_EQ(titans_state_read((path + "x").c_str(), nullptr, nullptr, 0, &size), TITANS_FAILED);
  titans_stream* stream = nullptr;
  std::uint64_t position = 0;
  std::size_t count = 0;
  for (const titans_status status :
       {titans_stream_save(nullptr, path.c_str(), nullptr),
        titans_session_restore(nullptr, path.c_str(), nullptr, &stream),
        titans_state_read(nullptr, nullptr, nullptr, 0, &size),
        titans_state_read(path.c_str(), nullptr, nullptr, 0, nullptr), titans_stream_mark(nullptr, &position),
        titans_stream_rewind(nullptr, 0), titans_stream_unmark(nullptr, 0),
        titans_stream_marks(nullptr, &position, 1, &count)}) {
    EXPECT_EQ(status, TITANS_INVALID_ARGUMENT);
  }
  EXPECT_TRUE(last_error_has("NULL"));
}

TEST_F(CApiStream, GuardsAndProgress) {
  Session session = open(manifest_json());
  Stream stream = session.stream();
  EXPECT_EQ(stream.guard_report().layer, -1);
  stream.set_guard();
  stream.feed_none({1, 2, 3});
  EXPECT_GT(stream.guard_report().chunks, 0U);
  EXPECT_EQ(stream.guard_report().reason, TITANS_GUARD_GOOD);
  stream.set_guard({TITANS_GUARD_RAISE, 1e-6F});
  EXPECT_THROW(stream.feed_none({5}), Error);
  EXPECT_EQ(stream.position(), 3U);
  EXPECT_EQ(stream.guard_report().reason, TITANS_GUARD_UPDATE_NORM);
  EXPECT_EQ(stream.guard_report().rollbacks, 1U);
  expect_invalid({"above 0"}, [&] { stream.set_guard({TITANS_GUARD_SKIP, 0.0F}); });
  stream.set_guard({TITANS_GUARD_OFF});
  EXPECT_EQ(stream.health().state, TITANS_HEALTHY);
  EXPECT_EQ(stream.health().layer, -1);
  const std::vector<float> norms = stream.peak_norms();
  ASSERT_EQ(norms.size(), stream.memory().size());
  EXPECT_GE(norms[0], 0.0F);
  EXPECT_EQ(session.metrics().diverging, 0U);

  stream.set_progress([](void*, std::uint64_t, std::uint64_t) { return 1; });
  try {
    stream.feed_none({5});
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), TITANS_CANCELLED) << error.what();
  }
  stream.set_progress(nullptr);
  // Calls from within a call are rejected.
  struct Within {
    Stream& stream;
    std::size_t refused = 0;
  } within{stream};
  stream.set_progress(
      [](void* user, std::uint64_t, std::uint64_t) {
        auto& own = static_cast<Within*>(user)->stream;
        std::size_t& refused = static_cast<Within*>(user)->refused;
        const std::function<void()> calls[] = {[&] { own.marks(); }, [&] { own.freeze(); }, [&] { own.generate(); },
                                               [&] { own.mark(); }, [&] { own.guard_report(); }};
        for (const auto& call : calls) {
          try {
            call();
          } catch (const Error& error) {
            refused += error.status() == TITANS_INVALID_ARGUMENT ? 1 : 0;
          }
        }
        return 0;
      },
      &within);
  stream.cancel();
  stream.feed_none({5});
  EXPECT_EQ(stream.position(), 4U);
  EXPECT_EQ(within.refused, 5U);
  EXPECT_TRUE(stream.learning());
}

TEST_F(CApiStream, Metrics) {
  Session session = open(manifest_json());
  Stream stream = session.stream();
  stream.feed_none({1, 2, 3});
  EXPECT_EQ(session.metrics().tokens, 3U);
  EXPECT_EQ(session.metrics().streams, 1U);
  EXPECT_NE(session.metrics_text().find("titans_tokens_total{bundle=\"bundle\"} 3\n"), std::string::npos)
      << session.metrics_text();
  EXPECT_EQ(session.metrics_text().back(), '\n');
}

TEST_F(CApiStream, WhatIsTooSmallIsNotWritten) {
  open(manifest_json());
  titans_session_options options = default_options();
  const std::string plugins = folder_.path(), bundle = folder_.path() / "bundle";
  options.plugin_dir = plugins.c_str();
  titans_session* session = nullptr;
  titans_stream* stream = nullptr;
  ASSERT_EQ(titans_session_open(bundle.c_str(), &options, &session), TITANS_OK) << titans_last_error();
  ASSERT_EQ(titans_stream_create(session, &stream), TITANS_OK);
  char text[8] = "before";
  std::size_t size = 0;
  EXPECT_EQ(titans_session_metrics_text(session, text, sizeof(text), &size), TITANS_INVALID_ARGUMENT);
  EXPECT_GT(size, sizeof(text));
  EXPECT_STREQ(text, "before");
  titans_metrics metrics{};
  titans_guard_report report{};
  titans_guard guard{};
  titans_health health{};
  for (const std::size_t wrong : {std::size_t{0}, sizeof(std::size_t)}) {
    metrics.struct_size = report.struct_size = guard.struct_size = health.struct_size = wrong;
    EXPECT_EQ(titans_stream_health(stream, &health), TITANS_INVALID_ARGUMENT);
    EXPECT_EQ(titans_session_metrics(session, &metrics), TITANS_INVALID_ARGUMENT);
    EXPECT_EQ(titans_stream_guard_report(stream, &report), TITANS_INVALID_ARGUMENT);
    EXPECT_EQ(titans_stream_set_guard(stream, &guard), TITANS_INVALID_ARGUMENT);
    EXPECT_TRUE(last_error_has("struct_size"));
  }
  titans_stream_destroy(stream);
  titans_session_close(session);
}

// A child may free everything, and may open sessions of its own. Those of its parent are refused.
TEST_F(CApiStream, AChildOfAFork) {
  open(manifest_json());  // writes the bundle
  const std::string bundle = (folder_.path() / "bundle").string(), modules = folder_.path().string();
  titans_session_options options = default_options();
  options.plugin_dir = modules.c_str();
  options.batch_threads = 2;
  titans_session* session = nullptr;
  std::vector<titans_stream*> streams(2);
  ASSERT_EQ(titans_session_open(bundle.c_str(), &options, &session), TITANS_OK);
  for (titans_stream*& stream : streams) ASSERT_EQ(titans_stream_create(session, &stream), TITANS_OK);
  const std::vector<std::int32_t> tokens{3, 1};
  const auto batch = [&](titans_status* statuses) {
    return titans_session_step_batch(session, streams.data(), tokens.data(), 2, nullptr, statuses);
  };
  ASSERT_EQ(batch(nullptr), TITANS_OK);  // starts threads
  const pid_t child = ::fork();
  if (child == 0) {
    const auto refused = [](titans_status status) {
      return status == TITANS_INVALID_ARGUMENT && std::string(titans_last_error_code()) == "TITANS-E0517";
    };
    titans_stream* made = nullptr;
    titans_status statuses[2] = {TITANS_OK, TITANS_OK};
    bool good = refused(titans_stream_feed(streams[0], tokens.data(), 2, TITANS_OUTPUT_NONE, nullptr, 0)) &&
                refused(titans_stream_create(session, &made)) && refused(titans_stream_reset(streams[0])) &&
                refused(titans_stream_fork(streams[0], &made)) && refused(titans_stream_cancel(streams[1])) &&
                refused(batch(statuses)) && statuses[1] == TITANS_INVALID_ARGUMENT;
    titans_session* own = nullptr;
    good = good && titans_session_open(bundle.c_str(), &options, &own) == TITANS_OK;
    good = good && titans_stream_create(own, &made) == TITANS_OK && titans_stream_step(made, 1, nullptr) == TITANS_OK;
    for (titans_stream* stream : {streams[0], streams[1], made}) titans_stream_destroy(stream);
    for (titans_session* one : {session, own}) titans_session_close(one);
    ::_exit(good ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(batch(nullptr), TITANS_OK);
  for (titans_stream* stream : streams) titans_stream_destroy(stream);
  titans_session_close(session);
}

TEST(CApi, ErrorsBelongToTheirThread) {
  EXPECT_EQ(titans_stream_reset(nullptr), TITANS_INVALID_ARGUMENT);
  const std::string mine = titans_last_error();
  std::thread([] {
    EXPECT_STREQ(titans_last_error(), "");
    titans_session* session = nullptr;
    EXPECT_EQ(titans_session_open("/nowhere", nullptr, &session), TITANS_FAILED);
  }).join();
  EXPECT_EQ(titans_last_error(), mine);
}

}  // namespace
}  // namespace titans::test
