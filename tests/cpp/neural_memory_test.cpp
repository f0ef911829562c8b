// The checks of both memory operators, and two properties of the CPU kernels: they do not allocate, and their results
// do not depend on the number of threads. (tests/plugins compares numbers with independent oracles.)
#include <any>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <regex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "count_allocations.h"
#include "plugins/kernels/cpu_kernel.h"
#include "plugins/kernels/neural_memory_textbook.h"
#include "plugins/tools/spin_pool.h"

namespace {

using namespace titans::kernels;

constexpr std::int64_t kStreams = 2, kHeads = 3, kWidth = 6, kChunk = 4;

void fill_common(MemoryAttributes& a, const std::string& schedule) {
  a.schedule = schedule;
  a.activation = "silu";
  a.widths = {kWidth, 10, kWidth};
  a.chunk_size = kChunk;
}

Attributes attributes(const std::string& mode = "update", const std::string& schedule = "any") {
  Attributes a;
  fill_common(a, schedule);
  a.mode = mode;
  return a;
}

// Sets every attribute of the chunk operator.
ChunkAttributes chunk_attributes(const std::string& schedule = "any") {
  ChunkAttributes a;
  fill_common(a, schedule);
  a.batch_size = 2 * kChunk;
  a.loss_scale = 1.0F / kWidth;
  a.keys_per_token = 2;
  a.lookahead = a.residual = a.layer_norm = 1;
  a.norm_weight = "fast";
  a.grad_clamp = 0.5F;
  a.orthogonalise = 5;
  return a;
}

Configuration configured(const Attributes& a) {
  Configuration c;
  EXPECT_EQ(configure(a, c), "");
  return c;
}

ChunkConfiguration configured(const ChunkAttributes& a) {
  ChunkConfiguration c;
  EXPECT_EQ(configure(a, c), "");
  return c;
}

// Valid operands of one call, with their memory.
class Call {
 public:
  explicit Call(const Configuration& c, std::int64_t tokens = 3) {
    const RowLayout layout(c);
    common(layout.size, tokens, tokens);
    if (c.schedule == Schedule::kAny) integers(kFill, {0, 1});
    // An open chunk's coefficients are gates and their products.
    for (std::int64_t head = 0; head < kStreams * kHeads; ++head) {
      float* values = values_[kState].data() + head * layout.size;
      for (std::int64_t i = layout.e; i < layout.size; ++i) values[i] = 0.0F;
      values[layout.e] = values[layout.a] = 0.1F;
      values[layout.m] = values[layout.f] = values[layout.beta] = 0.5F;
    }
  }

  explicit Call(const ChunkConfiguration& c, std::int64_t tokens = 3) {
    common(ChunkRowLayout(c).size, tokens, tokens * c.keys_per_token);
    if (c.schedule == Schedule::kAny) {
      integers(kFill, {0, 1});
    } else if (c.counts_batch()) {
      integers(kFill, {0, c.chunk_size});
    }
    const std::vector<std::int64_t> weights{kStreams, kHeads, c.chunks(tokens), c.all_elements()};
    floats(kModulation, {kStreams, kHeads, tokens, c.tensors()}, 1.0F);
    floats(kPrevious, weights, 0.3F);
    floats(kPreviousGate, {kStreams, kHeads, tokens}, 0.3F);
    floats(kInitialWeights, weights, 0.0F);
  }

  void common(std::int64_t row, std::int64_t tokens, std::int64_t keys) {
    floats(kState, {kStreams, kHeads, row}, 0.3F);
    floats(kQ, {kStreams, kHeads, tokens, kWidth}, 1.0F);
    for (const Operand operand : {kK, kV}) floats(operand, {kStreams, kHeads, keys, kWidth}, 1.0F);
    floats(kStepSize, {kStreams, kHeads, keys}, 0.1F);
    for (const Operand gate : {kMomentum, kForgetGate}) floats(gate, {kStreams, kHeads, tokens}, 0.1F);
    for (const Operand gate : {kStepSize, kMomentum, kForgetGate}) {
      for (float& value : values_[gate]) value = std::abs(value);
    }
    floats(kY, {kStreams, kHeads, tokens, kWidth}, 0.0F);
    floats(kStateOut, {kStreams, kHeads, row}, 0.0F);
    floats(kStats, {kStreams, kHeads, kStatCount}, 0.0F);
  }

