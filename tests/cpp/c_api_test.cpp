// The C interface where no backend is needed: bad pointers, sizes, and the life of errors.
#include "titans/titans.h"

#include <cstddef>
#include <string>
#include <thread>

#include <gtest/gtest.h>

#include "test_bundle.h"

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

TEST(CApi, Version) { EXPECT_STREQ(titans_version(), "0.1.0"); }

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
  const titans_status statuses[] = {
      titans_session_open("/nowhere", nullptr, nullptr),
      titans_session_open(nullptr, nullptr, &session),
      titans_stream_create(nullptr, &stream),
      titans_stream_create(nullptr, nullptr),
      titans_stream_fork(nullptr, &stream),
      titans_stream_fork(nullptr, nullptr),
      titans_stream_reset(nullptr),
      titans_stream_feed(nullptr, &token, 1, TITANS_LOGITS_NONE, nullptr, 0),
      titans_stream_step(nullptr, 0, &number),
      titans_stream_score(nullptr, &token, 1, &number),
      titans_stream_set_learning(nullptr, 1),
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
    EXPECT_TRUE(last_error_has("auto, require, off"));
  }
}

TEST(CApi, Engines) {
  TemporaryFolder folder;
  write_bundle(folder.path());
  titans_session_options options = default_options();
  titans_session* session = nullptr;
  options.engine = "orin";
  EXPECT_EQ(titans_session_open(folder.path().c_str(), &options, &session), TITANS_INVALID_ARGUMENT);
  EXPECT_TRUE(last_error_has("an engine out of")) << titans_last_error();
  // Without a backend beside the test, what is left is that.
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
