// The complete path through the plugin, with a test double of the CUDA kernel that computes on the CPU. Numbers are
// compared with the equations in float64 and with the CPU kernel. Other tests cover the three bindings of the state,
// types, workspace and errors.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "plugins/kernels/cpu_kernel.h"
#include "tensorrt_plugin_double.h"
#include "tensorrt_plugin_runner.h"

namespace {

using namespace titans::plugin_host;
using namespace titans::kernels;
using nvinfer1::DataType;

const std::vector<std::int64_t> kCuts{9, 1, 3, 1, 5};

class PluginRun : public testing::Test {
 protected:
  PluginRun()
      : library(TITANS_PLUGIN_DOUBLE), record(reinterpret_cast<TitansDoubleFunction>(library.symbol(kTitansDouble))()) {
    record = {};
    record.device = {90, 4, 200 * 1024};
  }
  void TearDown() override { EXPECT_EQ(library.messages(), ""); }

  // The messages of a rejection, which must have the standard form.
  std::string refusal() {
    const std::string messages = library.messages();
    EXPECT_TRUE(is_one_error(messages)) << messages;
    return messages;
  }

  Library library;
  TitansDouble& record;
};

double largest_difference(const std::vector<float>& got, const std::vector<double>& expected) {
  double largest = 0.0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(static_cast<double>(got.at(i)) - expected[i]);
    if (!(difference <= largest)) largest = difference;  // a NaN counts as the largest
  }
  return largest;
}

// y of all tokens, from the kernel's own interface.
std::vector<float> from_kernel(const Problem& p) {
  std::string error;
  const std::unique_ptr<CpuKernel> kernel = CpuKernel::create(p.configuration, {}, error);
  EXPECT_NE(kernel, nullptr) << error;
  std::vector<float> state = p.state(), y(p.q.size());
  std::vector<std::int64_t> fill(static_cast<std::size_t>(p.streams), 0);
  Operands operands;
  const auto set = [&](Operand operand, const void* data, DType dtype, const std::vector<std::int64_t>& shape) {
    operands[operand].data = const_cast<void*>(data);
    operands[operand].dtype = dtype;
    operands[operand].rank = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), operands[operand].shape.begin());
  };
  const std::vector<std::int64_t> rows{p.streams, p.heads, p.tokens, Problem::kWidth},
      gates{p.streams, p.heads, p.tokens}, pool{p.streams, p.heads, RowLayout(p.configuration).size};
  set(kState, state.data(), DType::kFloat32, pool);
  set(kStateOut, state.data(), DType::kFloat32, pool);
  set(kQ, p.q.data(), DType::kFloat32, rows);
  set(kK, p.k.data(), DType::kFloat32, rows);
  set(kV, p.v.data(), DType::kFloat32, rows);
  set(kStepSize, p.step_size.data(), DType::kFloat32, gates);
  set(kMomentum, p.momentum.data(), DType::kFloat32, gates);
  set(kForgetGate, p.forget_gate.data(), DType::kFloat32, gates);
  set(kFill, fill.data(), DType::kInt64, {p.streams});
  set(kLearn, p.learn.data(), DType::kBool, {p.streams});
  set(kY, y.data(), DType::kFloat32, rows);
  const Parallel alone{[](void*, std::size_t count, void (*body)(void*, std::size_t), void* context) {
                         for (std::size_t i = 0; i < count; ++i) body(context, i);
                       },
                       nullptr};
  EXPECT_EQ(kernel->run(operands, alone), "");
  return y;
}

using Way = std::tuple<const char*, DataType, DataType>;

class PluginWays : public PluginRun, public testing::WithParamInterface<Way> {};

