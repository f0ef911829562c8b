// Runs a problem through the plugin in host memory: builds an engine's plugin and makes calls.
#pragma once

#include <cstdint>
#include <cstring>
#include <regex>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "tensorrt_plugin_floats.h"
#include "tensorrt_plugin_host.h"
#include "tensorrt_plugin_problem.h"

namespace titans::plugin_host {

inline constexpr const char* kInputNames = "state,q,k,v,step_size,momentum,forget_gate,fill,learn";
inline constexpr const char* kOutputNames = "y,state_out,stats";
inline constexpr std::int64_t kMostTokens = 9;

// Whether the messages are one error of the standard form.
inline bool is_one_error(const std::string& messages) {
  static const std::regex form(R"(\[[^\]\n]+\] [^\n]+\. Fix: [^\n]+ \(TITANS-E\d{4}\)\n)");
  return std::regex_match(messages, form);
}

// The ranges of the inputs kInputNames for up to `most` tokens.
inline std::vector<Range> ranges(const Problem& p, nvinfer1::DataType values = nvinfer1::DataType::kFLOAT,
                                 nvinfer1::DataType learn = nvinfer1::DataType::kINT64,
                                 std::int64_t most = kMostTokens) {
  using nvinfer1::DataType;
  const std::int64_t row = kernels::RowLayout(p.configuration).size;
  const auto range = [&](DataType type, std::vector<std::int64_t> shape, int tokens_axis) {
    Range out{type, shape, shape, shape};
    if (tokens_axis >= 0) {
      const auto axis = static_cast<std::size_t>(tokens_axis);
      out.least[axis] = 1;
      out.typical[axis] = out.most[axis] = most;
    }
    return out;
  };
  const Range rows = range(values, {p.streams, p.heads, 1, Problem::kWidth}, 2);
  const Range gates = range(DataType::kFLOAT, {p.streams, p.heads, 1}, 2);
  return {range(DataType::kFLOAT, {p.streams, p.heads, row}, -1),
          rows,
          rows,
          rows,
          gates,
          gates,
          gates,
          range(DataType::kINT64, {p.streams}, -1),
          range(learn, {p.streams}, -1)};
}

// A cache-line aligned buffer with a margin behind it that must stay unchanged.
class Guarded {
 public:
  explicit Guarded(std::size_t bytes) : bytes_(bytes), memory_(bytes + kLine + kMargin, kPattern) {}
  char* data() {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    return memory_.data() + (kLine - address % kLine) % kLine;
  }
  bool intact() {
    return std::all_of(data() + bytes_, data() + bytes_ + kMargin, [](char each) { return each == kPattern; });
  }

 private:
  static constexpr std::size_t kLine = 64, kMargin = 4096;
  static constexpr char kPattern = 0x3C;
  std::size_t bytes_;
  std::vector<char> memory_;
};

class Runner {
 public:
  Runner(const Library& library, const Problem& problem, const std::string& alias,
         nvinfer1::DataType values = nvinfer1::DataType::kFLOAT, nvinfer1::DataType learn = nvinfer1::DataType::kINT64)
      : problem_(problem),
        values_(values),
        learn_(learn),
        built_(build(library, Fields(problem.attributes, kInputNames, kOutputNames, alias),
                     ranges(problem, values, learn), true)),
        context_(library, built_.engine),
        workspace_(built_.workspace),
        one_buffer_(alias != "two-buffers"),
        state_(problem.state()),
        next_(state_.size()) {}

  // Runs tokens [first, first + count). Returns y of each stream and head in turn. Fails the test if the plugin fails.
  std::vector<float> call(std::int64_t first, std::int64_t count) {
    std::vector<float> y;
    EXPECT_EQ(try_call(first, count, one_buffer_, y), 0);
    EXPECT_TRUE(workspace_.intact());
    return y;
  }

  std::int32_t try_call(std::int64_t first, std::int64_t count, bool one_buffer, std::vector<float>& y) {
    const Problem& p = problem_;
    const std::int64_t b = p.streams, h = p.heads;
    const std::vector<std::uint8_t> q = values(p.q, first, count), k = values(p.k, first, count),
                                    v = values(p.v, first, count);
    const std::vector<float> step_size = part(p.step_size, first, count, 1),
                             momentum = part(p.momentum, first, count, 1),
                             forget_gate = part(p.forget_gate, first, count, 1);
    const std::vector<std::int64_t> fill(static_cast<std::size_t>(b), first % Problem::kChunk);
    const std::vector<std::uint8_t> learn = learn_flags();
    std::vector<std::uint8_t> out(q.size());
    stats.assign(static_cast<std::size_t>(b * h * kernels::kStatCount), -1.0F);
    std::vector<nvinfer1::PluginTensorDesc> in_descriptions, out_descriptions;
    for (const Range& range : ranges(p, values_, learn_, count)) {
      in_descriptions.push_back(tensor(range.type, range.most));
    }
    out_descriptions = {in_descriptions[1], in_descriptions[0],
                        tensor(nvinfer1::DataType::kFLOAT, {b, h, kernels::kStatCount})};
    float* state_out = one_buffer ? state_.data() : next_.data();
    const std::int32_t code = context_.run(in_descriptions, out_descriptions,
                                           {state_.data(), q.data(), k.data(), v.data(), step_size.data(),
                                            momentum.data(), forget_gate.data(), fill.data(), learn.data()},
                                           {out.data(), state_out, stats.data()}, workspace_.data(), kStream);
    if (code == 0 && !one_buffer) state_.swap(next_);
    y = floats(out);
    return code;
  }

