// CausalConvolution on the CPU. A task computes a block of a stream's channels, so it owns their past. A vector of
// channels goes down the tokens with the weights and the last inputs in registers.
//
// Compiled once per instruction set (Highway's foreach_target).

#include "plugins/kernels/cpu_targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "plugins/kernels/causal_convolution_cpu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Headers that include this file again come first.
#include <algorithm>
#include <cstring>

#include "hwy/highway.h"
#include "plugins/kernels/causal_convolution_cpu.h"
#include "plugins/kernels/vector-inl.h"

#ifndef TITANS_CAUSAL_CONVOLUTION_CALL_
#define TITANS_CAUSAL_CONVOLUTION_CALL_

namespace titans::kernels::causal_convolution {

inline constexpr std::size_t kChannels = 64;  // of a task

// The operands and sizes of one call.
struct Call {
  const float *x, *weight, *bias;  // bias may be null
  float *past, *y;
  const std::int64_t *valid, *slots;  // may be null
  std::size_t streams, tokens, channels, rows;
  Activation activation;

  std::size_t blocks() const { return (channels + kChannels - 1) / kChannels; }
};

// Computes channels [block * kChannels, ...) of one stream.
using CpuFunction = void (*)(const Call& call, std::size_t stream, std::size_t block);

}  // namespace titans::kernels::causal_convolution

