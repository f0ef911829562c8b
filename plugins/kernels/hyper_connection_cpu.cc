// HyperConnection on the CPU. A token's residual streams are read twice: first for their norms and the matmul with the
// projection, then for the mixture. The projection has few columns, which lie side by side in a vector. In between, a
// block of tokens computes exponentials and Sinkhorn's iterations, with a token in each lane.
//
// Compiled once per instruction set (Highway's foreach_target).

#include "plugins/kernels/cpu_targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "plugins/kernels/hyper_connection_cpu.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Headers that include this file again come first.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "hwy/highway.h"
#include "plugins/kernels/hyper_connection_cpu.h"
#include "plugins/kernels/vector-inl.h"

#ifndef TITANS_HYPER_CONNECTION_CALL_
#define TITANS_HYPER_CONNECTION_CALL_

namespace titans::kernels::hyper_connection {

// The operands of one call, row-major.
struct Call {
  const float *residuals, *projection, *bias;
  const float *branch, *weight;  // null if absent
  float *input, *residuals_out;
  float* beta;  // null if not requested
  std::size_t tokens, streams, width, columns;
  std::int64_t iterations;
};

// The functions of one instruction set. They process tokens [block * tokens_in_block, ...).
struct CpuFunctions {
  void (*mix)(const Call& call, std::size_t block);
  std::size_t tokens_in_block;
};

}  // namespace titans::kernels::hyper_connection

#endif  // TITANS_HYPER_CONNECTION_CALL_

