// The shared library with the ONNX Runtime backend, through the C++ header. Works with any bundle, because it compares
// the runtime with itself. (tests/runtime compares with an independent model.)
#include <cstdlib>
#include <string>

#include <gtest/gtest.h>

#include "titans/titans.hpp"

namespace {

class OnnxRuntimeTest : public testing::Test {
 protected:
  void SetUp() override {
    const char* bundle = std::getenv("TITANS_TEST_BUNDLE");
    if (bundle == nullptr) GTEST_SKIP() << "set TITANS_TEST_BUNDLE to a bundle, and TITANS_ONNXRUNTIME to a library";
    bundle_ = bundle;
  }

  static titans::Tokens some_tokens(const titans::Session& session, int count) {
    titans::Tokens tokens;
    for (int i = 0; i < count; ++i) tokens.push_back(static_cast<titans::Token>((i * i + 1) % session.vocab_size()));
    return tokens;
  }

  std::string bundle_;
};

TEST_F(OnnxRuntimeTest, FeedInOneAndInSteps) {
  titans::Session session(bundle_);
  titans::Stream whole = session.stream();
  titans::Stream steps = session.stream();
  const titans::Tokens tokens = some_tokens(session, 40);
  const std::vector<float> logits = whole.feed(tokens);
  const auto vocab = static_cast<std::size_t>(session.vocab_size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const std::vector<float> row = steps.step(tokens[i]);
    for (std::size_t v = 0; v < vocab; ++v) ASSERT_NEAR(row[v], logits[i * vocab + v], 1e-3) << i;
  }
  EXPECT_EQ(whole.position(), tokens.size());
}

TEST_F(OnnxRuntimeTest, ForkGenerateAndMemory) {
  titans::Session session(bundle_);
  titans::Stream stream = session.stream();
  EXPECT_THROW(stream.generate(), titans::Error);
  stream.feed_none(some_tokens(session, 20));
  titans::Stream twin = stream.fork();
  titans::Sampling sampling;
  sampling.max_tokens = 10;
  const auto collect = [&](titans::Stream& from) {
    titans::Tokens tokens;
    for (titans::Generator generator = from.generate(sampling); auto token = generator.next();)
      tokens.push_back(*token);
    return tokens;
  };
  EXPECT_EQ(collect(stream), collect(twin));
  EXPECT_EQ(stream.position(), 30U);
  const std::vector<titans::Memory> memory = stream.memory();
  ASSERT_FALSE(memory.empty());
  std::size_t elements = 1;
  for (const std::int64_t extent : memory[0].shape) elements *= static_cast<std::size_t>(extent);
  EXPECT_EQ(memory[0].values.size(), elements);
  stream.reset();
  EXPECT_EQ(stream.position(), 0U);
}

TEST_F(OnnxRuntimeTest, AStreamOutlivesItsSession) {
  auto session = std::make_unique<titans::Session>(bundle_);
  titans::Stream stream = session->stream();
  const titans::Tokens tokens = some_tokens(*session, 3);
  session.reset();
  EXPECT_EQ(stream.score(tokens).size(), 3U);
}

TEST_F(OnnxRuntimeTest, TheMemoryKernelIsAChoice) {
  titans::SessionOptions options;
  options.memory_kernel = "off";
  const std::string info = titans::Session(bundle_, options).info();
  EXPECT_NE(info.find(R"("memory_kernel":"standard-operators")"), std::string::npos) << info;
  options.memory_kernel = "sometimes";
  try {
    titans::Session other(bundle_, options);
    FAIL();
  } catch (const titans::Error& error) {
    EXPECT_EQ(error.status(), TITANS_INVALID_ARGUMENT);
  }
}

TEST_F(OnnxRuntimeTest, ErrorsCarryTheirStatus) {
  titans::Session session(bundle_);
  titans::Stream stream = session.stream();
  try {
    stream.step(session.vocab_size());
    FAIL();
  } catch (const titans::Error& error) {
    EXPECT_EQ(error.status(), TITANS_INVALID_ARGUMENT);
  }
  titans::SessionOptions options;
  options.backend_library = "/nowhere/libonnxruntime.so";
  try {
    titans::Session other(bundle_, options);
    FAIL();
  } catch (const titans::Error& error) {
    EXPECT_EQ(error.status(), TITANS_UNSUPPORTED);
    EXPECT_NE(std::string(error.what()).find("pip install onnxruntime"), std::string::npos);
  }
}

}  // namespace