#endif  // TITANS_CAUSAL_CONVOLUTION_CALL_

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {
namespace convolution {

using causal_convolution::Activation;
using causal_convolution::Call;
using causal_convolution::kChannels;

// One vector of channels. Pointers are at its first channel.
struct Column {
  const float *x, *weight;
  Vector bias;
  float *past, *y;
  std::size_t stride, valid, count;
  Activation activation;

  HWY_INLINE void write(Vector sum, std::size_t t) const {
    store(activation == Activation::kSilu ? silu(sum).value : sum, y + t * stride, count);
  }
};

// With kRows > 0, the convolution has so many rows, and the last inputs stay in registers.
template <std::size_t kRows>
HWY_INLINE void convolve_in_registers(const Column& c) {
  Vector weights[kRows], inputs[kRows];
#pragma GCC unroll 8
  for (std::size_t i = 0; i < kRows; ++i) weights[i] = load(c.weight + i * c.stride, c.count);
#pragma GCC unroll 8
  for (std::size_t i = 0; i + 1 < kRows; ++i) inputs[i] = load(c.past + i * c.stride, c.count);
  for (std::size_t t = 0; t < c.valid; ++t) {
    inputs[kRows - 1] = load(c.x + t * c.stride, c.count);
    Vector sum = c.bias;
#pragma GCC unroll 8
    for (std::size_t i = 0; i < kRows; ++i) sum = hn::MulAdd(weights[i], inputs[i], sum);
    c.write(sum, t);
#pragma GCC unroll 8
    for (std::size_t i = 0; i + 1 < kRows; ++i) inputs[i] = inputs[i + 1];
  }
#pragma GCC unroll 8
  for (std::size_t i = 0; i + 1 < kRows; ++i) store(inputs[i], c.past + i * c.stride, c.count);
}

HWY_INLINE void convolve_in_memory(const Column& c, std::size_t rows) {
  const std::size_t past = rows - 1;
  // Row i of the past and the call's inputs, as one sequence.
  const auto input = [&](std::size_t i) HWY_ATTR {
    return load(i < past ? c.past + i * c.stride : c.x + (i - past) * c.stride, c.count);
  };
  for (std::size_t t = 0; t < c.valid; ++t) {
    Vector sum = c.bias;
    for (std::size_t i = 0; i < rows; ++i) {
      sum = hn::MulAdd(load(c.weight + i * c.stride, c.count), input(t + i), sum);
    }
    c.write(sum, t);
  }
  for (std::size_t i = 0; i < past; ++i) store(input(c.valid + i), c.past + i * c.stride, c.count);
}

void convolve(const Call& call, std::size_t stream, std::size_t block) {
  const std::size_t first = block * kChannels, size = std::min(kChannels, call.channels - first);
  const std::size_t slot = call.slots == nullptr ? stream : static_cast<std::size_t>(call.slots[stream]);
  const std::size_t of_stream = stream * call.tokens * call.channels;
  const std::size_t valid = call.valid == nullptr ? call.tokens : static_cast<std::size_t>(call.valid[stream]);
  each_vector(size, [&](std::size_t i, std::size_t n) HWY_ATTR {
    const std::size_t channel = first + i;
    const Column column{call.x + of_stream + channel,
                        call.weight + channel,
                        call.bias == nullptr ? hn::Zero(Floats()) : load(call.bias + channel, n),
                        call.past + slot * (call.rows - 1) * call.channels + channel,
                        call.y + of_stream + channel,
                        call.channels,
                        valid,
                        n,
                        call.activation};
    switch (call.rows) {
      case 2:
        return convolve_in_registers<2>(column);
      case 3:
        return convolve_in_registers<3>(column);
      case 4:
        return convolve_in_registers<4>(column);
      default:
        return convolve_in_memory(column, call.rows);
    }
  });
  for (std::size_t t = valid; t < call.tokens; ++t) {
    std::fill_n(call.y + of_stream + t * call.channels + first, size, 0.0F);
  }
}

}  // namespace convolution

causal_convolution::CpuFunction causal_convolution_function() { return &convolution::convolve; }

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace titans::kernels::causal_convolution {
namespace {

constexpr TargetFunction<CpuFunction (*)()> kTargets[] = {TITANS_EACH_TARGET(causal_convolution_function)};

class Kernel final : public CpuKernel {
 public:
  Kernel(CpuFunction function, Activation activation) : function_(function), activation_(activation) {}

  std::string run(const Operands& o, const Parallel& parallel) const override {
    std::string error = check_operands(o);
    if (error.empty()) error = check_values(o);
    if (!error.empty()) return error;
    const Tensor &past = o[kPast], &next = o[kPastOut];
    if (past.data != next.data) {
      std::memcpy(next.data, past.data, static_cast<std::size_t>(past.elements()) * sizeof(float));
    }
    const auto size = [](std::int64_t value) { return static_cast<std::size_t>(value); };
    const auto& x = o[kX];
    Work work{function_,
              {x.as<const float>(), o[kWeight].as<const float>(), o[kBias].as<const float>(), next.as<float>(),
               o[kY].as<float>(), o[kValid].as<const std::int64_t>(), o[kSlots].as<const std::int64_t>(),
               size(x.shape[0]), size(x.shape[1]), size(x.shape[2]), size(o[kWeight].shape[0]), activation_}};
    const std::size_t tasks = work.call.streams * work.call.blocks();
    // Below this size, a thread finishes before it could wake another.
    constexpr std::int64_t kSmall = 1 << 14;
    if (x.elements() * o[kWeight].shape[0] < kSmall) {
      for (std::size_t i = 0; i < tasks; ++i) Work::convolve(&work, i);
    } else {
      parallel.run(parallel.pool, tasks, &Work::convolve, &work);
    }
    return {};
  }

 private:
  struct Work {
    CpuFunction function;
    Call call;

    static void convolve(void* context, std::size_t index) {
      const Work& work = *static_cast<const Work*>(context);
      work.function(work.call, index / work.call.blocks(), index % work.call.blocks());
    }
  };

  CpuFunction function_;
  Activation activation_;
};

}  // namespace

std::unique_ptr<CpuKernel> CpuKernel::create(const Configuration& configuration, std::string_view target,
                                             std::string& error) {
  const auto* found = find_target(kTargets, kOperator, target, error);
  return found == nullptr ? nullptr : std::make_unique<Kernel>(found->function(), configuration.activation);
}

}  // namespace titans::kernels::causal_convolution

#endif  // HWY_ONCE
