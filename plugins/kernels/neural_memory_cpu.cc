// The operator on the CPU. The idea: a head's W and S (tens to hundreds of KiB) stay in a core's cache from the first
// token of a call to the last, and everything between two chunk_updates only reads them. A whole chunk is a few small
// products a layer whose masks, gates and activations are applied while the result is in registers (head-inl.h). One
// token is one pass over S and, layer by layer, one (the first) or three over W, of which all but one find it in the
// cache. Per head and token, chunk 64, that is 57 kFLOP for a linear memory of 64 and 442 kFLOP for an MLP 64-256-64,
// or 49 and 345 KiB moved where tokens come one by one.
//
// This file is compiled once for each instruction set (Highway's foreach_target), and chooses among them.

#define HWY_DISABLED_TARGETS (~(HWY_AVX3 | HWY_AVX2 | HWY_NEON_WITHOUT_AES | HWY_EMU128 | HWY_SCALAR))
#define HWY_COMPILE_ALL_ATTAINABLE
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "plugins/kernels/neural_memory_cpu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// What includes this file again comes first.
#include "hwy/highway.h"
#include "plugins/kernels/chunk-inl.h"
#include "plugins/kernels/head-inl.h"

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

CpuFunctions functions(const Configuration& configuration) {
  if (configuration.gates == Gates::kChunk) return {&update_chunk_head, &read_chunk_head};
  return {&update_head, &read_head};
}

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#if HWY_ARCH_X86
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "plugins/kernels/neural_memory_cpu.h"
#include "plugins/kernels/subnormals.h"

namespace titans::kernels {
namespace {

struct Target {
  std::string_view name;
  bool (*supported)();
  CpuFunctions (*functions)(const Configuration& configuration);
};

#if HWY_ARCH_X86
// Not every compiler's __builtin_cpu_supports knows it.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

// The best first. The names of what they need are those of Highway's targets.
constexpr Target kTargets[] = {
#if HWY_TARGETS & HWY_AVX3
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
     },
     &N_AVX3::functions},
#endif
#if HWY_TARGETS & HWY_AVX2
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
              __builtin_cpu_supports("bmi2") && has_f16c();
     },
     &N_AVX2::functions},
#endif
#if HWY_TARGETS & HWY_NEON_WITHOUT_AES
    {"neon", [] { return true; }, &N_NEON_WITHOUT_AES::functions},
#endif
#if HWY_TARGETS & HWY_EMU128
    {"plain", [] { return true; }, &N_EMU128::functions},
#endif
#if HWY_TARGETS & HWY_SCALAR
    {"plain", [] { return true; }, &N_SCALAR::functions},
#endif
};

// Scratch memory for as many heads as ever ran at once.
class ScratchPool {
 public:
  explicit ScratchPool(const Configuration& configuration) : configuration_(configuration) {}

  class Lease {
   public:
    explicit Lease(ScratchPool& pool) : pool_(pool) {
      {
        const std::lock_guard lock(pool.mutex_);
        if (!pool.idle_.empty()) {
          scratch_ = std::move(pool.idle_.back());
          pool.idle_.pop_back();
          return;
        }
      }
      scratch_ = std::make_unique<Scratch>(pool.configuration_);
      // So that giving it back needs no memory.
      const std::lock_guard lock(pool.mutex_);
      pool.idle_.reserve(++pool.made_);
    }
    ~Lease() {
      const std::lock_guard lock(pool_.mutex_);
      pool_.idle_.push_back(std::move(scratch_));
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    Scratch& get() const { return *scratch_; }

   private:
    ScratchPool& pool_;
    std::unique_ptr<Scratch> scratch_;
  };

 private:
  Configuration configuration_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> idle_;
  std::size_t made_ = 0;
};

class Kernel final : public CpuKernel {
 public:
  Kernel(const Configuration& configuration, const Target& target)
      : plan_(configuration),
        target_(target.name),
        functions_(target.functions(configuration)),
        scratch_(configuration) {}

  std::string_view target() const override { return target_; }

  std::string run(const Operands& operands, const Parallel& parallel) const override {
    std::string wrong = check_operands(plan_.configuration, operands);
    if (wrong.empty()) wrong = check_values(plan_.configuration, operands);
    if (!wrong.empty()) return wrong;
    const Tensor& state = operands[kState];
    const Tensor& next = operands[kStateOut];
    if (next.present() && next.data != state.data) {
      std::memcpy(next.data, state.data, static_cast<std::size_t>(state.elements()) * sizeof(float));
    }
    const auto heads = static_cast<std::size_t>(operands[kQ].shape[0] * operands[kQ].shape[1]);
    Call call{*this, operands, false};
    parallel.run(parallel.pool, heads, &Call::run_head, &call);
    return call.out_of_memory ? "[NeuralMemory] expected memory for scratch but got none; do free some" : std::string();
  }

