// HyperConnection on an NVIDIA GPU. A thread block computes a token. A warp has a residual stream and computes its norm
// and its logits in one pass. Then a thread has an entry of the matrix that Sinkhorn's algorithm normalises. The last
// pass reads the streams again and mixes them.
#include "plugins/kernels/hyper_connection_cuda.h"

#include "plugins/kernels/cuda_device.cuh"
#include "plugins/kernels/cuda_node.cuh"

namespace titans::kernels::hyper_connection {
namespace {

using cuda::kThreads;
using cuda::kWarps;
using cuda::kWarpSize;

inline constexpr int kMostStreams = static_cast<int>(kMaxStreams), kMostColumns = kMostStreams + 2;
static_assert(kMostStreams * kMostStreams <= kThreads, "a thread has an entry of the matrix");

// The operands and sizes of one call. `branch` and `weight`, and `beta`, may be null.
struct Call {
  const float *residuals, *projection, *bias, *branch, *weight;
  float *input, *residuals_out, *beta;
  std::int64_t tokens;  // of all streams of tokens
  int streams, width, columns, iterations;
};

// What a block has in shared memory.
struct Shared {
  float logits[kMostStreams][kMostColumns];
  float mix[kMostStreams][kMostStreams];
};

// Element d of residual stream s of a token, with the previous branch added.
__device__ float residual(const Call& call, std::int64_t token, int s, int d) {
  const float own = call.residuals[(token * call.streams + s) * call.width + d];
  return call.branch == nullptr ? own
                                : own + call.weight[token * call.streams + s] * call.branch[token * call.width + d];
}

// The logits of all residual streams of a token.
__device__ void compute_logits(const Call& call, std::int64_t token, Shared& shared) {
  for (int s = cuda::warp_index(); s < call.streams; s += kWarps) {
    float squares = 0.0F, sums[kMostColumns] = {};
    for (int d = cuda::lane_index(); d < call.width; d += kWarpSize) {
      const float element = residual(call, token, s, d);
      const float* projection = call.projection + static_cast<std::int64_t>(d) * call.columns;
      squares += element * element;
#pragma unroll
      for (int column = 0; column < kMostColumns; ++column) {
        if (column < call.columns) sums[column] += element * projection[column];
      }
    }
    const float norm = cuda::square_root(cuda::sum_over_warp(squares));
    // Like PyTorch's clamp, this keeps a NaN.
    const float by = 1.0F / (norm < 1e-12F ? 1e-12F : norm);
#pragma unroll
    for (int column = 0; column < kMostColumns; ++column) {
      if (column >= call.columns) break;
      const float sum = cuda::sum_over_warp(sums[column]);
      if (cuda::lane_index() == 0) shared.logits[s][column] = sum * by + call.bias[s * call.columns + column];
    }
  }
}

// Replaces the matrix by Sinkhorn's, columns before rows. Threads of no entry only wait.
__device__ void normalise(const Call& call, Shared& shared) {
  const int streams = call.streams, row = cuda::thread_index() / streams, column = cuda::thread_index() % streams;
  const bool inside = row < streams;
  const auto floor = [](float sum) { return sum < 1e-12F ? 1e-12F : sum; };
  float entry = 0.0F;
  if (inside) {
    float most = shared.logits[0][1 + column];
    for (int s = 1; s < streams; ++s) most = cuda::larger_of(most, shared.logits[s][1 + column]);
    entry = cuda::exponential(shared.logits[row][1 + column] - most);
  }
  for (int iteration = 0; iteration < call.iterations; ++iteration) {
    for (int pass = 0; pass < 2; ++pass) {
      if (inside) shared.mix[row][column] = entry;
      cuda::sync_block();
      if (inside) {
        float sum = 0.0F;
        for (int i = 0; i < streams; ++i) sum += pass == 0 ? shared.mix[i][column] : shared.mix[row][i];
        entry /= floor(sum);
      }
      cuda::sync_block();
    }
  }
  if (inside) shared.mix[row][column] = entry;
}

__device__ float sigmoid(float x) { return 1.0F / (1.0F + cuda::exponential(-x)); }

__device__ void mix_streams(const Call& call, std::int64_t token, const Shared& shared) {
  for (int d = cuda::thread_index(); d < call.width; d += kThreads) {
    float elements[kMostStreams], input = 0.0F;
#pragma unroll
    for (int s = 0; s < kMostStreams; ++s) {
      elements[s] = s < call.streams ? residual(call, token, s, d) : 0.0F;
      if (s < call.streams) input += sigmoid(shared.logits[s][0]) * elements[s];
    }
    call.input[token * call.width + d] = input;
    for (int t = 0; t < call.streams; ++t) {
      float sum = 0.0F;
#pragma unroll
      for (int s = 0; s < kMostStreams; ++s) {
        if (s < call.streams) sum += shared.mix[s][t] * elements[s];
      }
      call.residuals_out[(token * call.streams + t) * call.width + d] = sum;
    }
  }
  const int s = cuda::thread_index();
  if (call.beta != nullptr && s < call.streams) {
    call.beta[token * call.streams + s] = 2.0F * sigmoid(shared.logits[s][call.streams + 1]);
  }
}

__global__ void __launch_bounds__(kThreads, 2) connect(const __grid_constant__ Call call) {
  auto& shared = *reinterpret_cast<Shared*>(cuda::shared_memory());
  for (std::int64_t token = cuda::block_index(); token < call.tokens; token += cuda::block_count()) {
    compute_logits(call, token, shared);
    cuda::sync_block();
    normalise(call, shared);
    cuda::sync_block();
    mix_streams(call, token, shared);
    cuda::sync_block();  // shared memory is reused by the next token
  }
}

class Kernel final : public CudaKernel {
 public:
  Kernel(const Configuration& configuration, const CudaDevice& device)
      : configuration_(configuration), device_(device) {}

  std::string run(const Operands& o, std::int32_t* /*status*/, CUstream_st* stream) const override {
    const Tensor& residuals = o[kResiduals];
    std::string error = check_operands(o);
    if (!error.empty()) return error;
    error = cuda::too_large(kOperator, "elements of a token", cuda::kLargestCall,
                            residuals.shape[2] * residuals.shape[3], "run on the CPU");
    if (!error.empty()) return error;
    const auto whole = [](std::int64_t value) { return static_cast<int>(value); };
    Call call{};
    call.residuals = residuals.as<float>();
    call.projection = o[kProjection].as<float>();
    call.bias = o[kBias].as<float>();
    call.branch = o[kBranch].as<float>();
    call.weight = o[kWeight].as<float>();
    call.input = o[kInput].as<float>();
    call.residuals_out = o[kResidualsOut].as<float>();
    call.beta = o[kBeta].as<float>();
    call.tokens = residuals.shape[0] * residuals.shape[1];
    call.streams = whole(residuals.shape[2]);
    call.width = whole(residuals.shape[3]);
    call.columns = whole(o[kProjection].shape[1]);
    call.iterations = whole(configuration_.iterations);
    if (call.tokens == 0) return {};
    const cuda::Launch launch{cuda::blocks_for(call.tokens), 1, sizeof(Shared), device_.shared_bytes, false};
    return cuda::launch(&connect, launch, call, stream);
  }

 private:
  Configuration configuration_;
  CudaDevice device_;
};

}  // namespace

std::unique_ptr<CudaKernel> make_cuda_kernel(const Configuration& configuration, const CudaDevice& device,
                                             std::string& error) {
  error = cuda::unsupported(kOperator, device);
  return error.empty() ? std::make_unique<Kernel>(configuration, device) : nullptr;
}

}  // namespace titans::kernels::hyper_connection