HWY_BEFORE_NAMESPACE();
namespace titans::kernels::HWY_NAMESPACE {

using hyper_connection::Call;
using hyper_connection::CpuFunctions;
using hyper_connection::kMaxStreams;

inline constexpr float kEps = 1e-12F;
inline constexpr std::size_t kMost = kMaxStreams;  // streams
// Floats per stream that are processed together; a multiple of every vector's size.
inline constexpr std::size_t kStrip = 256;

// The lanes of the projection's columns, and the tokens of a block.
using Columns = hn::CappedTag<float, 8>;
inline constexpr std::size_t kColumnLanes = HWY_MAX_LANES_D(Columns);
inline constexpr std::size_t kMostColumns = (kMost + 2 + kColumnLanes - 1) / kColumnLanes * kColumnLanes;
using Tokens = hn::CappedTag<float, 8>;
using TokenVector = hn::Vec<Tokens>;
inline constexpr std::size_t kBlock = HWY_MAX_LANES_D(Tokens);

HWY_INLINE TokenVector sigmoid_of_tokens(TokenVector x) {
  const Tokens d;
  const auto one = hn::Set(d, 1.0F);
  return hn::Div(one, hn::Add(one, hn::Exp(d, hn::Min(hn::Neg(x), hn::Set(d, 88.0F)))));
}

// Floats [i, i + n) of a stream, plus the branch's output.
template <bool kHasBranch>
HWY_INLINE Vector load_stream(const float* stream, const float* branch, Vector weight, std::size_t i, std::size_t n) {
  const Vector x = load(stream + i, n);
  return kHasBranch ? hn::MulAdd(weight, load(branch + i, n), x) : x;
}

// products[s * kMostColumns + c] += sum over d of strips[s * kStrip + d] * projection[d * columns + c], for kStreams
// streams and the columns of one vector. The first `whole` rows may be read past their end.
template <std::size_t kStreams>
void add_products(const float* strips, const float* projection, std::size_t size, std::size_t whole,
                  std::size_t columns, std::size_t count, float* products) {
  const Columns d;
  hn::Vec<Columns> even[kStreams], odd[kStreams];
  for (std::size_t s = 0; s < kStreams; ++s) even[s] = odd[s] = hn::Zero(d);
  std::size_t i = 0;
  for (; i + 2 <= whole; i += 2) {
    const auto first = hn::LoadU(d, projection + i * columns);
    const auto second = hn::LoadU(d, projection + (i + 1) * columns);
    for (std::size_t s = 0; s < kStreams; ++s) {
      even[s] = hn::MulAdd(hn::Set(d, strips[s * kStrip + i]), first, even[s]);
      odd[s] = hn::MulAdd(hn::Set(d, strips[s * kStrip + i + 1]), second, odd[s]);
    }
  }
  for (; i < size; ++i) {
    const auto row = hn::LoadN(d, projection + i * columns, count);
    for (std::size_t s = 0; s < kStreams; ++s) {
      even[s] = hn::MulAdd(hn::Set(d, strips[s * kStrip + i]), row, even[s]);
    }
  }
  for (std::size_t s = 0; s < kStreams; ++s) {
    float* to = products + s * kMostColumns;
    hn::StoreU(hn::Add(hn::LoadU(d, to), hn::Add(even[s], odd[s])), d, to);
  }
}

// Writes the logits of a token to logits[(s * columns + c) * kBlock].
template <bool kHasBranch, class Streams>
void project_token(const Call& call, Streams streams, std::size_t token, float* logits) {
  HWY_ALIGN float strips[kMost * kStrip];
  HWY_ALIGN float products[kMost * kMostColumns];
  float squares[kMost];
  const std::size_t columns = call.columns;
  const float* residuals = call.residuals + token * streams * call.width;
  const float* branch = kHasBranch ? call.branch + token * call.width : nullptr;
  std::fill(products, products + streams * kMostColumns, 0.0F);
  std::fill(squares, squares + streams, 0.0F);
  for (std::size_t start = 0; start < call.width; start += kStrip) {
    const std::size_t size = std::min(kStrip, call.width - start);
    for (std::size_t s = 0; s < streams; ++s) {
      const Vector weight = hn::Set(Floats(), kHasBranch ? call.weight[token * streams + s] : 0.0F);
      const float* stream = residuals + s * call.width;
      squares[s] += sum_vectors(size, [&](std::size_t i, std::size_t n) HWY_ATTR {
        const Vector x = load_stream<kHasBranch>(stream, branch, weight, start + i, n);
        hn::StoreU(x, Floats(), strips + s * kStrip + i);
        return hn::Mul(x, x);
      });
    }
    for (std::size_t c = 0; c < columns; c += kColumnLanes) {
      const std::size_t count = std::min(columns - c, kColumnLanes);
      const float* projection = call.projection + start * columns + c;
      // A vector may be loaded from row i if it ends within the projection.
      const std::size_t left = (call.width - start) * columns - c;
      const std::size_t whole = left < kColumnLanes ? 0 : std::min(size, (left - kColumnLanes) / columns + 1);
      std::size_t s = 0;
      for (; s + 4 <= streams; s += 4) {
        add_products<4>(strips + s * kStrip, projection, size, whole, columns, count, products + s * kMostColumns + c);
      }
      for (; s < streams; ++s) {
        add_products<1>(strips + s * kStrip, projection, size, whole, columns, count, products + s * kMostColumns + c);
      }
    }
  }
  for (std::size_t s = 0; s < streams; ++s) {
    const float norm = std::max(std::sqrt(squares[s]), kEps);
    for (std::size_t c = 0; c < columns; ++c) {
      logits[(s * columns + c) * kBlock] = products[s * kMostColumns + c] / norm + call.bias[s * columns + c];
    }
  }
}

// exp(mix), then `iterations` times: divides the columns by their sums, then the rows. Layout: mix[s * streams + t].
template <class Streams>
HWY_INLINE void sinkhorn(Streams streams, std::int64_t iterations, TokenVector* mix) {
  const Tokens d;
  const auto one = hn::Set(d, 1.0F);
  for (std::size_t t = 0; t < streams; ++t) {
    auto most = mix[t];
    for (std::size_t s = 1; s < streams; ++s) most = hn::Max(most, mix[s * streams + t]);
    for (std::size_t s = 0; s < streams; ++s) {
      mix[s * streams + t] = hn::Exp(d, hn::Sub(mix[s * streams + t], most));
    }
  }
  for (std::int64_t i = 0; i < iterations; ++i) {
    for (std::size_t t = 0; t < streams; ++t) {
      auto sum = mix[t];
      for (std::size_t s = 1; s < streams; ++s) sum = hn::Add(sum, mix[s * streams + t]);
      // The sum never falls below the floor, because a column has an entry of at least 1 / S^2.
      const auto factor = hn::Div(one, sum);
      for (std::size_t s = 0; s < streams; ++s) mix[s * streams + t] = hn::Mul(mix[s * streams + t], factor);
    }
    for (std::size_t s = 0; s < streams; ++s) {
      auto sum = mix[s * streams];
      for (std::size_t t = 1; t < streams; ++t) sum = hn::Add(sum, mix[s * streams + t]);
      const auto factor = hn::Div(one, hn::Max(hn::Set(d, kEps), sum));
      for (std::size_t t = 0; t < streams; ++t) mix[s * streams + t] = hn::Mul(mix[s * streams + t], factor);
    }
  }
}

// Writes a token's outputs. Output 0 is the branch's input, output 1 + t is stream t. Layout: weights[output * streams
// + s].
template <bool kHasBranch, class Streams>
void mix_token(const Call& call, Streams streams, std::size_t token, const float* weights) {
  const float* residuals = call.residuals + token * streams * call.width;
  const float* branch = kHasBranch ? call.branch + token * call.width : nullptr;
  float* input = call.input + token * call.width;
  float* out = call.residuals_out + token * streams * call.width;
  Vector of_branch[kMost];
  if constexpr (kHasBranch) {
    for (std::size_t s = 0; s < streams; ++s) of_branch[s] = hn::Set(Floats(), call.weight[token * streams + s]);
  }
  each_vector(call.width, [&](std::size_t i, std::size_t n) HWY_ATTR {
    Vector x[kMost];
    for (std::size_t s = 0; s < streams; ++s) {
      const Vector weight = kHasBranch ? of_branch[s] : hn::Zero(Floats());
      x[s] = load_stream<kHasBranch>(residuals + s * call.width, branch, weight, i, n);
    }
    for (std::size_t t = 0; t <= streams; ++t) {
      Vector sum = hn::Mul(hn::Set(Floats(), weights[t * streams]), x[0]);
      for (std::size_t s = 1; s < streams; ++s) {
        sum = hn::MulAdd(hn::Set(Floats(), weights[t * streams + s]), x[s], sum);
      }
      store(sum, t == 0 ? input + i : out + (t - 1) * call.width + i, n);
    }
  });
}

// `streams` is a number, or an integral_constant for which the code is specialized.
template <bool kHasBranch, class Streams>
void mix_block(const Call& call, Streams streams, std::size_t block) {
  const Tokens d;
  const std::size_t first = block * kBlock, tokens = std::min(kBlock, call.tokens - first), columns = call.columns;
  HWY_ALIGN float logits[kMost * (kMost + 2) * kBlock];
  if (tokens < kBlock) std::fill(logits, logits + streams * columns * kBlock, 0.0F);
  for (std::size_t i = 0; i < tokens; ++i) project_token<kHasBranch>(call, streams, first + i, logits + i);

  TokenVector mix[kMost * kMost];
  for (std::size_t s = 0; s < streams; ++s) {
    float* of_stream = logits + s * columns * kBlock;
    hn::Store(sigmoid_of_tokens(hn::Load(d, of_stream)), d, of_stream);
    for (std::size_t t = 0; t < streams; ++t) mix[s * streams + t] = hn::Load(d, of_stream + (1 + t) * kBlock);
    if (call.beta == nullptr) continue;
    const auto beta = sigmoid_of_tokens(hn::Load(d, of_stream + (1 + streams) * kBlock));
    hn::Store(hn::Add(beta, beta), d, of_stream + (1 + streams) * kBlock);
  }
  sinkhorn(streams, call.iterations, mix);
  for (std::size_t s = 0; s < streams; ++s) {
    for (std::size_t t = 0; t < streams; ++t) {
      hn::Store(mix[s * streams + t], d, logits + (s * columns + 1 + t) * kBlock);
    }
  }

  float weights[(kMost + 1) * kMost];
  for (std::size_t i = 0; i < tokens; ++i) {
    for (std::size_t s = 0; s < streams; ++s) {
      const float* of_stream = logits + s * columns * kBlock + i;
      for (std::size_t t = 0; t <= streams; ++t) weights[t * streams + s] = of_stream[t * kBlock];
      if (call.beta != nullptr) call.beta[(first + i) * streams + s] = of_stream[(streams + 1) * kBlock];
    }
    mix_token<kHasBranch>(call, streams, first + i, weights);
  }
}

template <bool kHasBranch>
void choose_streams(const Call& call, std::size_t block) {
  // The default of titans-pytorch's models.
  if (call.streams == 4) return mix_block<kHasBranch>(call, std::integral_constant<std::size_t, 4>(), block);
  mix_block<kHasBranch>(call, call.streams, block);
}

void mix(const Call& call, std::size_t block) {
  if (call.branch == nullptr) {
    choose_streams<false>(call, block);
  } else {
    choose_streams<true>(call, block);
  }
}

CpuFunctions hyper_connection_functions() { return {&mix, kBlock}; }

}  // namespace titans::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace titans::kernels::hyper_connection {
namespace {

constexpr TargetFunction<CpuFunctions (*)()> kTargets[] = {TITANS_EACH_TARGET(hyper_connection_functions)};

class Kernel final : public CpuKernel {
 public:
  Kernel(const Configuration& configuration, const CpuFunctions& functions)
      : configuration_(configuration), functions_(functions) {}

