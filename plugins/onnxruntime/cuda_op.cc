// The memory operators for ONNX Runtime's CUDA provider. Calls are enqueued in the provider's stream.
#include "plugins/kernels/cuda_status.h"
#include "plugins/kernels/neural_memory_cuda.h"
#include "plugins/onnxruntime/cuda_device.h"
#include "plugins/onnxruntime/memory_op.h"

namespace titans::plugins {
namespace {

using namespace titans::kernels;

std::atomic<std::size_t> kernels_made{0};

// The kernel of one node of a session.
template <class Configuration>
class CudaNodeKernel {
 public:
  CudaNodeKernel(const OrtApi& api, const OrtKernelInfo& info, DType values)
      : api_(api),
        configuration_(read_configuration<Configuration>(api, info)),
        values_(values),
        ordinal_(ordinal_of(api, info)) {
    const DeviceScope scope(ordinal_);
    CudaDevice device;
    std::string error = CudaDevice::current(device);
    if (error.empty()) kernel_ = CudaKernel::create(configuration_, values, device, error);
    check(api, error);
  }

  OrtStatus* compute(OrtKernelContext& context) noexcept {
    return guarded(api_, [&] {
      const DeviceScope scope(ordinal_);
      // The device reports invalid values when its work is done. This throws the errors of the thread's earlier calls.
      check(api_, take_cuda_error());
      const Operands operands = read_operands(api_, context, configuration_, values_);
      // The code below uses the shapes before the kernel checks them.
      check(api_, check_operands(configuration_, operands, values_));
      void* raw = nullptr;
      check(api_.KernelContext_GetGPUComputeStream(&context, &raw));
      auto* stream = static_cast<CUstream_st*>(raw);
      const auto& shape = operands[kQ].shape;
      const Scratch scratch(ordinal_, kernel_->workspace_bytes(shape[0], shape[1], shape[2]), stream);
      check(api_, kernel_->run(operands, scratch.data(), thread_status(), stream));
    });
  }

  static std::atomic<std::size_t>& made;

 private:
  const OrtApi& api_;
  Configuration configuration_;
  DType values_;
  int ordinal_;
  std::unique_ptr<CudaKernel> kernel_;
};

template <class Configuration>
std::atomic<std::size_t>& CudaNodeKernel<Configuration>::made = kernels_made;

template <class Configuration>
class CudaOp final : public MemoryOp {
 public:
  explicit CudaOp(ONNXTensorElementDataType values) : MemoryOp(Configuration(), "CUDAExecutionProvider", values) {
    compute_with<CudaNodeKernel<Configuration>>();
  }
};
using TokenOp = CudaOp<Configuration>;
using ChunkOp = CudaOp<ChunkConfiguration>;

}  // namespace

std::vector<const OrtCustomOp*> cuda_ops() {
  static const TokenOp float32(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  static const TokenOp float16(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
  static const TokenOp bfloat16(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
  static const ChunkOp chunk(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  return {&float32, &float16, &bfloat16, &chunk};
}

std::size_t cuda_kernels_made() { return kernels_made.load(); }

std::string cuda_target(int ordinal, std::string& error) {
  try {
    const DeviceScope scope(ordinal);
    CudaDevice device;
    error = CudaDevice::current(device);
    return error.empty() ? "cuda-sm" + std::to_string(device.sm) : std::string();
  } catch (const std::exception& failure) {
    error = failure.what();
    return {};
  }
}

std::string take_cuda_error() { return status_message(take_thread_status()); }

}  // namespace titans::plugins