  void floats(Operand operand, std::vector<std::int64_t> shape, float scale) {
    std::int64_t count = 1;
    for (const std::int64_t extent : shape) count *= extent;
    std::normal_distribution<float> draw(0.0F, 1.0F);
    std::vector<float>& values = values_[operand];
    values.resize(static_cast<std::size_t>(count));
    for (float& value : values) value = scale * draw(random_);
    set(operand, values.data(), DType::kFloat32, shape);
  }

  void integers(Operand operand, std::vector<std::int64_t> values) {
    integers_[operand] = std::move(values);
    set(operand, integers_[operand].data(), DType::kInt64, {static_cast<std::int64_t>(integers_[operand].size())});
  }

  void set(Operand operand, void* data, DType dtype, const std::vector<std::int64_t>& shape) {
    Tensor& tensor = operands[operand];
    tensor = {};
    tensor.data = data;
    tensor.dtype = dtype;
    tensor.rank = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), tensor.shape.begin());
  }

  std::vector<float>& values(Operand operand) { return values_[operand]; }

  Operands operands;

 private:
  std::array<std::vector<float>, kOperands> values_;
  std::array<std::vector<std::int64_t>, kOperands> integers_;
  std::mt19937 random_{7};
};

Parallel alone() {
  return {[](void*, std::size_t count, void (*body)(void*, std::size_t), void* context) {
            for (std::size_t i = 0; i < count; ++i) body(context, i);
          },
          nullptr};
}

template <class Configuration>
std::unique_ptr<CpuKernel> make(const Configuration& c, std::string_view target) {
  std::string error;
  std::unique_ptr<CpuKernel> kernel = CpuKernel::create(c, target, error);
  EXPECT_NE(kernel, nullptr) << error;
  return kernel;
}

// Checks the form "[NeuralMemory] problem. Fix: something (TITANS-E0701)", on one line.
void expect_form(const std::string& error) {
  EXPECT_TRUE(
      std::regex_match(error, std::regex(R"(\[(Chunk)?NeuralMemory\] [^\n]+[^.\n]\. Fix: [^\n]+ \(TITANS-E\d{4}\))")))
      << error;
}

// Runs a call that must be rejected with these words, and checks that nothing is written.
template <class Configuration>
void expect_refused(const Configuration& c, Call& call, const std::string& words) {
  const std::vector<float> state = call.values(kState), next = call.values(kStateOut), y = call.values(kY);
  const std::string error = make(c, {})->run(call.operands, alone());
  EXPECT_NE(error.find(words), std::string::npos) << error;
  EXPECT_EQ(error.rfind("[" + std::string(Configuration::kOperator) + "] ", 0), 0U) << error;
  expect_form(error);
  EXPECT_EQ(call.values(kState), state);
  EXPECT_EQ(call.values(kStateOut), next);
  EXPECT_EQ(call.values(kY), y);
}

