// The CPU kernels of CachedAttention and CausalConvolution on every instruction set: against float64, without
// allocations, on several threads, and their checks of memory that ONNX Runtime does not pass. (tests/plugins has more
// cases, and compares with an independent oracle in Python.)
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "count_allocations.h"
#include "plugins/kernels/cached_attention_cpu.h"
#include "plugins/kernels/causal_convolution_cpu.h"
#include "plugins/kernels/cpu_kernel.h"
#include "plugins/tools/spin_pool.h"

namespace {

using titans::kernels::cpu_targets;
using titans::kernels::DType;
using titans::kernels::Parallel;
using titans::kernels::SpinPool;
using titans::kernels::Tensor;
namespace attention = titans::kernels::cached_attention;
namespace convolution = titans::kernels::causal_convolution;

constexpr double kTolerance = 2e-5;

Parallel alone() {
  return {[](void*, std::size_t count, void (*body)(void*, std::size_t), void* context) {
            for (std::size_t i = 0; i < count; ++i) body(context, i);
          },
          nullptr};
}

// The operands of a call with their memory. Floats are random.
template <class Operands>
class Memory {
 public:
  void floats(std::size_t operand, const std::vector<std::int64_t>& shape) {
    std::int64_t count = 1;
    for (const std::int64_t extent : shape) count *= extent;
    std::normal_distribution<float> draw(0.0F, 1.0F);
    std::vector<float>& values = floats_[operand];
    values.resize(static_cast<std::size_t>(count));
    for (float& value : values) value = draw(random_);
    set(operand, values.data(), DType::kFloat32, shape);
  }
  void integers(std::size_t operand, std::vector<std::int64_t> values) {
    integers_[operand] = std::move(values);
    const auto count = static_cast<std::int64_t>(integers_[operand].size());
    set(operand, integers_[operand].data(), DType::kInt64, {count});
  }
  std::vector<float>& values(std::size_t operand) { return floats_[operand]; }

  Operands operands;

 private:
  void set(std::size_t operand, void* data, DType dtype, const std::vector<std::int64_t>& shape) {
    Tensor& tensor = operands[operand];
    tensor = {};
    tensor.data = data;
    tensor.dtype = dtype;
    tensor.rank = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), tensor.shape.begin());
  }

  std::array<std::vector<float>, std::tuple_size_v<Operands>> floats_;
  std::array<std::vector<std::int64_t>, std::tuple_size_v<Operands>> integers_;
  std::mt19937 random_{7};
};

// Two streams in a pool of three, with both limits, two groups, persistent rows and rotation.
struct AttentionCall : Memory<attention::Operands> {
  static constexpr std::int64_t kHeads = 2, kWidth = 22, kPersistent = 3, kGroups = 2, kWindow = 11, kSegment = 20;
  std::int64_t tokens;

  explicit AttentionCall(std::int64_t count) : tokens(count) {
    using namespace attention;
    const std::vector<std::int64_t> cache{3, kHeads, kPersistent + kGroups * kWindow, kWidth};
    const std::vector<std::int64_t> rows{2, kGroups * tokens, kHeads * kWidth}, queries{2, tokens, kHeads * kWidth};
    for (const Operand pool : {kKeys, kValues, kKeysOut, kValuesOut}) floats(pool, cache);
    for (const Operand row : {kK, kV}) floats(row, rows);
    for (const Operand query : {kQ, kY}) floats(query, queries);
    integers(kPosition, {4, (std::int64_t{1} << 40) + 3});
    std::vector<std::int64_t> increments;
    for (std::int64_t i = 0; i < kWidth / 2; ++i) increments.push_back(683565275 >> i);
    integers(kIncrements, increments);
    integers(kValid, {tokens, std::max<std::int64_t>(tokens - 1, 0)});
    integers(kSlots, {2, 0});
  }

  static attention::Configuration configuration(const std::string& rotary) {
    attention::Attributes a;
    a.heads = kHeads;
    a.window = kWindow;
    a.segment = kSegment;
    a.persistent = kPersistent;
    a.groups = kGroups;
    a.rotary = rotary;
    attention::Configuration c;
    EXPECT_EQ(attention::configure(a, c), "");
    return c;
  }