  // Runs all tokens in calls of these lengths, cyclically. Returns y in the order of Problem::expected.
  std::vector<float> run(const std::vector<std::int64_t>& cuts) {
    const Problem& p = problem_;
    std::vector<float> all(p.q.size());
    std::size_t cut = 0;
    for (std::int64_t first = 0; first < p.tokens;) {
      const std::int64_t count = std::min(cuts[cut++ % cuts.size()], p.tokens - first);
      const std::vector<float> y = call(first, count);
      for (std::int64_t row = 0; row < p.streams * p.heads; ++row) {
        std::copy_n(y.begin() + row * count * Problem::kWidth, count * Problem::kWidth,
                    all.begin() + (row * p.tokens + first) * Problem::kWidth);
      }
      first += count;
    }
    return all;
  }

  const Built& built() const { return built_; }
  std::vector<float>& state() { return state_; }
  const std::vector<float>& next() const { return next_; }
  Guarded& workspace() { return workspace_; }

  static inline auto* const kStream = reinterpret_cast<cudaStream_t>(0x5712EA);  // never dereferenced
  std::vector<float> stats;

 private:
  kernels::DType dtype() const {
    return values_ == nvinfer1::DataType::kHALF ? kernels::DType::kFloat16 : kernels::DType::kBFloat16;
  }

  static std::vector<float> part(const std::vector<float>& all, std::int64_t first, std::int64_t count,
                                 std::int64_t width, const Problem& p) {
    std::vector<float> out;
    for (std::int64_t row = 0; row < p.streams * p.heads; ++row) {
      const auto begin = all.begin() + (row * p.tokens + first) * width;
      out.insert(out.end(), begin, begin + count * width);
    }
    return out;
  }
  std::vector<float> part(const std::vector<float>& all, std::int64_t first, std::int64_t count,
                          std::int64_t width) const {
    return part(all, first, count, width, problem_);
  }

  std::vector<std::uint8_t> values(const std::vector<float>& all, std::int64_t first, std::int64_t count) const {
    const std::vector<float> wide = part(all, first, count, Problem::kWidth);
    if (values_ == nvinfer1::DataType::kFLOAT) {
      const auto* bytes = reinterpret_cast<const std::uint8_t*>(wide.data());
      return {bytes, bytes + wide.size() * sizeof(float)};
    }
    std::vector<std::uint8_t> bytes;
    for (const float each : wide) {
      const std::uint16_t bits = narrow(dtype(), each);
      bytes.push_back(static_cast<std::uint8_t>(bits & 0xFF));
      bytes.push_back(static_cast<std::uint8_t>(bits >> 8));
    }
    return bytes;
  }

  std::vector<float> floats(const std::vector<std::uint8_t>& bytes) const {
    const std::size_t size = values_ == nvinfer1::DataType::kFLOAT ? sizeof(float) : sizeof(std::uint16_t);
    std::vector<float> out(bytes.size() / size);
    for (std::size_t i = 0; i < out.size(); ++i) {
      if (size == sizeof(float)) {
        std::memcpy(&out[i], bytes.data() + i * size, size);
      } else {
        std::uint16_t bits;
        std::memcpy(&bits, bytes.data() + i * size, size);
        out[i] = widen(dtype(), bits);
      }
    }
    return out;
  }

  std::vector<std::uint8_t> learn_flags() const {
    const std::size_t pitch = learn_ == nvinfer1::DataType::kINT64 ? 8 : learn_ == nvinfer1::DataType::kINT32 ? 4 : 1;
    std::vector<std::uint8_t> bytes(problem_.learn.size() * pitch, 0);
    for (std::size_t i = 0; i < problem_.learn.size(); ++i) bytes[i * pitch] = problem_.learn[i];
    return bytes;
  }

  const Problem& problem_;
  nvinfer1::DataType values_, learn_;
  Built built_;
  Context context_;
  Guarded workspace_;
  bool one_buffer_;
  std::vector<float> state_, next_;
};

}  // namespace titans::plugin_host