TEST(NeuralMemoryAttributes, WrongOnesAreRefusedByName) {
  const auto expect = [](const char* words, void (*change)(Attributes&)) {
    Attributes a = attributes();
    change(a);
    Configuration c;
    EXPECT_NE(configure(a, c).find(words), std::string::npos) << configure(a, c);
    expect_form(configure(a, c));
  };
  expect("invalid attribute mode: expected \"update\" or \"read\", got \"\"", [](Attributes& a) { a.mode.clear(); });
  expect("invalid attribute schedule: expected", [](Attributes& a) { a.schedule = "some"; });
  expect("invalid attribute activation: expected \"silu\" or \"gelu\", got \"relu\"",
         [](Attributes& a) { a.activation = "relu"; });
  expect("invalid attribute memory_dtype: expected", [](Attributes& a) { a.memory_dtype = "int4"; });
  expect("invalid attribute rounding: expected", [](Attributes& a) { a.rounding = "up"; });
  expect("contradicting attributes: memory_dtype \"float32\" needs rounding \"nearest\", got \"error_feedback\"",
         [](Attributes& a) { a.rounding = "error_feedback"; });
  expect("contradicting attributes: seed needs rounding \"stochastic\", got \"nearest\"",
         [](Attributes& a) { a.seed = 1; });
  expect("invalid attribute seed: expected [0, 4294967295], got -1", [](Attributes& a) { a.seed = -1; });
  expect("invalid attribute widths: expected 2 to 4 values, got 1", [](Attributes& a) { a.widths = {6}; });
  expect("invalid attribute widths: expected 2 to 4 values, got 5", [](Attributes& a) { a.widths = {6, 6, 6, 6, 6}; });
  expect("contradicting attributes: widths must begin and end with the same value, got (6, 7)",
         [](Attributes& a) { a.widths = {6, 7}; });
  expect("invalid attribute widths: expected [1,", [](Attributes& a) { a.widths = {0, 0}; });
  expect("invalid attribute chunk_size: expected [1,", [](Attributes& a) { a.chunk_size = 0; });
  expect("invalid attribute residual: expected 0 or 1, got 2", [](Attributes& a) { a.residual = 2; });
  expect("invalid attribute layer_norm: expected 0 or 1", [](Attributes& a) { a.layer_norm = -1; });
}

TEST(ChunkNeuralMemoryAttributes, WrongOnesAreRefusedByName) {
  const auto expect = [](const char* words, void (*change)(ChunkAttributes&)) {
    ChunkAttributes a = chunk_attributes();
    change(a);
    ChunkConfiguration c;
    const std::string error = configure(a, c);
    EXPECT_NE(error.find(words), std::string::npos) << error;
    EXPECT_EQ(error.rfind("[ChunkNeuralMemory] ", 0), 0U) << error;
    expect_form(error);
  };
  expect("invalid attribute memory_dtype: expected", [](ChunkAttributes& a) { a.memory_dtype = "int4"; });
  expect("batch_size must be 0 or a multiple of chunk_size 4, got 6", [](ChunkAttributes& a) { a.batch_size = 6; });
  expect("invalid attribute batch_size: expected [0, ", [](ChunkAttributes& a) { a.batch_size = -4; });
  expect("invalid attribute loss_scale: expected a finite number above 0",
         [](ChunkAttributes& a) { a.loss_scale = 0.0F; });
  expect("invalid attribute loss_scale: expected a finite number above 0",
         [](ChunkAttributes& a) { a.loss_scale = std::nanf(""); });
  expect("invalid attribute grad_clamp: expected a finite number of at least 0",
         [](ChunkAttributes& a) { a.grad_clamp = -1.0F; });
  expect("invalid attribute keys_per_token: expected [1,", [](ChunkAttributes& a) { a.keys_per_token = 0; });
  expect("chunk_size times keys_per_token must be at most 1048576, got 4 times 1048576",
         [](ChunkAttributes& a) { a.keys_per_token = 1 << 20; });
  expect("invalid attribute orthogonalise: expected [0, 100], got 101",
         [](ChunkAttributes& a) { a.orthogonalise = 101; });
  expect("invalid attribute lookahead: expected 0 or 1, got 2", [](ChunkAttributes& a) { a.lookahead = 2; });
  expect("invalid attribute momentum_order: expected 0 or 1, got 2", [](ChunkAttributes& a) { a.momentum_order = 2; });
  expect("invalid attribute norm_weight: expected \"slow\" or \"fast\", got \"\"",
         [](ChunkAttributes& a) { a.norm_weight.clear(); });
  expect("norm_weight \"fast\" needs layer_norm 1, got 0", [](ChunkAttributes& a) { a.layer_norm = 0; });
  ChunkAttributes left_out = chunk_attributes();
  left_out.batch_size.reset();
  EXPECT_EQ(configured(left_out).batch_size, kChunk);
}

