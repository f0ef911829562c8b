// ChunkNeuralMemory on an NVIDIA GPU: the checks, the plan of a call, and its single launch. A thread block computes a
// head of a stream (cuda_chunk.cuh). Most of a chunk's time is Newton-Schulz, whose matrices are in shared memory if
// they fit.
#include <algorithm>

#include "plugins/kernels/cuda_chunk.cuh"
#include "plugins/kernels/cuda_chunk_plan.h"
#include "plugins/kernels/cuda_device.cuh"
#include "plugins/kernels/cuda_node.cuh"
#include "plugins/kernels/neural_memory_cuda.h"

namespace titans::kernels {
namespace {

constexpr std::int64_t kLargestRow = std::int64_t{1} << 26;      // words: keeps sizes and offsets within 32 bits
constexpr std::int64_t kLargestScratch = std::int64_t{1} << 31;  // bytes of a block, for the same reason

std::string too_large(const char* what, std::int64_t most, std::int64_t got, const char* fix) {
  return cuda::too_large(ChunkConfiguration::kOperator, what, most, got, fix);
}

class ChunkKernel final : public CudaKernel {
 public:
  ChunkKernel(const ChunkConfiguration& configuration, const CudaDevice& device)
      : configuration_(configuration),
        model_(cuda::make_chunk_model(configuration)),
        plan_(cuda::make_chunk_plan(configuration, device)),
        device_(device) {}

  std::size_t workspace_bytes(std::int64_t streams, std::int64_t heads, std::int64_t /*tokens*/) const override {
    return static_cast<std::size_t>(cuda::chunk_blocks(device_, streams * heads)) * plan_.workspace_bytes;
  }

  std::string placement(std::int64_t /*streams*/, std::int64_t /*heads*/, std::int64_t /*tokens*/) const override {
    return cuda::describe(plan_);
  }

  std::string run(const Operands& o, void* workspace, std::int32_t* status, CUstream_st* stream) const override {
    std::string error = check_operands(configuration_, o);
    if (!error.empty()) return error;
    const auto& [streams, heads, tokens, width] = o[kQ].shape;
    const std::int64_t largest =
        std::max({o[kQ].elements(), o[kK].elements(), streams * heads, streams * heads * tokens * model_.tensors});
    error = too_large("elements of q or k", cuda::kLargestCall, largest, "feed fewer tokens or streams at a time");
    if (error.empty() && o[kStateOut].data != o[kState].data) {
      const auto bytes = static_cast<std::size_t>(o[kState].elements()) * sizeof(float);
      error = cuda::copy(o[kStateOut].data, o[kState].data, bytes, stream);
    }
    if (!error.empty() || streams * heads == 0) return error;
    const cuda::ChunkCall call = make_call(o, workspace, status);
    const cuda::Launch launch{cuda::chunk_blocks(device_, streams * heads), 1, plan_.shared_bytes, device_.shared_bytes,
                              false};
    return cuda::launch(&cuda::update_chunks<float>, launch, call, stream);
  }

 private:
  cuda::ChunkCall make_call(const Operands& o, void* workspace, std::int32_t* status) const {
    constexpr StatusOf kOp = StatusOf::kChunkNeuralMemory;
    const auto floats = [&](Operand which) { return o[which].as<float>(); };
    const auto whole = [](std::int64_t value) { return static_cast<int>(value); };
    cuda::ChunkCall call{};
    call.model = model_;
    call.plan = plan_;
    call.state = floats(kStateOut);
    call.q = floats(kQ);
    call.k = floats(kK);
    call.v = floats(kV);
    call.step_size = floats(kStepSize);
    call.momentum = floats(kMomentum);
    call.forget_gate = floats(kForgetGate);
    call.modulation = floats(kModulation);
    call.previous = floats(kPrevious);
    call.previous_gate = floats(kPreviousGate);
    call.fill = o[kFill].as<std::int64_t>();
    call.learn = o[kLearn].as<bool>();
    call.update_limit = floats(kUpdateLimit);
    call.norm_scale = floats(kNormScale);
    call.y = floats(kY);
    call.stats = floats(kStats);
    call.initial_weights = floats(kInitialWeights);
    call.indices = {o[kValid].as<std::int64_t>(), o[kSlots].as<std::int64_t>(), whole(o[kQ].shape[0]),
                    whole(o[kQ].shape[2]),        o[kState].shape[0],           status_word(kOp, kValid),
                    status_word(kOp, kSlots)};
    call.status = status;
    call.workspaces = static_cast<std::byte*>(workspace);
    call.heads = whole(o[kQ].shape[1]);
    call.most_chunks = whole(configuration_.chunks(o[kQ].shape[2]));
    return call;
  }

  ChunkConfiguration configuration_;
  cuda::ChunkModel model_;
  cuda::ChunkPlan plan_;
  CudaDevice device_;
};

}  // namespace

std::unique_ptr<CudaKernel> CudaKernel::create(const ChunkConfiguration& configuration, DType values,
                                               const CudaDevice& device, std::string& error) {
  if (values != DType::kFloat32) {
    error = failure(ChunkConfiguration::kOperator, "E0705",
                    "wrong dtype of q, k and v: expected float32, got another type", "cast them");
    return nullptr;
  }
  error = cuda::unsupported(ChunkConfiguration::kOperator, device);
  const std::int64_t row = ChunkRowLayout(configuration).size;
  if (error.empty()) error = too_large("elements of a packed row", kLargestRow, row, "run on the CPU");
  if (!error.empty()) return nullptr;
  const auto scratch = static_cast<std::int64_t>(cuda::make_chunk_plan(configuration, device).workspace_bytes);
  error = too_large("bytes of scratch", kLargestScratch, scratch, "run on the CPU");
  return error.empty() ? std::make_unique<ChunkKernel>(configuration, device) : nullptr;
}

}  // namespace titans::kernels