  // y, keys_out and values_out in float64, row by row.
  std::vector<std::vector<double>> expected(const std::string& rotary) const {
    using namespace attention;
    const auto wide = [&](Operand which) {
      const float* from = operands[which].as<const float>();
      return std::vector<double>(from, from + operands[which].elements());
    };
    const auto number = [&](Operand which, std::int64_t i) { return operands[which].as<const std::int64_t>()[i]; };
    std::vector<double> keys = wide(kKeys), values = wide(kValues), y(wide(kQ).size(), 0.0);
    const std::vector<double> all_q = wide(kQ), all_k = wide(kK), all_v = wide(kV);
    const std::int64_t cached = kPersistent + kGroups * kWindow, row_size = kHeads * kWidth;
    const auto rotated = [&](const double* x, std::int64_t place) {
      std::vector<double> out(static_cast<std::size_t>(kWidth));
      for (std::int64_t i = 0; i < kWidth / 2; ++i) {
        const auto phase = static_cast<std::uint32_t>(static_cast<std::uint64_t>(place) *
                                                      static_cast<std::uint64_t>(number(kIncrements, i)));
        const double angle = phase * (2 * std::acos(-1.0) / 4294967296.0);
        const auto a = static_cast<std::size_t>(rotary == "pairs" ? 2 * i : i);
        const auto b = static_cast<std::size_t>(rotary == "pairs" ? 2 * i + 1 : i + kWidth / 2);
        out[a] = x[a] * std::cos(angle) - x[b] * std::sin(angle);
        out[b] = x[b] * std::cos(angle) + x[a] * std::sin(angle);
      }
      return out;
    };
    for (std::int64_t b = 0; b < 2; ++b) {
      for (std::int64_t t = 0; t < number(kValid, b); ++t) {
        const std::int64_t i = number(kPosition, b) + t;
        for (std::int64_t h = 0; h < kHeads; ++h) {
          const std::int64_t head = (number(kSlots, b) * kHeads + h) * cached;
          std::vector<std::int64_t> seen;
          for (std::int64_t f = 0; f < kPersistent; ++f) seen.push_back(head + f);
          for (std::int64_t g = 0; g < kGroups; ++g) {
            const std::int64_t ring = head + kPersistent + g * kWindow;
            const std::int64_t from = (b * kGroups * tokens + g * tokens + t) * row_size + h * kWidth;
            const std::vector<double> key = rotated(all_k.data() + from, i);
            std::copy(key.begin(), key.end(), keys.begin() + (ring + i % kWindow) * kWidth);
            std::copy_n(all_v.begin() + from, kWidth, values.begin() + (ring + i % kWindow) * kWidth);
            for (std::int64_t j = std::max<std::int64_t>(0, i - kWindow + 1); j <= i; ++j) {
              if (j / kSegment == i / kSegment) seen.push_back(ring + j % kWindow);
            }
          }
          const std::int64_t at = (b * tokens + t) * row_size + h * kWidth;
          const std::vector<double> query = rotated(all_q.data() + at, i);
          double total = 0;
          for (const std::int64_t row : seen) {
            double score = 0;
            for (std::int64_t d = 0; d < kWidth; ++d) {
              score += query[static_cast<std::size_t>(d)] * keys[static_cast<std::size_t>(row * kWidth + d)];
            }
            const double weight = std::exp(score / std::sqrt(static_cast<double>(kWidth)));
            total += weight;
            for (std::int64_t d = 0; d < kWidth; ++d) {
              y[static_cast<std::size_t>(at + d)] += weight * values[static_cast<std::size_t>(row * kWidth + d)];
            }
          }
          for (std::int64_t d = 0; d < kWidth; ++d) y[static_cast<std::size_t>(at + d)] /= total;
        }
      }
    }
    return {y, keys, values};
  }
};

struct ConvolutionCall : Memory<convolution::Operands> {
  explicit ConvolutionCall(std::int64_t tokens, std::int64_t rows = 4) {
    using namespace convolution;
    constexpr std::int64_t kChannels = 150;
    for (const Operand pool : {kPast, kPastOut}) floats(pool, {3, rows - 1, kChannels});
    for (const Operand x : {kX, kY}) floats(x, {2, tokens, kChannels});
    floats(kWeight, {rows, kChannels});
    floats(kBias, {kChannels});
    integers(kValid, {tokens, std::max<std::int64_t>(tokens - 1, 0)});
    integers(kSlots, {2, 0});
  }

  // y and past_out in float64.
  std::vector<std::vector<double>> expected() const {
    using namespace convolution;
    const auto& [streams, tokens, channels, none] = operands[kX].shape;
    const std::int64_t rows = operands[kWeight].shape[0];
    const auto at = [&](Operand which, std::int64_t i) { return double{operands[which].as<const float>()[i]}; };
    std::vector<double> past, y(static_cast<std::size_t>(streams * tokens * channels), 0.0);
    for (std::int64_t i = 0; i < operands[kPast].elements(); ++i) past.push_back(at(kPast, i));
    for (std::int64_t b = 0; b < streams; ++b) {
      const std::int64_t valid = operands[kValid].as<const std::int64_t>()[b];
      double* own = past.data() + operands[kSlots].as<const std::int64_t>()[b] * (rows - 1) * channels;
      for (std::int64_t c = 0; c < channels; ++c) {
        for (std::int64_t t = 0; t < valid; ++t) {
          const std::int64_t here = (b * tokens + t) * channels + c;
          double sum = at(kBias, c) + at(kWeight, (rows - 1) * channels + c) * at(kX, here);
          for (std::int64_t i = 0; i + 1 < rows; ++i) sum += at(kWeight, i * channels + c) * own[i * channels + c];
          y[static_cast<std::size_t>(here)] = sum;
          for (std::int64_t i = 0; i + 2 < rows; ++i) own[i * channels + c] = own[(i + 1) * channels + c];
          own[(rows - 2) * channels + c] = at(kX, here);
        }
      }
    }
    return {y, past};
  }
};