// One reader has every attribute, the other none.
TEST(AttributeTables, AreReadAndWrittenWhole) {
  const ChunkAttributes from = chunk_attributes();
  std::map<std::string, std::any> written;
  write_all(kChunkAttributes, from, [&](const char* name, const auto& value) { written[name] = value; });
  EXPECT_EQ(written.size(), kChunkAttributes.size());
  ChunkAttributes to;
  EXPECT_EQ(read_all("test", kChunkAttributes, to,
                     [&](const char* name, auto& value) {
                       value = std::any_cast<std::decay_t<decltype(value)>>(written.at(name));
                       return true;
                     }),
            "");
  EXPECT_EQ(ChunkRowLayout(configured(to)).size, ChunkRowLayout(configured(from)).size);
  EXPECT_EQ(to.batch_size, from.batch_size);
  EXPECT_EQ(to.grad_clamp, from.grad_clamp);
  Attributes none;
  EXPECT_EQ(read_all("test", kAttributes, none, [](const char*, auto&) { return false; }),
            "[test] missing attribute: mode. Fix: export the model again (TITANS-E0703)");
  EXPECT_TRUE(has_attribute(kAttributes, "mode"));
  EXPECT_FALSE(has_attribute(kAttributes, "grad_clamp"));
  EXPECT_FALSE(has_attribute(kChunkAttributes, "mode"));
}

TEST(ChunkNeuralMemoryCheck, RefusesWrongOperands) {
  const ChunkConfiguration c = configured(chunk_attributes());
  const auto expect = [](const auto& c, const char* words, const std::function<void(Call&)>& change,
                         std::int64_t tokens = 3) {
    Call call(c, tokens);
    change(call);
    expect_refused(c, call, words);
  };
  Call right(c);
  EXPECT_EQ(make(c, {})->run(right.operands, alone()), "");
  expect(c, "wrong shape of k: expected (2, 3, 6, 6), got (2, 3, 3, 6)",
         [](Call& call) { call.operands[kK].shape[2] = 3; });
  expect(c, "wrong shape of step_size: expected (2, 3, 6), got (2, 3, 3)",
         [](Call& call) { call.operands[kStepSize].shape[2] = 3; });
  expect(c, "wrong shape of modulation: expected (2, 3, 3, 3)",
         [](Call& call) { call.operands[kModulation].shape[3] = 2; });
  expect(c, "wrong shape of previous: expected (2, 3, 1, 126)",
         [](Call& call) { call.operands[kPrevious].shape[2] = 2; });
  expect(c, "wrong shape of initial_weights: expected (2, 3, 1, 126)",
         [](Call& call) { call.operands[kInitialWeights].shape[3] = 120; });
  expect(c, "missing operand: previous_gate", [](Call& call) { call.operands[kPreviousGate] = {}; });
  expect(c, "unexpected operand: previous_gate with no previous", [](Call& call) { call.operands[kPrevious] = {}; });
  expect(c, "unexpected operand: norm_scale with norm_weight \"fast\"",
         [](Call& call) { call.floats(kNormScale, {kHeads, kWidth}, 1.0F); });
  expect(c, "overlapping buffers: initial_weights and previous",
         [](Call& call) { call.operands[kInitialWeights].data = call.operands[kPrevious].data; });
  expect(c, "value out of range: fill of stream 1: expected [0, 8), got 8",
         [](Call& call) { call.integers(kFill, {0, 8}); });
  for (const Operand gate : {kStepSize, kModulation, kPreviousGate}) {
    expect(c, "gate not finite", [&](Call& call) { call.values(gate).back() = std::nanf(""); });
    expect(c, "at stream 1, head 2, token 2", [&](Call& call) { call.values(gate).back() = std::nanf(""); });
  }
  Call padded(c);
  padded.integers(kValid, {3, 2});
  for (const Operand gate : {kStepSize, kModulation, kPreviousGate}) padded.values(gate).back() = std::nanf("");
  EXPECT_EQ(make(c, {})->run(padded.operands, alone()), "");

  ChunkAttributes without = chunk_attributes();
  without.momentum_order = 0;
  expect(configured(without), "unexpected operand: momentum with momentum_order 0", [](Call&) {});
  const ChunkConfiguration aligned = configured(chunk_attributes("aligned"));
  expect(aligned, "missing operand: fill", [](Call& call) { call.operands[kFill] = {}; }, kChunk);
  expect(
      aligned, "needs fill as a multiple of 4, got 2 for stream 1", [](Call& call) { call.integers(kFill, {0, 2}); },
      kChunk);
  ChunkAttributes still = chunk_attributes("aligned");
  still.batch_size = 0;
  expect(
      configured(still), "unexpected operand: fill with schedule \"aligned\"",
      [](Call& call) { call.integers(kFill, {0, 0}); }, kChunk);
  const Configuration token = configured(attributes());
  for (const Operand operand : {kModulation, kPrevious, kInitialWeights}) {
    expect(token, "with gates per token", [&](Call& call) {
      const std::int64_t weights = 120;
      operand == kModulation ? call.floats(operand, {kStreams, kHeads, 3, 2}, 1.0F)
                             : call.floats(operand, {kStreams, kHeads, 1, weights}, 1.0F);
      if (operand == kPrevious) call.floats(kPreviousGate, {kStreams, kHeads, 3}, 1.0F);
    });
  }
}

