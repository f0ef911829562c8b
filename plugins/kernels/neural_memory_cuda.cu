// NeuralMemory on an NVIDIA GPU: the checks, the plan of a call, and its single launch. There are three kernels, each
// for three value types: calls of several tokens (cuda_blocks.cuh), calls of one token (cuda_token.cuh), and mode read
// (cuda_read.cuh).
//
// The idea is the same as on the CPU. A call loads W and S once and keeps them on the chip, in the shared memory of as
// many thread blocks as necessary. A chunk is a handful of matmuls; a single token reads each weight once.
#include "plugins/kernels/neural_memory_cuda.h"

#include <algorithm>

#include "plugins/kernels/cuda_blocks.cuh"
#include "plugins/kernels/cuda_call.cuh"
#include "plugins/kernels/cuda_device.cuh"
#include "plugins/kernels/cuda_node.cuh"
#include "plugins/kernels/cuda_plan.h"
#include "plugins/kernels/cuda_read.cuh"
#include "plugins/kernels/cuda_token.cuh"

namespace titans::kernels {
namespace {

using cuda::Call;
using cuda::Kind;
using cuda::Plan;
using cuda::Request;

using Kernel = void (*)(const Call);

template <class V>
Kernel kernel_for(Kind kind, bool shared) {
  switch (kind) {
    case Kind::kBlocks:
      return shared ? &cuda::update_blocks<V, true> : &cuda::update_blocks<V, false>;
    case Kind::kToken:
      return shared ? &cuda::update_token<V, true> : &cuda::update_token<V, false>;
    case Kind::kRead:
      return &cuda::read_rows<V>;
  }
  return nullptr;
}

constexpr std::int64_t kLargestRow = std::int64_t{1} << 28;  // words: keeps sizes and offsets within 32 bits

std::string too_large(const char* what, std::int64_t most, std::int64_t got, const char* fix) {
  return cuda::too_large(Configuration::kOperator, what, most, got, fix);
}

class NodeKernel final : public CudaKernel {
 public:
  NodeKernel(const Configuration& configuration, DType values, const CudaDevice& device)
      : configuration_(configuration), model_(cuda::make_model(configuration)), values_(values), device_(device) {}

  std::size_t workspace_bytes(std::int64_t streams, std::int64_t heads, std::int64_t tokens) const override {
    if (configuration_.mode == Mode::kRead) {
      return most_workspace(model_, device_, request(Kind::kRead, streams, heads, tokens));
    }
    return std::max(most_workspace(model_, device_, request(Kind::kToken, streams, heads, tokens)),
                    most_workspace(model_, device_, request(Kind::kBlocks, streams, heads, tokens)));
  }

  std::string placement(std::int64_t streams, std::int64_t heads, std::int64_t tokens) const override {
    return describe(make_plan(model_, device_, request(kind(tokens), streams, heads, tokens)));
  }