void expect_near(const std::vector<float>& found, const std::vector<double>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) ASSERT_NEAR(found[i], expected[i], kTolerance) << i;
}

template <class CpuKernel, class Configuration>
std::unique_ptr<CpuKernel> make(const Configuration& c, std::string_view target) {
  std::string error;
  std::unique_ptr<CpuKernel> kernel = CpuKernel::create(c, target, error);
  EXPECT_NE(kernel, nullptr) << error;
  return kernel;
}

std::unique_ptr<attention::CpuKernel> make_attention(std::string_view target, const std::string& rotary = "halves") {
  return make<attention::CpuKernel>(AttentionCall::configuration(rotary), target);
}
std::unique_ptr<convolution::CpuKernel> make_convolution(std::string_view target) {
  return make<convolution::CpuKernel>(convolution::Configuration(), target);
}

class CacheKernels : public testing::TestWithParam<std::string_view> {};

TEST_P(CacheKernels, AgreeWithFloat64) {
  for (const char* rotary : {"halves", "pairs"}) {
    const auto kernel = make_attention(GetParam(), rotary);
    for (const std::int64_t tokens : {1, 2, 7, 37, 64}) {
      AttentionCall call(tokens);
      ASSERT_EQ(kernel->run(call.operands, alone()), "");
      const auto expected = call.expected(rotary);
      for (std::size_t i = 0; i < expected.size(); ++i) expect_near(call.values(attention::kY + i), expected[i]);
    }
  }
  const auto kernel = make_convolution(GetParam());
  for (const std::int64_t rows : {2, 3, 4, 7}) {
    for (const std::int64_t tokens : {1, 2, 37}) {
      ConvolutionCall call(tokens, rows);
      ASSERT_EQ(kernel->run(call.operands, alone()), "");
      const auto expected = call.expected();
      for (std::size_t i = 0; i < expected.size(); ++i) expect_near(call.values(convolution::kY + i), expected[i]);
    }
  }
}

TEST_P(CacheKernels, AllocateInTheFirstCallsOnly) {
  const auto attend = make_attention(GetParam());
  const auto convolve = make_convolution(GetParam());
  for (const std::int64_t tokens : {1, 3, 40}) {
    AttentionCall first(tokens), second(tokens);
    ConvolutionCall third(tokens);
    EXPECT_EQ(attend->run(first.operands, alone()), "");
    const std::size_t before = allocations;
    EXPECT_EQ(attend->run(second.operands, alone()), "");
    EXPECT_EQ(convolve->run(third.operands, alone()), "");
    EXPECT_EQ(allocations, before) << tokens << " tokens";
  }
}

TEST_P(CacheKernels, GiveTheSameBitsWithAnyNumberOfThreads) {
  const auto attend = make_attention(GetParam());
  const auto convolve = make_convolution(GetParam());
  for (const std::int64_t tokens : {1, 40}) {
    AttentionCall attended(tokens);
    ConvolutionCall convolved(tokens);
    EXPECT_EQ(attend->run(attended.operands, alone()), "");
    EXPECT_EQ(convolve->run(convolved.operands, alone()), "");
    for (const std::size_t threads : {2U, 3U, 5U}) {
      SpinPool pool(threads);
      for (int repeat = 0; repeat < 10; ++repeat) {
        AttentionCall again(tokens);
        ConvolutionCall also(tokens);
        EXPECT_EQ(attend->run(again.operands, pool.parallel()), "");
        EXPECT_EQ(convolve->run(also.operands, pool.parallel()), "");
        for (std::size_t i = attention::kY; i < attention::kOperands; ++i) {
          EXPECT_EQ(again.values(i), attended.values(i)) << attention::kOperandNames[i];
        }
        for (std::size_t i = convolution::kY; i < convolution::kOperands; ++i) {
          EXPECT_EQ(also.values(i), convolved.values(i)) << convolution::kOperandNames[i];
        }
      }
    }
  }
}

