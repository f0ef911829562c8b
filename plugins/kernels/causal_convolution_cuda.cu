// CausalConvolution on an NVIDIA GPU. A thread block computes a warp's width of channels of one stream, so it owns
// their past. Its warps share the tokens. The past is written when all warps have read it.
#include "plugins/kernels/causal_convolution_cuda.h"

#include "plugins/kernels/cuda_device.cuh"
#include "plugins/kernels/cuda_node.cuh"

namespace titans::kernels::causal_convolution {
namespace {

using cuda::kThreads;
using cuda::kWarps;
using cuda::kWarpSize;

// The operands and sizes of one call. `bias` and the indices may be null.
struct Call {
  const float *x, *weight, *bias;
  float *past, *y;
  cuda::StreamIndices indices;
  std::int32_t* status;
  int channels, rows, blocks;  // blocks: of channels, per stream
  bool silu;                   // of y
};

// One channel of a stream: the past, followed by the call's inputs.
struct Channel {
  const float *past, *x;
  int rows, stride;
  __device__ float input(int i) const {
    const int before = rows - 1;
    return i < before ? past[static_cast<std::int64_t>(i) * stride] : x[static_cast<std::int64_t>(i - before) * stride];
  }
};

__device__ void convolve_block(const Call& call, int stream, int block) {
  const int channel = block * kWarpSize + cuda::lane_index(), tokens = call.indices.tokens;
  const bool inside = channel < call.channels;
  const std::int64_t of_stream = static_cast<std::int64_t>(stream) * tokens * call.channels + channel;
  float* y = call.y + of_stream;
  const int wrong = cuda::wrong_index(call.indices, stream);
  if (wrong != 0) {
    for (int t = cuda::warp_index(); t < tokens && inside; t += kWarps) {
      y[static_cast<std::int64_t>(t) * call.channels] = cuda::not_a_number();
    }
    if (cuda::thread_index() == 0) cuda::report(call.status, wrong);
    return;
  }
  const int valid = call.indices.valid_tokens(stream), before = call.rows - 1;
  float* past = call.past + call.indices.slot(stream) * before * call.channels + channel;
  const Channel inputs{past, call.x + of_stream, call.rows, call.channels};
  if (inside) {
    const float bias = call.bias == nullptr ? 0.0F : call.bias[channel];
    const float* weight = call.weight + channel;
    for (int t = cuda::warp_index(); t < tokens; t += kWarps) {
      float sum = bias;
      if (t < valid) {
#pragma unroll 4
        for (int i = 0; i < call.rows; ++i) {
          sum += weight[static_cast<std::int64_t>(i) * call.channels] * inputs.input(t + i);
        }
      }
      if (call.silu) sum /= 1.0F + expf(-sum);
      y[static_cast<std::int64_t>(t) * call.channels] = t < valid ? sum : 0.0F;
    }
  }
  cuda::sync_block();
  // One warp moves the past, oldest first: input i + valid is not yet overwritten when row i is written.
  if (inside && cuda::warp_index() == 0 && valid > 0) {
    for (int i = 0; i < before; ++i) past[static_cast<std::int64_t>(i) * call.channels] = inputs.input(valid + i);
  }
}

__global__ void __launch_bounds__(kThreads) convolve(const __grid_constant__ Call call) {
  const std::int64_t work = static_cast<std::int64_t>(call.indices.streams) * call.blocks;
  for (std::int64_t each = cuda::block_index(); each < work; each += cuda::block_count()) {
    convolve_block(call, static_cast<int>(each / call.blocks), static_cast<int>(each % call.blocks));
  }
}

class Kernel final : public CudaKernel {
 public:
  Kernel(const CudaDevice& device, Activation activation) : device_(device), activation_(activation) {}

  std::string run(const Operands& o, std::int32_t* status, CUstream_st* stream) const override {
    const Tensor &past = o[kPast], &next = o[kPastOut], &x = o[kX];
    std::string error = check_operands(o);
    if (error.empty()) {
      error = cuda::too_large(kOperator, "elements of x", cuda::kLargestCall, x.elements(), "feed fewer tokens");
    }
    if (!error.empty()) return error;
    if (past.data != next.data) {
      error = cuda::copy(next.data, past.data, static_cast<std::size_t>(past.elements()) * sizeof(float), stream);
      if (!error.empty()) return error;
    }
    const auto whole = [](std::int64_t value) { return static_cast<int>(value); };
    Call call{};
    call.x = x.as<float>();
    call.weight = o[kWeight].as<float>();
    call.bias = o[kBias].as<float>();
    call.past = next.as<float>();
    call.y = o[kY].as<float>();
    call.indices = {o[kValid].as<std::int64_t>(),
                    o[kSlots].as<std::int64_t>(),
                    whole(x.shape[0]),
                    whole(x.shape[1]),
                    past.shape[0],
                    status_word(StatusOf::kCausalConvolution, kValid),
                    status_word(StatusOf::kCausalConvolution, kSlots)};
    call.status = status;
    call.channels = whole(x.shape[2]);
    call.rows = whole(o[kWeight].shape[0]);
    call.blocks = (call.channels + kWarpSize - 1) / kWarpSize;
    call.silu = activation_ == Activation::kSilu;
    const std::int64_t work = x.shape[0] * call.blocks;
    if (work == 0) return {};
    const cuda::Launch launch{cuda::blocks_for(work), 1, 0, device_.shared_bytes, false};
    return cuda::launch(&convolve, launch, call, stream);
  }

 private:
  CudaDevice device_;
  Activation activation_;
};

}  // namespace

std::unique_ptr<CudaKernel> make_cuda_kernel(const Configuration& configuration, const CudaDevice& device,
                                             std::string& error) {
  error = cuda::unsupported(kOperator, device);
  return error.empty() ? std::make_unique<Kernel>(device, configuration.activation) : nullptr;
}

}  // namespace titans::kernels::causal_convolution