TEST_P(PluginWays, GivesTheNumbersOfTheEquations) {
  const auto& [alias, values, learn] = GetParam();
  Problem p(3);  // its learn is true, false, true
  if (values == DataType::kHALF) p.round(DType::kFloat16);
  if (values == DataType::kBF16) p.round(DType::kBFloat16);
  Runner runner(library, p, alias, values, learn);
  // The equations get the rounded values too. Only the rounding of the answers remains: half a unit of 2^-10 or 2^-7.
  const std::vector<double> expected = p.expected();
  const double largest = *std::max_element(expected.begin(), expected.end());
  const double rounding = values == DataType::kFLOAT ? 0.0 : std::ldexp(largest, values == DataType::kHALF ? -11 : -8);
  EXPECT_LT(largest_difference(runner.run(kCuts), expected), 1e-5 + rounding);
  EXPECT_EQ(record.stream, Runner::kStream);
  EXPECT_EQ(record.learn, p.learn);
  EXPECT_EQ(record.copies > 0, learn != DataType::kBOOL);
}

INSTANTIATE_TEST_SUITE_P(All, PluginWays,
                         testing::Combine(testing::Values("declared", "undeclared", "two-buffers"),
                                          testing::Values(DataType::kFLOAT, DataType::kHALF, DataType::kBF16),
                                          testing::Values(DataType::kBOOL, DataType::kINT32, DataType::kINT64)),
                         [](const testing::TestParamInfo<Way>& way) {
                           std::string name = std::get<0>(way.param);
                           name += "_values" + std::to_string(static_cast<int>(std::get<1>(way.param)));
                           name += "_learn" + std::to_string(static_cast<int>(std::get<2>(way.param)));
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST_F(PluginRun, TheReferenceAndTheKernelAgree) {
  const Problem p;
  EXPECT_LT(largest_difference(from_kernel(p), p.expected()), 1e-5);
}

TEST_F(PluginRun, IsTheKernelToTheBit) {
  const Problem p(2, 3, 8);
  Runner runner(library, p, "undeclared");
  const std::vector<float> y = runner.call(0, 8);
  EXPECT_EQ(y, from_kernel(p));
  // surprise, update_norm, committed, rejected: two chunks are complete.
  for (std::size_t i = 0; i < runner.stats.size(); i += kStatCount) {
    EXPECT_EQ(runner.stats[i + 2], 2.0F);
    EXPECT_EQ(runner.stats[i + 3], 0.0F);
  }
}

TEST_F(PluginRun, OneStreamsLearnIsReadWhereItLies) {
  const Problem p(1, 2, 12);
  Runner runner(library, p, "undeclared", DataType::kFLOAT, DataType::kINT64);
  EXPECT_LT(largest_difference(runner.run({1}), p.expected()), 1e-5);
  EXPECT_EQ(record.copies, 0U);
}

TEST_F(PluginRun, BindsTheStateAsItsFieldSays) {
  const Problem p;
  std::vector<float> y;
  for (const char* alias : {"declared", "undeclared"}) {
    Runner runner(library, p, alias);
    EXPECT_EQ(runner.built().aliases[1], alias == std::string("declared") ? 0 : -1);
    EXPECT_EQ(runner.built().aliases[0], -1);
    EXPECT_EQ(runner.built().aliases[2], -1);
    const std::vector<float> before = runner.state();
    EXPECT_EQ(runner.try_call(0, 3, true, y), 0);
    EXPECT_EQ(record.operands[kState].data, record.operands[kStateOut].data);
    EXPECT_NE(runner.state(), before);
    // TensorRT may insert a copy, so two buffers must work too.
    const std::vector<float> one = runner.state();
    EXPECT_EQ(runner.try_call(3, 2, false, y), 0);
    EXPECT_EQ(runner.next(), one);
    EXPECT_NE(runner.state(), one);
  }
  Runner runner(library, p, "two-buffers");
  EXPECT_EQ(runner.built().aliases, (std::vector<std::int32_t>{-1, -1, -1}));
  EXPECT_EQ(runner.try_call(0, 3, false, y), 0);
  const std::vector<float> before = runner.state();
  const std::size_t runs = record.runs;
  EXPECT_NE(runner.try_call(3, 3, true, y), 0);
  EXPECT_NE(refusal().find("overlapping buffers: state and state_out with alias \"two-buffers\""), std::string::npos);
  EXPECT_EQ(record.runs, runs);
  EXPECT_EQ(runner.state(), before);
}

TEST_F(PluginRun, ContextsOfOneEngineShareNothing) {
  const Problem p;
  Runner one(library, p, "undeclared"), other(library, p, "undeclared");
  const std::vector<double> expected = p.expected();
  // Interleaved calls.
  std::vector<float> first = one.call(0, 9), second = other.call(0, 9);
  EXPECT_EQ(first, second);
  EXPECT_EQ(one.call(9, 1), other.call(9, 1));
}

TEST_F(PluginRun, MakesTheKernelOnceForAllShapes) {
  const Problem p;
  Runner runner(library, p, "undeclared");
  runner.call(0, 1);
  const std::size_t created = record.created;
  runner.call(1, 9);
  runner.call(10, 1);
  EXPECT_EQ(record.created, created);
}

TEST_F(PluginRun, UsesNoMoreWorkspaceThanItAsksFor) {
  const Problem p;
  Runner runner(library, p, "undeclared", DataType::kFLOAT, DataType::kINT64);
  for (std::int64_t count = 1; count <= kMostTokens; ++count) {
    std::vector<float> y;
    EXPECT_EQ(runner.try_call(0, count, false, y), 0);
    EXPECT_TRUE(runner.workspace().intact()) << count << " tokens";
    EXPECT_GE(record.operands[kLearn].as<char>(), runner.workspace().data());
    EXPECT_LT(record.operands[kLearn].as<char>(), record.workspace);
  }
}

TEST_F(PluginRun, SaysWhatIsWrongWithACall) {
  Problem p;
  Runner runner(library, p, "undeclared");
  std::vector<float> y;
  p.momentum[0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_NE(runner.try_call(0, 3, true, y), 0);
  EXPECT_NE(refusal().find("gate not finite: momentum is nan"), std::string::npos);
  EXPECT_EQ(runner.state(), p.state());
  p.momentum[0] = 0.5F;
  EXPECT_EQ(runner.try_call(0, 3, true, y), 0);
}

TEST_F(PluginRun, WithoutADeviceBuildsButDoesNotRun) {
  record.device = {};
  const Problem p;
  const Built built = build(library, Fields(p.attributes, kInputNames, kOutputNames, "undeclared"), ranges(p), false);
  EXPECT_GT(built.workspace, 0U);
  Context context(library, built.engine);
  std::vector<nvinfer1::PluginTensorDesc> in, out;
  for (const Range& range : ranges(p)) in.push_back(tensor(range.type, range.most));
  out = {in[1], in[0], tensor(DataType::kFLOAT, {p.streams, p.heads, kStatCount})};
  EXPECT_NE(context.run(in, out, {}, {}, nullptr, nullptr), 0);
  EXPECT_NE(refusal().find("[double] no device"), std::string::npos);
}

TEST_F(PluginRun, RefusesADeviceThatNeedsMoreThanTheEngineHas) {
  const Problem p;
  const Built built = build(library, Fields(p.attributes, kInputNames, kOutputNames, "undeclared"), ranges(p), true);
  std::vector<nvinfer1::PluginTensorDesc> in, out;
  for (const Range& range : ranges(p)) in.push_back(tensor(range.type, range.most));
  out = {in[1], in[0], tensor(DataType::kFLOAT, {p.streams, p.heads, kStatCount})};
  const auto shape_change = [&](int multiprocessors) {
    record.device.multiprocessors = multiprocessors;
    Context context(library, built.engine);
    return context.runtime().onShapeChange(in.data(), static_cast<std::int32_t>(in.size()), out.data(),
                                           static_cast<std::int32_t>(out.size()));
  };
  EXPECT_EQ(shape_change(4), 0);
  EXPECT_EQ(shape_change(2), 0);
  EXPECT_NE(shape_change(5), 0);
  const std::string message = refusal();
  EXPECT_NE(message.find("not supported on this device: sm_90 with 5 multiprocessors needs "), std::string::npos);
  EXPECT_NE(message.find(" for sm_90 with 4 multiprocessors. Fix: build the engine on"), std::string::npos);
  // A later context on the right device works.
  EXPECT_EQ(shape_change(4), 0);
}

}  // namespace