TEST_P(CacheKernels, RunOnSeveralThreadsAtOnce) {
  const auto kernel = make_attention(GetParam());
  AttentionCall expected(40);
  EXPECT_EQ(kernel->run(expected.operands, alone()), "");
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int repeat = 0; repeat < 10; ++repeat) {
        AttentionCall own(40);
        wrong += !kernel->run(own.operands, alone()).empty() ||
                 own.values(attention::kY) != expected.values(attention::kY) ||
                 own.values(attention::kKeysOut) != expected.values(attention::kKeysOut);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

INSTANTIATE_TEST_SUITE_P(Targets, CacheKernels, testing::ValuesIn(cpu_targets()),
                         [](const auto& info) { return std::string(info.param); });

// Runs a call that must be rejected with these words, and checks that nothing is written.
template <class Kernel, class Call>
void expect_refused(const Kernel& kernel, Call& call, const std::string& words) {
  std::vector<std::vector<float>> before;
  for (std::size_t i = 0; i < call.operands.size(); ++i) before.push_back(call.values(i));
  const std::string error = kernel.run(call.operands, alone());
  EXPECT_NE(error.find(words), std::string::npos) << error;
  EXPECT_NE(error.find(". Fix: "), std::string::npos) << error;
  for (std::size_t i = 0; i < before.size(); ++i) EXPECT_EQ(call.values(i), before[i]) << i;
}

TEST(CachedAttentionCheck, RefusesDTypesLayoutsAndSharedMemory) {
  using namespace attention;
  const auto kernel = make_attention({});
  const auto expect = [&](const char* words, const std::function<void(AttentionCall&)>& change) {
    AttentionCall call(3);
    change(call);
    expect_refused(*kernel, call, words);
  };
  using Call = AttentionCall;
  expect("wrong dtype of position: expected int64, got float32",
         [](Call& call) { call.operands[kPosition].dtype = DType::kFloat32; });
  expect("wrong dtype of keys: expected float32, got another type",
         [](Call& call) { call.operands[kKeys].dtype = DType::kOther; });
  expect("missing operand: values_out", [](Call& call) { call.operands[kValuesOut] = {}; });
  expect("missing operand: position", [](Call& call) { call.operands[kPosition] = {}; });
  expect("wrong memory layout of v: the address is NULL", [](Call& call) { call.operands[kV].data = nullptr; });
  expect("wrong memory layout of q: the address is not aligned to 4 bytes",
         [](Call& call) { call.operands[kQ].data = call.operands[kQ].as<char>() + 2; });
  static constexpr std::int64_t kTransposed[] = {132, 1, 3};
  expect("wrong memory layout of q: expected row-major without gaps, got strides (132, 1, 3)",
         [](Call& call) { call.operands[kQ].strides = kTransposed; });
  expect("overlapping buffers: keys_out and keys. Fix: bind one buffer to both",
         [](Call& call) { call.operands[kKeysOut].data = call.operands[kKeys].as<float>() + 1; });
  expect("overlapping buffers: values_out and keys. Fix: bind another buffer",
         [](Call& call) { call.operands[kValuesOut].data = call.operands[kKeys].data; });
  expect("overlapping buffers: y and q", [](Call& call) { call.operands[kY].data = call.operands[kQ].data; });
  expect("slots has 2 twice", [](Call& call) { call.integers(kSlots, {2, 2}); });
  expect("value out of range: position of stream 1",
         [](Call& call) { call.integers(kPosition, {0, std::numeric_limits<std::int64_t>::max() - 2}); });

  Call last(3);
  last.integers(kPosition, {0, std::numeric_limits<std::int64_t>::max() - 3});
  EXPECT_EQ(kernel->run(last.operands, alone()), "");
}

TEST(CausalConvolutionCheck, RefusesDTypesLayoutsAndSharedMemory) {
  using namespace convolution;
  const auto kernel = make_convolution({});
  const auto expect = [&](const char* words, const std::function<void(ConvolutionCall&)>& change) {
    ConvolutionCall call(3);
    change(call);
    expect_refused(*kernel, call, words);
  };
  using Call = ConvolutionCall;
  expect("wrong dtype of x: expected float32, got bfloat16",
         [](Call& call) { call.operands[kX].dtype = DType::kBFloat16; });
  expect("missing operand: past_out", [](Call& call) { call.operands[kPastOut] = {}; });
  expect("wrong memory layout of bias: the address is NULL", [](Call& call) { call.operands[kBias].data = nullptr; });
  expect("overlapping buffers: past_out and past. Fix: bind one buffer to both",
         [](Call& call) { call.operands[kPastOut].data = call.operands[kPast].as<float>() + 1; });
  expect("overlapping buffers: y and x", [](Call& call) { call.operands[kY].data = call.operands[kX].data; });
  expect("valid of stream 0: expected [0, 4), got 4", [](Call& call) { call.integers(kValid, {4, 0}); });
}

}  // namespace
