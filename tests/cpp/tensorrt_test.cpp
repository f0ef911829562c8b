// The backends for TensorRT and TensorRT-RTX: their results, reports and logs.
#include <thread>

#include "tensorrt_fixture.h"

namespace titans::test {
namespace {

INSTANTIATE_TEST_SUITE_P(Vendors, TensorRt, testing::ValuesIn(kVendors),
                         [](const auto& vendor) { return std::string(vendor.param.name); });

TEST_P(TensorRt, RunsAndSaysWhatItRuns) {
  const auto session = open();
  expect_any_cut(session);
  const json facts = info(*session);
  EXPECT_EQ(facts["engine"], "fake-fp32");
  EXPECT_EQ(facts["backend"], GetParam().name);
  EXPECT_EQ(facts["backend_version"], GetParam().version);
  EXPECT_EQ(facts["device_name"], "Fake GPU");
  EXPECT_NE(facts["engine_reason"].get<std::string>().find("sm 89"), std::string::npos);
  EXPECT_EQ(facts["memory_kernel"], GetParam().plugins ? "tensorrt-plugin" : "standard-operators");
  EXPECT_EQ(facts["state"][0]["in_place"], GetParam().plugins);
  EXPECT_EQ(facts["state"][1]["in_place"], false);
  EXPECT_EQ(cuda_graphs(*session), "decode");
}

TEST_P(TensorRt, TwoBuffersSwap) {
  for (const char* graph : {"prefill", "chunk", "decode"}) {
    std::filesystem::remove(folder_.path() / (std::string("fake-fp32.") + graph + ".engine"));
  }
  use_engine(/*plugin=*/false);
  const auto session = open();
  expect_any_cut(session);
  EXPECT_EQ(info(*session)["state"][0]["in_place"], false);
}

TEST_P(TensorRt, NothingIsCopiedWhereMemoryIsUnified) {
  const Setting unified("TITANS_FAKE_INTEGRATED", "1");
  const auto session = open();
  expect_any_cut(session);
  EXPECT_NE(info(*session)["details"]["memory"].get<std::string>().find("shared"), std::string::npos);
}

TEST_P(TensorRt, DecodingIsRecordedOncePerSetOfBuffers) {
  const auto session = open();
  core::Stream stream(session);
  const auto enqueued = function_of<int()>(GetParam().library, "fake_nvinfer_enqueued");
  const auto launches = function_of<std::size_t()>(FAKE_CUDA, "fake_cuda_graph_launches");
  for (const std::int32_t token : some_tokens(30)) feed(stream, {token});
  const int enqueued_before = enqueued();
  const std::size_t launches_before = launches();
  for (const std::int32_t token : some_tokens(100)) feed(stream, {token});
  EXPECT_EQ(enqueued(), enqueued_before);
  EXPECT_EQ(launches() - launches_before, 100U);
}

// Feeds of several tokens use all three sets of buffers, so the order of the sets varies.
TEST_P(TensorRt, DecodingInFeedsOfAllLengths) {
  use_engine(GetParam().plugins, [](json& engine) { engine["graphs"] = {engine["graphs"][1]}; });
  const auto session = open();
  core::Stream stream(session);
  const Tokens tokens = some_tokens(120);
  std::vector<float> logits;
  std::size_t length = 1;
  for (std::size_t at = 0; at < tokens.size(); at += length) {
    length = std::min(tokens.size() - at, std::size_t{1} + at % 5);
    const auto begin = tokens.begin() + static_cast<std::ptrdiff_t>(at);
    const std::vector<float> some = feed(stream, Tokens(begin, begin + static_cast<std::ptrdiff_t>(length)));
    logits.insert(logits.end(), some.begin(), some.end());
  }
  EXPECT_EQ(logits, expected_logits(tokens));
  EXPECT_EQ(info(*session)["graphs"].size(), 1U);
}

TEST_P(TensorRt, MoreStreamsThanRecordings) {
  const auto session = open();
  std::vector<std::unique_ptr<core::Stream>> streams;
  constexpr std::size_t kStreams = 40;
  for (std::size_t i = 0; i < kStreams; ++i) streams.push_back(std::make_unique<core::Stream>(session));
  std::vector<std::vector<float>> logits(kStreams);
  constexpr std::size_t kTokens = 12;
  for (std::size_t t = 0; t < kTokens; ++t) {
    for (std::size_t i = 0; i < kStreams; ++i) {
      const std::vector<float> some = feed(*streams[i], {some_tokens(kTokens, i)[t]});
      logits[i].insert(logits[i].end(), some.begin(), some.end());
    }
  }
  for (std::size_t i = 0; i < kStreams; ++i) EXPECT_EQ(logits[i], expected_logits(some_tokens(kTokens, i)));
}

TEST_P(TensorRt, RunsWhereNothingCanBeRecorded) {
  const Setting no_capture("TITANS_FAKE_NO_CAPTURE", "1");
  const auto session = open();
  expect_any_cut(session);
  EXPECT_NE(cuda_graphs(*session).find("none: cuStreamBeginCapture"), std::string::npos) << cuda_graphs(*session);
}

TEST_P(TensorRt, AnInputInHostMemory) {
  write_engine("decode", engine_text(1, GetParam().plugins) + "host position\n");
  const auto session = open();
  expect_any_cut(session);
  EXPECT_NE(cuda_graphs(*session).find("host memory"), std::string::npos);
}

// The last graphs of these feeds have 1, 2, 4, 1 and 4 tokens.
TEST_P(TensorRt, LogitsAfterTheLastToken) {
  for (const char* integrated : {"0", "1"}) {
    const Setting unified("TITANS_FAKE_INTEGRATED", integrated);
    const auto session = open();
    for (const std::size_t count : {1U, 2U, 4U, 7U, 8U}) {
      core::Stream stream(session);
      const Tokens tokens = some_tokens(count);
      std::vector<float> logits(kFakeVocab);
      stream.feed(tokens.data(), count, TITANS_OUTPUT_LAST, logits.data(), logits.size());
      const std::vector<float> expected = expected_logits(tokens);
      EXPECT_EQ(logits, std::vector<float>(expected.end() - static_cast<std::ptrdiff_t>(kFakeVocab), expected.end()));
    }
  }
}

TEST_P(TensorRt, AFrozenStreamAndAFork) {
  const auto session = open();
  core::Stream stream(session);
  const Tokens start = some_tokens(7);
  feed(stream, start);
  const auto twin = stream.fork();
  Tokens all = start;
  all.insert(all.end(), {3, 1, 4});
  const std::vector<float> expected = expected_logits(all);
  const std::vector<float> tail(expected.end() - 3 * static_cast<std::ptrdiff_t>(kFakeVocab), expected.end());
  EXPECT_EQ(feed(stream, {3, 1, 4}), tail);
  EXPECT_EQ(feed(*twin, {3, 1, 4}), tail);
  core::Stream frozen(session);
  frozen.set_learning(false);
  EXPECT_EQ(feed(frozen, start), expected_logits(start, /*learning=*/false));
  std::vector<float> memory(2);
  twin->read_memory(0, memory.data(), memory.size());
  EXPECT_EQ(memory[1], 0.25F);  // from the initial state: no token changes it
}

// For each call of a feed, with in-place states first: the stream is unchanged.
TEST_P(TensorRt, AFailureLeavesTheStreamAsItWas) {
  const Setting no_capture("TITANS_FAKE_NO_CAPTURE", "1");  // so that each call can fail
  const auto session = open();
  const auto fail_at = function_of<void(int)>(GetParam().library, "fake_nvinfer_fail_at");
  core::Stream stream(session);
  const Tokens tokens = some_tokens(16);
  const Tokens first(tokens.begin(), tokens.begin() + 5);
  const Tokens rest(tokens.begin() + 5, tokens.end());
  std::vector<float> logits = feed(stream, first);
  std::vector<float> before(2);
  stream.read_memory(0, before.data(), before.size());
  for (const int call : {0, 1, 2, 3}) {
    fail_at(call);
    expect_error(TITANS_FAILED, {GetParam().name, "a kernel that fails for a test"}, [&] { feed(stream, rest); });
    EXPECT_EQ(stream.position(), 5U);
    // Waits for the copies that restore the state. The failed call must not write after them.
    std::vector<float> memory(2);
    stream.read_memory(0, memory.data(), memory.size());
    EXPECT_EQ(memory[0], before[0]);
  }
  fail_at(-1);
  const std::vector<float> more = feed(stream, rest);
  logits.insert(logits.end(), more.begin(), more.end());
  EXPECT_EQ(logits, expected_logits(tokens));
}

TEST_P(TensorRt, StreamsInThreads) {
  const auto session = open();
  std::vector<std::vector<float>> logits(4);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    threads.emplace_back([&, i] {
      core::Stream stream(session);
      for (const std::int32_t token : some_tokens(40, i)) {
        const std::vector<float> some = feed(stream, {token});
        logits[i].insert(logits[i].end(), some.begin(), some.end());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (std::size_t i = 0; i < logits.size(); ++i) EXPECT_EQ(logits[i], expected_logits(some_tokens(40, i)));
}

TEST_P(TensorRt, VectorsAndOffsets) {
  use_vectors();
  std::vector<float> vectors;
  for (std::size_t i = 0; i < 23 * kFakeInputs; ++i) vectors.push_back(static_cast<float>((i * 7 + 3) % 11) - 4);
  const std::vector<float> expected = expected_outputs(vectors);
  for (const char* integrated : {"0", "1"}) {
    const Setting unified("TITANS_FAKE_INTEGRATED", integrated);
    const auto session = open();
    EXPECT_EQ(cuda_graphs(*session), "decode");
    for (const std::size_t cut : {1U, 2U, 3U, 5U, 23U}) {
      core::Stream stream(session);
      std::vector<float> outputs(23 * kFakeOutputs);
      std::vector<float> last(kFakeOutputs);
      for (std::size_t at = 0; at < 23; at += cut) {
        const std::size_t count = std::min(cut, 23 - at);
        float* out = outputs.data() + at * kFakeOutputs;
        stream.feed_vectors(vectors.data() + at * kFakeInputs, count, TITANS_OUTPUT_ALL, out, count * kFakeOutputs);
        stream.feed_vectors(nullptr, 0, TITANS_OUTPUT_LAST, last.data(), last.size());
        EXPECT_EQ(last, std::vector<float>(out + (count - 1) * kFakeOutputs, out + count * kFakeOutputs));
      }
      EXPECT_EQ(outputs, expected) << cut;
    }
  }
}

// Each decode graph has its own capture, made when the session opens.
TEST_P(TensorRt, BothGraphsThatDecodeAreRecorded) {
  use_vectors();
  const auto session = open();
  core::Stream stream(session);
  const auto enqueued = function_of<int()>(GetParam().library, "fake_nvinfer_enqueued");
  const std::vector<float> vector{1, -1};
  const auto feed_one = [&] { stream.feed_vectors(vector.data(), 1, TITANS_OUTPUT_NONE, nullptr, 0); };
  for (int i = 0; i < 60; ++i) feed_one();
  const int before = enqueued();
  for (int i = 0; i < 60; ++i) feed_one();
  EXPECT_EQ(enqueued(), before);
}

TEST_P(TensorRt, OneOfTheGraphsThatDecodeWantsItsInputOnTheHost) {
  use_vectors();
  write_engine("last", engine_text(1, GetParam().plugins, /*vectors=*/true) + "host position\n");
  const auto session = open();
  EXPECT_EQ(cuda_graphs(*session), "decode, in part: the vendor wants an input in host memory, of last");
}

TEST_P(TensorRt, AnEngineOfSomeGraphs) {
  use_engine(GetParam().plugins, [](json& engine) {
    json graphs = json::array();
    for (const json& graph : engine["graphs"]) {
      if (graph["graph"] != "prefill") graphs.push_back(graph);
    }
    engine["graphs"] = graphs;
  });
  const auto session = open();
  expect_any_cut(session);
  EXPECT_EQ(info(*session)["graphs"].size(), 2U);
}

TEST_P(TensorRt, AnEngineNeedsNoWeights) {
  std::filesystem::remove(folder_.path() / "weights.safetensors");
  std::filesystem::remove(folder_.path() / "decode.onnx");
  expect_any_cut(open());
}

}  // namespace
}  // namespace titans::test