  std::string run(const Operands& o, void* workspace, std::int32_t* status, CUstream_st* stream) const override {
    std::string error = check_operands(configuration_, o, values_);
    if (!error.empty()) return error;
    const std::int64_t streams = o[kQ].shape[0], heads = o[kQ].shape[1], tokens = o[kQ].shape[2];
    const bool update = configuration_.mode == Mode::kUpdate;
    error = too_large("elements of q", cuda::kLargestCall, std::max(o[kQ].elements(), streams * heads),
                      "feed fewer tokens or streams at a time");
    if (!error.empty()) return error;
    if (update && o[kStateOut].data != o[kState].data) {
      const auto bytes = static_cast<std::size_t>(o[kState].elements()) * sizeof(float);
      error = cuda::copy(o[kStateOut].data, o[kState].data, bytes, stream);
      if (!error.empty()) return error;
    }
    if (streams * heads == 0 || (!update && tokens == 0)) return {};

    const Request wanted = request(kind(tokens), streams, heads, tokens);
    Call call{};
    call.model = model_;
    call.plan = make_plan(model_, device_, wanted);
    const int groups = groups_of(call.plan, device_, wanted.work);
    call.state = o[update ? kStateOut : kState].as<float>();
    call.q = o[kQ].data;
    call.k = o[kK].data;
    call.v = o[kV].data;
    call.step_size = o[kStepSize].as<float>();
    call.momentum = o[kMomentum].as<float>();
    call.forget_gate = o[kForgetGate].as<float>();
    call.fill = o[kFill].as<std::int64_t>();
    call.learn = o[kLearn].as<bool>();
    call.valid = o[kValid].as<std::int64_t>();
    call.slots = o[kSlots].as<std::int64_t>();
    call.update_limit = o[kUpdateLimit].as<float>();
    call.norm_scale = configuration_.layer_norm ? o[kNormScale].as<float>() : nullptr;
    call.y = o[kY].data;
    call.stats = o[kStats].as<float>();
    call.status = status;
    call.counters = static_cast<unsigned*>(workspace);
    call.workspaces = static_cast<std::byte*>(workspace) + cuda::counter_bytes(groups);
    call.streams = static_cast<int>(streams);
    call.heads = static_cast<int>(heads);
    call.tokens = static_cast<int>(tokens);
    call.pool = static_cast<int>(o[kState].shape[0]);
    if (call.plan.blocks > 1 && !call.plan.cluster) {
      error = cuda::clear(workspace, cuda::counter_bytes(groups), stream);
      if (!error.empty()) return error;
    }
    const cuda::Launch launch{groups, call.plan.blocks, call.plan.shared_bytes, device_.shared_bytes,
                              call.plan.cluster};
    return cuda::launch(kernel(wanted.kind, call.plan.shared), launch, call, stream);
  }

 private:
  Kind kind(std::int64_t tokens) const {
    if (configuration_.mode == Mode::kRead) return Kind::kRead;
    return tokens == 1 ? Kind::kToken : Kind::kBlocks;
  }

  Request request(Kind kind, std::int64_t streams, std::int64_t heads, std::int64_t tokens) const {
    const std::int64_t parts = kind == Kind::kRead ? (tokens + cuda::kMostRows - 1) / cuda::kMostRows : 1;
    return {kind, operand_bytes(), streams * heads * parts};
  }

  int operand_bytes() const {
    const auto bytes = [&] {
      switch (values_) {
        case DType::kFloat16:
          return sizeof(cuda::Operand<__half>);
        case DType::kBFloat16:
          return sizeof(cuda::Operand<__nv_bfloat16>);
        default:
          return sizeof(cuda::Operand<float>);
      }
    };
    return static_cast<int>(bytes());
  }

  Kernel kernel(Kind kind, bool shared) const {
    switch (values_) {
      case DType::kFloat16:
        return kernel_for<__half>(kind, shared);
      case DType::kBFloat16:
        return kernel_for<__nv_bfloat16>(kind, shared);
      default:
        return kernel_for<float>(kind, shared);
    }
  }

  Configuration configuration_;
  cuda::Model model_;
  DType values_;
  CudaDevice device_;
};

}  // namespace

std::string CudaDevice::current(CudaDevice& device) {
  // The cluster size is queried with the kernel that uses the most resources.
  return cuda::query_device(device, reinterpret_cast<const void*>(kernel_for<float>(Kind::kBlocks, true)));
}

std::unique_ptr<CudaKernel> CudaKernel::create(const Configuration& configuration, DType values,
                                               const CudaDevice& device, std::string& error) {
  if (values != DType::kFloat32 && values != DType::kFloat16 && values != DType::kBFloat16) {
    error = failure(Configuration::kOperator, "E0705",
                    "wrong dtype of q, k and v: expected float32, float16 or bfloat16, got another type", "cast them");
    return nullptr;
  }
  error = cuda::unsupported(Configuration::kOperator, device);
  if (error.empty()) {
    error = too_large("elements of a packed row", kLargestRow, RowLayout(configuration).size, "run on the CPU");
  }
  if (!error.empty()) return nullptr;
  return std::make_unique<NodeKernel>(configuration, values, device);
}

}  // namespace titans::kernels
