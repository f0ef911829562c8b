// A CPU kernel that runs one task per head and stream. Both memory operators use it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <string>

#include "plugins/kernels/cpu_head.h"
#include "plugins/kernels/cpu_kernel.h"
#include "plugins/kernels/scratch_pool.h"
#include "plugins/kernels/subnormals.h"

namespace titans::kernels {

// The operands of head `index` % H of stream `index` / H.
class HeadOperands {
 public:
  HeadOperands(const Operands& operands, std::int64_t index)
      : operands_(operands), index_(index), heads_(operands[kQ].shape[1]), stream_(index / heads_) {}

  // The head's part of an operand with `size` elements per head, or null if the operand is absent.
  float* part(Operand which, std::int64_t size) const {
    return operands_[which].present() ? operands_[which].as<float>() + index_ * size : nullptr;
  }

  // Sets the members that both operators have. `row`: the length of a packed row in words.
  void fill(Head& head, std::int64_t row, std::int64_t keys_per_token, bool update) const {
    const std::int64_t all = operands_[kQ].shape[2], width = operands_[kQ].shape[3], h = index_ % heads_;
    const std::int64_t keys = all * keys_per_token;
    head.row = operands_[update ? kStateOut : kState].as<float>() + (of_stream(kSlots, stream_) * heads_ + h) * row;
    head.index = static_cast<std::uint32_t>(h);
    head.q = part(kQ, all * width);
    head.y = part(kY, all * width);
    head.tokens = all;
    if (operands_[kNormScale].present()) head.norm_scale = operands_[kNormScale].as<float>() + h * width;
    if (!update) return;
    head.k = part(kK, keys * width);
    head.v = part(kV, keys * width);
    head.step_size = part(kStepSize, keys);
    head.momentum = part(kMomentum, all);
    head.forget_gate = part(kForgetGate, all);
    head.stats = part(kStats, kStatCount);
    head.tokens = of_stream(kValid, all);
    head.fill = of_stream(kFill, 0);
    head.learn = !operands_[kLearn].present() || operands_[kLearn].as<bool>()[stream_];
    if (operands_[kUpdateLimit].present()) head.update_limit = operands_[kUpdateLimit].as<float>() + stream_;
  }

 private:
  std::int64_t of_stream(Operand which, std::int64_t otherwise) const {
    return operands_[which].present() ? operands_[which].as<std::int64_t>()[stream_] : otherwise;
  }

  const Operands& operands_;
  std::int64_t index_, heads_, stream_;
};

// `Regime` provides the types Configuration, Plan, Head and Scratch, and fill(head, plan, head_operands, operands).
template <class Regime>
class HeadKernel final : public CpuKernel {
 public:
  using Function = void (*)(const typename Regime::Plan&, const typename Regime::Head&, typename Regime::Scratch&);

  HeadKernel(const typename Regime::Configuration& configuration, std::string_view target, Function function)
      : plan_(configuration), target_(target), function_(function), scratch_(configuration) {}

  std::string_view target() const override { return target_; }

  std::string run(const Operands& operands, const Parallel& parallel) const override {
    std::string error = check_operands(plan_.configuration, operands);
    if (error.empty()) error = check_values(plan_.configuration, operands);
    if (!error.empty()) return error;
    const Tensor& state = operands[kState];
    const Tensor& next = operands[kStateOut];
    if (next.present() && next.data != state.data) {
      std::memcpy(next.data, state.data, static_cast<std::size_t>(state.elements()) * sizeof(float));
    }
    const auto heads = static_cast<std::size_t>(operands[kQ].shape[0] * operands[kQ].shape[1]);
    Call call{*this, operands, false};
    parallel.run(parallel.pool, heads, &Call::run_head, &call);
    if (!call.out_of_memory) return {};
    return failure(Regime::Configuration::kOperator, "E1002", "out of memory: no scratch memory",
                   "free memory or open fewer streams");
  }

 private:
  struct Call {
    const HeadKernel& kernel;
    const Operands& operands;
    std::atomic<bool> out_of_memory;

    // Runs on a thread of the caller, which does not catch exceptions.
    static void run_head(void* context, std::size_t index) {
      Call& call = *static_cast<Call*>(context);
      const FlushSubnormals flush;
      try {
        call.kernel.run_head(call.operands, static_cast<std::int64_t>(index));
      } catch (...) {
        call.out_of_memory = true;
      }
    }
  };

  void run_head(const Operands& operands, std::int64_t index) const {
    typename Regime::Head head{};
    Regime::fill(head, plan_, HeadOperands(operands, index), operands);
    // Padding tokens get the answer 0.
    const std::int64_t all = operands[kQ].shape[2], width = operands[kQ].shape[3];
    std::fill(head.y + head.tokens * width, head.y + all * width, 0.0F);
    const typename Pool::Lease scratch(scratch_);
    function_(plan_, head, scratch.get());
  }

  using Pool = ScratchPool<typename Regime::Scratch, typename Regime::Configuration>;

  typename Regime::Plan plan_;
  std::string_view target_;
  Function function_;
  mutable Pool scratch_;
};

}  // namespace titans::kernels
