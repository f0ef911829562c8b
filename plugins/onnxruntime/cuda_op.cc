// The operator for ONNX Runtime's CUDA provider. Calls are put into the provider's stream and not waited for.
#include "plugins/kernels/neural_memory_cuda.h"
#include "plugins/onnxruntime/cuda_device.h"
#include "plugins/onnxruntime/neural_memory_op.h"

namespace titans::plugins {
namespace {

using namespace titans::kernels;

// The device of the session's provider.
int ordinal_of(const OrtApi& api, const OrtKernelInfo& info) {
  OrtAllocator* raw = nullptr;
  check(api.KernelInfoGetAllocator(&info, OrtMemTypeDefault, &raw));
  const Handle<OrtAllocator> allocator(raw, api.ReleaseAllocator);
  const OrtMemoryInfo* memory = nullptr;  // the allocator's
  check(api.AllocatorGetInfo(raw, &memory));
  int ordinal = 0;
  check(api.MemoryInfoGetId(memory, &ordinal));
  return ordinal;
}

// One node of a session.
class CudaNode {
 public:
  CudaNode(const OrtApi& api, const OrtKernelInfo& info, DType values)
      : api_(api), configuration_(read_configuration(api, info)), values_(values), ordinal_(ordinal_of(api, info)) {
    const DeviceScope scope(ordinal_);
    CudaDevice device;
    std::string error = CudaDevice::current(device);
    if (error.empty()) kernel_ = CudaKernel::create(configuration_, values, device, error);
    check(api, error);
  }

  OrtStatus* compute(OrtKernelContext& context) noexcept {
    return guarded(api_, [&] {
      const DeviceScope scope(ordinal_);
      // Of values, the device tells when the work is done: here of calls that this thread has made before.
      check(api_, take_cuda_error());
      const Operands operands = read_operands(api_, context, configuration_, values_);
      // The shapes are read before the kernel has checked them.
      check(api_, check_operands(configuration_, operands, values_));
      void* raw = nullptr;
      check(api_.KernelContext_GetGPUComputeStream(&context, &raw));
      auto* stream = static_cast<CUstream_st*>(raw);
      const auto& shape = operands[kQ].shape;
      const Scratch scratch(ordinal_, kernel_->workspace_bytes(shape[0], shape[1], shape[2]), stream);
      check(api_, kernel_->run(operands, scratch.data(), thread_status(), stream));
    });
  }

  static std::atomic<std::size_t> made;

 private:
  const OrtApi& api_;
  Configuration configuration_;
  DType values_;
  int ordinal_;
  std::unique_ptr<CudaKernel> kernel_;
};

std::atomic<std::size_t> CudaNode::made{0};

class CudaOp final : public NeuralMemoryOp {
 public:
  explicit CudaOp(ONNXTensorElementDataType values) : NeuralMemoryOp("CUDAExecutionProvider", values) {
    compute_with<CudaNode>();
  }
};

}  // namespace

std::vector<const OrtCustomOp*> cuda_ops() {
  static const CudaOp float32(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  static const CudaOp float16(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
  static const CudaOp bfloat16(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
  return {&float32, &float16, &bfloat16};
}

std::size_t cuda_nodes_made() { return CudaNode::made.load(); }

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

std::string take_cuda_error() {
  const std::int32_t status = take_thread_status();
  return status == 0 ? std::string() : CudaKernel::status_message(status);
}

}  // namespace titans::plugins