TEST(NeuralMemoryCheck, RefusesShapesTypesAndLayouts) {
  const Configuration c = configured(attributes());
  const auto expect = [&](const char* words, const std::function<void(Call&)>& change) {
    Call call(c);
    change(call);
    expect_refused(c, call, words);
  };
  Call right(c);
  EXPECT_EQ(make(c, {})->run(right.operands, alone()), "");
  expect("wrong rank of q: expected 4, got 3", [](Call& call) { call.operands[kQ].rank = 3; });
  expect("wrong rank of state: expected 3, got 2", [](Call& call) { call.operands[kState].rank = 2; });
  expect("wrong shape of k: expected (2, 3, 3, 6), got (2, 3, 3, 5)",
         [](Call& call) { call.operands[kK].shape[3] = 5; });
  expect("wrong shape of momentum: expected (2, 3, 3)", [](Call& call) { call.operands[kMomentum].shape[1] = 1; });
  expect("wrong shape of state", [](Call& call) { call.operands[kState].shape[2] -= 16; });
  expect("wrong dtype of v: expected float32, got another type",
         [](Call& call) { call.operands[kV].dtype = DType::kOther; });
  expect("wrong dtype of fill: expected int64, got float32",
         [](Call& call) { call.operands[kFill].dtype = DType::kFloat32; });
  expect("missing operand: fill", [](Call& call) { call.operands[kFill] = {}; });
  expect("missing operand: state_out", [](Call& call) { call.operands[kStateOut] = {}; });
  expect("wrong memory layout of forget_gate: the address is NULL",
         [](Call& call) { call.operands[kForgetGate].data = nullptr; });
  expect("wrong memory layout of v: the address is not aligned to 4 bytes",
         [](Call& call) { call.operands[kV].data = call.operands[kV].as<char>() + 2; });
  expect("wrong memory layout of fill: the address is not aligned to 8 bytes",
         [](Call& call) { call.operands[kFill].data = call.operands[kFill].as<char>() + 4; });
  static constexpr std::int64_t kTransposed[] = {54, 18, 1, 3}, kDense[] = {54, 18, 6, 1};
  expect("wrong memory layout of k: expected row-major without gaps, got strides (54, 18, 1, 3)",
         [](Call& call) { call.operands[kK].strides = kTransposed; });
  right.operands[kK].strides = kDense;
  EXPECT_EQ(make(c, {})->run(right.operands, alone()), "");
}