  std::string run(const Operands& o, const Parallel& parallel) const override {
    std::string error = check_operands(o);
    if (!error.empty()) return error;
    const auto& shape = o[kResiduals].shape;
    const auto floats = [&](Operand which) { return o[which].as<float>(); };
    Work work{functions_,
              {floats(kResiduals), floats(kProjection), floats(kBias), floats(kBranch), floats(kWeight), floats(kInput),
               floats(kResidualsOut), floats(kBeta), static_cast<std::size_t>(shape[0] * shape[1]),
               static_cast<std::size_t>(shape[2]), static_cast<std::size_t>(shape[3]),
               static_cast<std::size_t>(o[kProjection].shape[1]), configuration_.iterations}};
    const std::size_t blocks = (work.call.tokens + functions_.tokens_in_block - 1) / functions_.tokens_in_block;
    if (blocks == 1) {
      Work::mix_block(&work, 0);  // one token takes less time than waking other threads
    } else {
      parallel.run(parallel.pool, blocks, &Work::mix_block, &work);
    }
    return {};
  }

 private:
  struct Work {
    CpuFunctions functions;
    Call call;

    static void mix_block(void* context, std::size_t block) {
      const Work& work = *static_cast<const Work*>(context);
      work.functions.mix(work.call, block);
    }
  };

  Configuration configuration_;
  CpuFunctions functions_;
};

}  // namespace

std::unique_ptr<CpuKernel> CpuKernel::create(const Configuration& configuration, std::string_view target,
                                             std::string& error) {
  const auto* found = find_target(kTargets, kOperator, target, error);
  return found == nullptr ? nullptr : std::make_unique<Kernel>(configuration, found->function());
}

}  // namespace titans::kernels::hyper_connection

#endif  // HWY_ONCE
