// The operator's one check, and what a kernel promises beyond its numbers: no allocation, no thread's trace in the
// results. (Numbers against outside oracles: tests/plugins/test_kernel.py.)
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "plugins/kernels/neural_memory_cpu.h"
#include "plugins/tools/spin_pool.h"

namespace {

std::atomic<std::size_t> allocations{0};

}  // namespace

// Every operator new of this program. The others of the standard library call these.
void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(size);
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  ++allocations;
  const auto line = static_cast<std::size_t>(alignment);
  void* memory = std::aligned_alloc(line, (size + line - 1) / line * line);
  if (memory == nullptr) throw std::bad_alloc();
  // NaN, so that scratch that is read before it is written shows.
  return std::memset(memory, 0xFF, size);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

namespace {

using namespace titans::kernels;

constexpr std::int64_t kStreams = 2, kHeads = 3, kWidth = 6, kChunk = 4;

Attributes attributes(const std::string& mode = "update", const std::string& schedule = "any") {
  Attributes a;
  a.mode = mode;
  a.schedule = schedule;
  a.activation = "silu";
  a.widths = {kWidth, 10, kWidth};
  a.chunk_size = kChunk;
  return a;
}

// With all that gates = "chunk" may have.
Attributes chunk_attributes(const std::string& mode = "update", const std::string& schedule = "any") {
  Attributes a = attributes(mode, schedule);
  a.gates = "chunk";
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

// Operands of one call that are all right, over memory of their own.
class Call {
 public:
  explicit Call(const Configuration& c, std::int64_t tokens = 3) {
    const std::int64_t row = RowLayout(c).size;
    floats(kState, {kStreams, kHeads, row}, 0.3F);
    const std::int64_t keys = tokens * c.keys_per_token;
    floats(kQ, {kStreams, kHeads, tokens, kWidth}, 1.0F);
    for (const Operand operand : {kK, kV}) floats(operand, {kStreams, kHeads, keys, kWidth}, 1.0F);
    floats(kStepSize, {kStreams, kHeads, keys}, 0.1F);
    for (const Operand gate : {kMomentum, kForgetGate}) floats(gate, {kStreams, kHeads, tokens}, 0.1F);
    for (const Operand gate : {kStepSize, kMomentum, kForgetGate}) {
      for (float& value : values_[gate]) value = std::abs(value);
    }
    if (c.schedule == Schedule::kAny) {
      integers(kFill, {0, 1});
    } else if (c.counts_batch()) {
      integers(kFill, {0, c.chunk_size});
    }
    floats(kY, {kStreams, kHeads, tokens, kWidth}, 0.0F);
    floats(kStateOut, {kStreams, kHeads, row}, 0.0F);
    floats(kStats, {kStreams, kHeads, kStatCount}, 0.0F);
    if (c.gates == Gates::kChunk) {
      const std::vector<std::int64_t> weights{kStreams, kHeads, c.chunks(tokens), c.all_elements()};
      floats(kModulation, {kStreams, kHeads, tokens, c.tensors()}, 1.0F);
      floats(kPrevious, weights, 0.3F);
      floats(kPreviousGate, {kStreams, kHeads, tokens}, 0.3F);
      floats(kBefore, weights, 0.0F);
      return;
    }
    // An open chunk's coefficients are gates and their products.
    const RowLayout layout(c);
    for (std::int64_t head = 0; head < kStreams * kHeads; ++head) {
      float* values = values_[kState].data() + head * row;
      for (std::int64_t i = layout.e; i < row; ++i) values[i] = 0.0F;
      values[layout.e] = values[layout.a] = 0.1F;
      values[layout.m] = values[layout.f] = values[layout.beta] = 0.5F;
    }
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

std::unique_ptr<CpuKernel> make(const Configuration& c, std::string_view target) {
  std::string error;
  std::unique_ptr<CpuKernel> kernel = CpuKernel::create(c, target, error);
  EXPECT_NE(kernel, nullptr) << error;
  return kernel;
}

// Runs a call that must be refused: the message has these words, and nothing is written.
void expect_refused(const Configuration& c, Call& call, const std::string& words) {
  const std::vector<float> state = call.values(kState), next = call.values(kStateOut), y = call.values(kY);
  const std::string error = make(c, {})->run(call.operands, alone());
  EXPECT_NE(error.find(words), std::string::npos) << error;
  EXPECT_EQ(error.rfind("[NeuralMemory] expected ", 0), 0U) << error;
  EXPECT_NE(error.find(" but got "), std::string::npos) << error;
  EXPECT_NE(error.find("; do "), std::string::npos) << error;
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
  };
  expect("mode to be \"update\" or \"read\" but got \"\"", [](Attributes& a) { a.mode.clear(); });
  expect("schedule to be", [](Attributes& a) { a.schedule = "some"; });
  expect("activation to be \"silu\" or \"gelu\" but got \"relu\"", [](Attributes& a) { a.activation = "relu"; });
  expect("memory_dtype to be", [](Attributes& a) { a.memory_dtype = "int4"; });
  expect("rounding to be", [](Attributes& a) { a.rounding = "up"; });
  expect("rounding to be \"nearest\" with memory_dtype \"float32\"",
         [](Attributes& a) { a.rounding = "error_feedback"; });
  expect("seed to be left out with rounding \"nearest\"", [](Attributes& a) { a.seed = 1; });
  expect("seed in [0, 4294967295]", [](Attributes& a) { a.seed = -1; });
  expect("2 to 4 widths but got 1", [](Attributes& a) { a.widths = {6}; });
  expect("2 to 4 widths but got 5", [](Attributes& a) { a.widths = {6, 6, 6, 6, 6}; });
  expect("the first of widths to equal the last", [](Attributes& a) { a.widths = {6, 7}; });
  expect("widths in [1,", [](Attributes& a) { a.widths = {0, 0}; });
  expect("chunk_size in [1,", [](Attributes& a) { a.chunk_size = 0; });
  expect("residual to be 0 or 1 but got 2", [](Attributes& a) { a.residual = 2; });
  expect("layer_norm to be 0 or 1", [](Attributes& a) { a.layer_norm = -1; });
}

TEST(NeuralMemoryAttributes, WrongOnesOfChunksAreRefusedByName) {
  const auto expect = [](const char* words, void (*change)(Attributes&)) {
    Attributes a = chunk_attributes();
    change(a);
    Configuration c;
    const std::string error = configure(a, c);
    EXPECT_NE(error.find(words), std::string::npos) << error;
    EXPECT_NE(error.find("; do "), std::string::npos) << error;
  };
  expect("gates to be \"token\" or \"chunk\" but got \"block\"", [](Attributes& a) { a.gates = "block"; });
  expect("batch_size to be 0 or a multiple of chunk_size, 4, up to", [](Attributes& a) { a.batch_size = 6; });
  expect("but got -4", [](Attributes& a) { a.batch_size = -4; });
  expect("loss_scale to be finite and above 0", [](Attributes& a) { a.loss_scale = 0.0F; });
  expect("loss_scale to be finite and above 0", [](Attributes& a) { a.loss_scale = std::nanf(""); });
  expect("grad_clamp to be finite and at least 0", [](Attributes& a) { a.grad_clamp = -1.0F; });
  expect("keys_per_token in [1,", [](Attributes& a) { a.keys_per_token = 0; });
  expect("orthogonalise in [0, 100] but got 101", [](Attributes& a) { a.orthogonalise = 101; });
  expect("lookahead to be 0 or 1 but got 2", [](Attributes& a) { a.lookahead = 2; });
  expect("momentum_order to be 0 or 1 but got 2", [](Attributes& a) { a.momentum_order = 2; });
  expect("norm_weight to be \"slow\" or \"fast\" but got \"\"", [](Attributes& a) { a.norm_weight.clear(); });
  expect("layer_norm to be 1 with norm_weight \"fast\"", [](Attributes& a) { a.layer_norm = 0; });

  // Without chunks each of them would be ignored.
  const auto expect_unknown = [](const std::string& name, void (*change)(Attributes&)) {
    Attributes a = attributes();
    change(a);
    Configuration c;
    EXPECT_NE(configure(a, c).find("attribute " + name + " to be left out with gates \"token\""), std::string::npos)
        << configure(a, c);
  };
  expect_unknown("batch_size", [](Attributes& a) { a.batch_size = 2 * kChunk; });
  expect_unknown("loss_scale", [](Attributes& a) { a.loss_scale = 0.5F; });
  expect_unknown("keys_per_token", [](Attributes& a) { a.keys_per_token = 2; });
  expect_unknown("lookahead", [](Attributes& a) { a.lookahead = 1; });
  expect_unknown("norm_weight", [](Attributes& a) { a.norm_weight = "fast"; });
  expect_unknown("momentum_order", [](Attributes& a) { a.momentum_order = 0; });
  expect_unknown("grad_clamp", [](Attributes& a) { a.grad_clamp = 1.0F; });
  expect_unknown("orthogonalise", [](Attributes& a) { a.orthogonalise = 5; });
  Attributes same = attributes();
  same.batch_size = kChunk;
  EXPECT_EQ(configured(same).batch_size, kChunk);
}

TEST(NeuralMemoryCheck, RefusesOperandsOfChunks) {
  const Configuration c = configured(chunk_attributes());
  const auto expect = [](const Configuration& c, const char* words, const std::function<void(Call&)>& change,
                         std::int64_t tokens = 3) {
    Call call(c, tokens);
    change(call);
    expect_refused(c, call, words);
  };
  Call right(c);
  EXPECT_EQ(make(c, {})->run(right.operands, alone()), "");
  expect(c, "k of shape (2, 3, 6, 6) but got (2, 3, 3, 6)", [](Call& call) { call.operands[kK].shape[2] = 3; });
  expect(c, "step_size of shape (2, 3, 6)", [](Call& call) { call.operands[kStepSize].shape[2] = 3; });
  expect(c, "modulation of shape (2, 3, 3, 3)", [](Call& call) { call.operands[kModulation].shape[3] = 2; });
  expect(c, "previous of shape (2, 3, 1, 126)", [](Call& call) { call.operands[kPrevious].shape[2] = 2; });
  expect(c, "before of shape (2, 3, 1, 126)", [](Call& call) { call.operands[kBefore].shape[3] = 120; });
  expect(c, "operand previous_gate but got none", [](Call& call) { call.operands[kPreviousGate] = {}; });
  expect(c, "no previous_gate with no previous", [](Call& call) { call.operands[kPrevious] = {}; });
  expect(c, "no norm_scale with norm_weight \"fast\"",
         [](Call& call) { call.floats(kNormScale, {kHeads, kWidth}, 1.0F); });
  expect(c, "before in memory of its own",
         [](Call& call) { call.operands[kBefore].data = call.operands[kPrevious].data; });
  expect(c, "fill in [0, 8) but got 8", [](Call& call) { call.integers(kFill, {0, 8}); });
  for (const Operand gate : {kStepSize, kModulation, kPreviousGate}) {
    expect(c, "to be finite", [&](Call& call) { call.values(gate).back() = std::nanf(""); });
    expect(c, "at stream 1, head 2, token 2", [&](Call& call) { call.values(gate).back() = std::nanf(""); });
  }
  Call padded(c);
  padded.integers(kValid, {3, 2});
  for (const Operand gate : {kStepSize, kModulation, kPreviousGate}) padded.values(gate).back() = std::nanf("");
  EXPECT_EQ(make(c, {})->run(padded.operands, alone()), "");

  Attributes without = chunk_attributes();
  without.momentum_order = 0;
  expect(configured(without), "no momentum with momentum_order 0", [](Call&) {});
  const Configuration aligned = configured(chunk_attributes("update", "aligned"));
  expect(aligned, "operand fill but got none", [](Call& call) { call.operands[kFill] = {}; }, kChunk);
  expect(aligned, "fill to be a multiple of 4", [](Call& call) { call.integers(kFill, {0, 2}); }, kChunk);
  Attributes still = chunk_attributes("update", "aligned");
  still.batch_size = 0;
  expect(
      configured(still), "no fill with schedule \"aligned\"", [](Call& call) { call.integers(kFill, {0, 0}); }, kChunk);
  const Configuration token = configured(attributes());
  for (const Operand operand : {kModulation, kPrevious, kBefore}) {
    expect(token, "with gates \"token\" but got one", [&](Call& call) {
      const std::int64_t weights = token.all_elements();
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
  expect("q of rank 4 but got rank 3", [](Call& call) { call.operands[kQ].rank = 3; });
  expect("state of rank 3", [](Call& call) { call.operands[kState].rank = 2; });
  expect("k of shape (2, 3, 3, 6) but got (2, 3, 3, 5)", [](Call& call) { call.operands[kK].shape[3] = 5; });
  expect("momentum of shape (2, 3, 3)", [](Call& call) { call.operands[kMomentum].shape[1] = 1; });
  expect("state of shape", [](Call& call) { call.operands[kState].shape[2] -= 16; });
  expect("v of float32 but got another type", [](Call& call) { call.operands[kV].dtype = DType::kOther; });
  expect("fill of int64 but got float32", [](Call& call) { call.operands[kFill].dtype = DType::kFloat32; });
  expect("operand fill but got none", [](Call& call) { call.operands[kFill] = {}; });
  expect("operand state_out but got none", [](Call& call) { call.operands[kStateOut] = {}; });
  expect("forget_gate in memory but got NULL", [](Call& call) { call.operands[kForgetGate].data = nullptr; });
  expect("v aligned to 4 bytes", [](Call& call) { call.operands[kV].data = call.operands[kV].as<char>() + 2; });
  expect("fill aligned to 8 bytes",
         [](Call& call) { call.operands[kFill].data = call.operands[kFill].as<char>() + 4; });
  static constexpr std::int64_t kTransposed[] = {54, 18, 1, 3}, kDense[] = {54, 18, 6, 1};
  expect("k row-major without gaps but got strides (54, 18, 1, 3)",
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
  expect_refused(c, call,
                 "state_out in memory of its own, or exactly that of state but got memory that state uses too");
  call = Call(c);
  call.operands[kY].data = call.operands[kQ].data;
  expect_refused(c, call, "y in memory of its own but got memory that q uses too");
  call = Call(c);
  call.operands[kStats].data = call.operands[kStateOut].data;
  expect_refused(c, call, "stats in memory of its own");
}

TEST(NeuralMemoryCheck, RefusesValuesOutOfRange) {
  const Configuration c = configured(attributes());
  const auto expect = [&](const char* words, const std::function<void(Call&)>& change) {
    Call call(c);
    change(call);
    expect_refused(c, call, words);
  };
  expect("fill in [0, 4) but got 4 for stream 1", [](Call& call) { call.integers(kFill, {0, 4}); });
  expect("fill in [0, 4) but got -1 for stream 0", [](Call& call) { call.integers(kFill, {-1, 0}); });
  expect("valid in [0, 4)", [](Call& call) { call.integers(kValid, {3, 4}); });
  expect("slots in [0, 2)", [](Call& call) { call.integers(kSlots, {0, 2}); });
  expect("slots that are all different but got 1 twice", [](Call& call) { call.integers(kSlots, {1, 1}); });
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    expect("momentum to be finite", [&](Call& call) { call.values(kMomentum)[16] = bad; });
    expect("at stream 1, head 2, token 1", [&](Call& call) { call.values(kForgetGate)[16] = bad; });
    expect("step_size to be finite", [&](Call& call) { call.values(kStepSize)[0] = bad; });
  }
  // What does not count may hold anything.
  Call padded(c);
  padded.integers(kValid, {3, 1});
  padded.values(kMomentum)[16] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(make(c, {})->run(padded.operands, alone()), "");

  const Configuration aligned = configured(attributes("update", "aligned"));
  Call odd(aligned);
  expect_refused(aligned, odd, "whole chunks of 4 tokens with schedule \"aligned\" but got 3 tokens");
  Call half(aligned, 2 * kChunk);
  half.integers(kValid, {4, 6});
  expect_refused(aligned, half, "valid to be a multiple of 4");
  Call filled(aligned, kChunk);
  filled.integers(kFill, {0, 0});
  expect_refused(aligned, filled, "no fill with schedule \"aligned\"");
}

class NeuralMemoryKernel : public testing::TestWithParam<std::string_view> {};

TEST_P(NeuralMemoryKernel, AllocatesNothingAfterItsFirstCalls) {
  for (const Configuration& c : {configured(attributes()), configured(chunk_attributes())}) {
    for (const std::int64_t tokens : {1, 3, 9}) {
      const std::unique_ptr<CpuKernel> kernel = make(c, GetParam());
      Call call(c, tokens);
      EXPECT_EQ(kernel->run(call.operands, alone()), "");
      const std::size_t before = allocations;
      for (int i = 0; i < 20; ++i) EXPECT_EQ(kernel->run(call.operands, alone()), "");
      EXPECT_EQ(allocations, before) << tokens << " tokens";
    }
  }
}

TEST_P(NeuralMemoryKernel, GivesTheSameBitsWithAnyNumberOfThreads) {
  for (const Configuration& c : {configured(attributes()), configured(chunk_attributes())}) {
    const std::unique_ptr<CpuKernel> kernel = make(c, GetParam());
    Call once(c, 9);
    EXPECT_EQ(kernel->run(once.operands, alone()), "");
    for (const std::size_t threads : {2U, 3U, 5U}) {
      SpinPool pool(threads);
      for (int repeat = 0; repeat < 20; ++repeat) {
        Call again(c, 9);
        EXPECT_EQ(kernel->run(again.operands, pool.parallel()), "");
        for (const Operand operand : {kY, kStateOut, kStats, kBefore}) {
          EXPECT_EQ(again.values(operand), once.values(operand)) << kOperandNames[operand];
        }
      }
    }
  }
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

// One processor's instruction sets agree to rounding: none of them leaves out a lane.
TEST_P(NeuralMemoryKernel, AgreesWithThePlainOne) {
  for (const std::vector<std::int64_t>& widths : {std::vector<std::int64_t>{6, 6}, {6, 33, 6}, {6, 17, 40, 6}}) {
    Attributes a = attributes();
    a.widths = widths;
    a.chunk_size = 5;
    const Configuration c = configured(a);
    for (const std::int64_t tokens : {1, 2, 11}) {
      Call plain(c, tokens), other(c, tokens);
      EXPECT_EQ(make(c, "plain")->run(plain.operands, alone()), "");
      EXPECT_EQ(make(c, GetParam())->run(other.operands, alone()), "");
      for (const Operand operand : {kY, kStateOut}) {
        for (std::size_t i = 0; i < plain.values(operand).size(); ++i) {
          ASSERT_NEAR(plain.values(operand)[i], other.values(operand)[i],
                      2e-4 * (1 + std::abs(plain.values(operand)[i])))
              << kOperandNames[operand] << " " << i;
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
  EXPECT_NE(error.find("but got mmx; do set TITANS_CPU_TARGET"), std::string::npos) << error;
  ASSERT_EQ(::unsetenv("TITANS_CPU_TARGET"), 0);
  EXPECT_EQ(chosen_cpu_target(), cpu_targets().front());
}

}  // namespace