TEST(NeuralMemoryCheck, RefusesAliasingButForTheStateItself) {
  const Configuration c = configured(attributes());
  Call call(c);
  call.operands[kStateOut].data = call.operands[kState].data;
  EXPECT_EQ(make(c, {})->run(call.operands, alone()), "");
  call.operands[kStateOut].data = call.operands[kState].as<float>() + 1;
  expect_refused(c, call, "overlapping buffers: state_out and state. Fix: bind one buffer to both");
  call = Call(c);
  call.operands[kY].data = call.operands[kQ].data;
  expect_refused(c, call, "overlapping buffers: y and q");
  call = Call(c);
  call.operands[kStats].data = call.operands[kStateOut].data;
  expect_refused(c, call, "overlapping buffers: stats and state_out");
}

TEST(NeuralMemoryCheck, RefusesValuesOutOfRange) {
  const Configuration c = configured(attributes());
  const auto expect = [&](const char* words, const std::function<void(Call&)>& change) {
    Call call(c);
    change(call);
    expect_refused(c, call, words);
  };
  expect("value out of range: fill of stream 1: expected [0, 4), got 4",
         [](Call& call) { call.integers(kFill, {0, 4}); });
  expect("fill of stream 0: expected [0, 4), got -1", [](Call& call) { call.integers(kFill, {-1, 0}); });
  expect("valid of stream 1: expected [0, 4), got 4", [](Call& call) { call.integers(kValid, {3, 4}); });
  expect("slots of stream 1: expected [0, 2), got 2", [](Call& call) { call.integers(kSlots, {0, 2}); });
  expect("slots has 1 twice", [](Call& call) { call.integers(kSlots, {1, 1}); });
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    expect("gate not finite: momentum is", [&](Call& call) { call.values(kMomentum)[16] = bad; });
    expect("at stream 1, head 2, token 1", [&](Call& call) { call.values(kForgetGate)[16] = bad; });
    expect("gate not finite: step_size is", [&](Call& call) { call.values(kStepSize)[0] = bad; });
  }
  // Padding may hold anything.
  Call padded(c);
  padded.integers(kValid, {3, 1});
  padded.values(kMomentum)[16] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(make(c, {})->run(padded.operands, alone()), "");

  const Configuration aligned = configured(attributes("update", "aligned"));
  Call odd(aligned);
  expect_refused(aligned, odd, "incomplete chunk: schedule \"aligned\" needs a multiple of 4 tokens, got 3");
  Call half(aligned, 2 * kChunk);
  half.integers(kValid, {4, 6});
  expect_refused(aligned, half, "needs valid as a multiple of 4, got 6 for stream 1");
  Call filled(aligned, kChunk);
  filled.integers(kFill, {0, 0});
  expect_refused(aligned, filled, "unexpected operand: fill with schedule \"aligned\"");
}

class NeuralMemoryKernel : public testing::TestWithParam<std::string_view> {};

template <class Configuration>
void expect_no_allocations(const Configuration& c, std::string_view target) {
  for (const std::int64_t tokens : {1, 3, 9}) {
    const std::unique_ptr<CpuKernel> kernel = make(c, target);
    Call call(c, tokens);
    EXPECT_EQ(kernel->run(call.operands, alone()), "");
    const std::size_t before = allocations;
    for (int i = 0; i < 20; ++i) EXPECT_EQ(kernel->run(call.operands, alone()), "");
    EXPECT_EQ(allocations, before) << tokens << " tokens";
  }
}

TEST_P(NeuralMemoryKernel, AllocatesNothingAfterItsFirstCalls) {
  expect_no_allocations(configured(attributes()), GetParam());
  expect_no_allocations(configured(chunk_attributes()), GetParam());
}

template <class Configuration>
void expect_same_bits(const Configuration& c, std::string_view target) {
  const std::unique_ptr<CpuKernel> kernel = make(c, target);
  Call once(c, 9);
  EXPECT_EQ(kernel->run(once.operands, alone()), "");
  for (const std::size_t threads : {2U, 3U, 5U}) {
    SpinPool pool(threads);
    for (int repeat = 0; repeat < 20; ++repeat) {
      Call again(c, 9);
      EXPECT_EQ(kernel->run(again.operands, pool.parallel()), "");
      for (const Operand operand : {kY, kStateOut, kStats, kInitialWeights}) {
        EXPECT_EQ(again.values(operand), once.values(operand)) << kOperandNames[operand];
      }
    }
  }
}