 private:
  struct Call {
    const Kernel& kernel;
    const Operands& operands;
    std::atomic<bool> out_of_memory;

    // Runs on a thread that knows no exceptions.
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

  // Head `index` % H of stream `index` / H.
  void run_head(const Operands& o, std::int64_t index) const {
    const std::int64_t heads = o[kQ].shape[1], all = o[kQ].shape[2], width = o[kQ].shape[3];
    const std::int64_t stream = index / heads, h = index % heads;
    const Configuration& c = plan_.configuration;
    // A head's part of an operand, `size` numbers; null where that is absent.
    const auto part = [&](Operand which, std::int64_t size) {
      return o[which].present() ? o[which].as<float>() + index * size : nullptr;
    };
    const auto of_stream = [&](Operand which, std::int64_t otherwise) {
      return o[which].present() ? o[which].as<std::int64_t>()[stream] : otherwise;
    };
    const bool update = c.mode == Mode::kUpdate;
    const std::int64_t keys = all * c.keys_per_token, weights = c.chunks(all) * c.all_elements();
    Head head{};
    head.row = o[update ? kStateOut : kState].as<float>() + (of_stream(kSlots, stream) * heads + h) * plan_.layout.size;
    head.index = static_cast<std::uint32_t>(h);
    head.q = part(kQ, all * width);
    head.y = part(kY, all * width);
    head.tokens = all;
    if (o[kNormScale].present()) head.norm_scale = o[kNormScale].as<float>() + h * width;
    if (update) {
      head.k = part(kK, keys * width);
      head.v = part(kV, keys * width);
      head.step_size = part(kStepSize, keys);
      head.momentum = part(kMomentum, all);
      head.forget_gate = part(kForgetGate, all);
      head.modulation = part(kModulation, all * c.tensors());
      head.previous = part(kPrevious, weights);
      head.previous_gate = part(kPreviousGate, all);
      head.before = part(kInitialWeights, weights);
      head.stats = part(kStats, kStatCount);
      head.tokens = of_stream(kValid, all);
      head.fill = of_stream(kFill, 0);
      head.learn = !o[kLearn].present() || o[kLearn].as<bool>()[stream];
      if (o[kUpdateLimit].present()) head.update_limit = o[kUpdateLimit].as<float>() + stream;
    }
    // Padding has no answer, but no garbage either.
    std::fill(head.y + head.tokens * width, head.y + all * width, 0.0F);
    const ScratchPool::Lease scratch(scratch_);
    (update ? functions_.update : functions_.read)(plan_, head, scratch.get());
  }

  Plan plan_;
  std::string_view target_;
  CpuFunctions functions_;
  mutable ScratchPool scratch_;
};

}  // namespace

const std::vector<std::string_view>& cpu_targets() {
  static const std::vector<std::string_view> names = [] {
    std::vector<std::string_view> found;
    for (const Target& target : kTargets) {
      if (target.supported()) found.push_back(target.name);
    }
    return found;
  }();
  return names;
}

std::string_view chosen_cpu_target() {
  const char* named = std::getenv("TITANS_CPU_TARGET");
  if (named == nullptr || *named == '\0') return cpu_targets().front();
  const auto found = std::find(cpu_targets().begin(), cpu_targets().end(), named);
  return found == cpu_targets().end() ? std::string_view() : *found;
}

std::unique_ptr<CpuKernel> CpuKernel::create(const Configuration& configuration, std::string_view target,
                                             std::string& error) {
  const std::string_view chosen = target.empty() ? chosen_cpu_target() : target;
  for (const Target& each : kTargets) {
    if (each.name == chosen && each.supported()) return std::make_unique<Kernel>(configuration, each);
  }
  error = "[NeuralMemory] expected an instruction set of this processor out of:";
  for (const std::string_view name : cpu_targets()) error += " " + std::string(name);
  const char* named = std::getenv("TITANS_CPU_TARGET");
  error += " but got " + std::string(target.empty() && named != nullptr ? named : target) +
           "; do set TITANS_CPU_TARGET to one of these, or not at all";
  return nullptr;
}

}  // namespace titans::kernels

#endif  // HWY_ONCE