TEST_P(NeuralMemoryKernel, GivesTheSameBitsWithAnyNumberOfThreads) {
  expect_same_bits(configured(attributes()), GetParam());
  expect_same_bits(configured(chunk_attributes()), GetParam());
}

TEST_P(NeuralMemoryKernel, RunsOnSeveralThreadsAtOnce) {
  const Configuration c = configured(attributes());
  const std::unique_ptr<CpuKernel> kernel = make(c, GetParam());
  Call expected(c, 9);
  EXPECT_EQ(kernel->run(expected.operands, alone()), "");
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int repeat = 0; repeat < 20; ++repeat) {
        Call own(c, 9);
        wrong += !kernel->run(own.operands, alone()).empty() || own.values(kStateOut) != expected.values(kStateOut);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// All instruction sets agree with two other kernels to rounding error, for widths that leave partial vectors.
TEST_P(NeuralMemoryKernel, AgreesWithThePlainAndTheTextbookOne) {
  for (const std::vector<std::int64_t>& widths : {std::vector<std::int64_t>{6, 6}, {6, 33, 6}, {6, 17, 40, 6}}) {
    Attributes a = attributes();
    a.widths = widths;
    a.chunk_size = 5;
    const Configuration c = configured(a);
    const RowLayout layout(c);
    std::string error;
    for (const std::int64_t tokens : {1, 2, 11}) {
      Call plain(c, tokens), textbook(c, tokens), other(c, tokens);
      EXPECT_EQ(make(c, "plain")->run(plain.operands, alone()), "");
      EXPECT_EQ(make_textbook_kernel(c, error)->run(textbook.operands, alone()), "");
      EXPECT_EQ(make(c, GetParam())->run(other.operands, alone()), "");
      // Rows beyond the open chunk's tokens are unspecified. The textbook kernel writes more of them.
      const auto is_row = [&](Operand operand, std::size_t i) {
        const std::int64_t at = static_cast<std::int64_t>(i) % layout.size;
        return operand == kStateOut && at >= layout.layer_input[0] && at < layout.e;
      };
      for (const Operand operand : {kY, kStateOut}) {
        for (std::size_t i = 0; i < plain.values(operand).size(); ++i) {
          const float found = other.values(operand)[i];
          ASSERT_NEAR(plain.values(operand)[i], found, 2e-4 * (1 + std::abs(found))) << kOperandNames[operand] << i;
          if (is_row(operand, i)) continue;
          ASSERT_NEAR(textbook.values(operand)[i], found, 2e-4 * (1 + std::abs(found))) << kOperandNames[operand] << i;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, NeuralMemoryKernel, testing::ValuesIn(cpu_targets()),
                         [](const auto& info) { return std::string(info.param); });

TEST(CpuTargets, AreTheProcessorsOwnAndChosenByName) {
  const std::set<std::string_view> known{"avx512", "avx2", "neon", "plain"};
  ASSERT_FALSE(cpu_targets().empty());
  EXPECT_EQ(cpu_targets().back(), "plain");
  for (const std::string_view target : cpu_targets()) EXPECT_EQ(known.count(target), 1U) << target;
  ASSERT_EQ(::setenv("TITANS_CPU_TARGET", "plain", 1), 0);
  EXPECT_EQ(chosen_cpu_target(), "plain");
  const Configuration c = configured(attributes());
  EXPECT_EQ(make(c, {})->target(), "plain");
  ASSERT_EQ(::setenv("TITANS_CPU_TARGET", "mmx", 1), 0);
  EXPECT_EQ(chosen_cpu_target(), "");
  std::string error;
  EXPECT_EQ(CpuKernel::create(c, {}, error), nullptr);
  EXPECT_NE(error.find(", got mmx. Fix: set TITANS_CPU_TARGET"), std::string::npos) << error;
  ASSERT_EQ(::unsetenv("TITANS_CPU_TARGET"), 0);
  EXPECT_EQ(chosen_cpu_target(), cpu_targets().front());
}

}  // namespace
