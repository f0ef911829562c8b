#include "tensorrt_plugin_double.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <memory>
#include <string>

#include "plugins/kernels/cpu_kernel.h"
#include "tensorrt_plugin_floats.h"

extern "C" __attribute__((visibility("default"))) TitansDouble& titans_double() {
  static TitansDouble record;
  return record;
}

extern "C" cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                                         std::size_t width, std::size_t height, cudaMemcpyKind, cudaStream_t) {
  for (std::size_t row = 0; row < height; ++row) {
    std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
  }
  ++titans_double().copies;
  return cudaSuccess;
}

extern "C" const char* cudaGetErrorString(cudaError_t) { return "an error of the double"; }

namespace titans::kernels {
namespace {

std::size_t value_bytes(DType type) { return type == DType::kFloat32 ? sizeof(float) : sizeof(std::uint16_t); }

class Double final : public CudaKernel {
 public:
  Double(const Configuration& configuration, DType values, const CudaDevice& device, std::unique_ptr<CpuKernel> kernel)
      : configuration_(configuration), values_(values), device_(device), kernel_(std::move(kernel)) {}

  // Monotonic in each argument, and dependent on the device, like the kernel's own.
  std::size_t workspace_bytes(std::int64_t streams, std::int64_t heads, std::int64_t tokens) const override {
    const auto work = static_cast<std::size_t>(streams * heads * tokens) * value_bytes(values_);
    return (work + 255) / 256 * 256 + 256 * static_cast<std::size_t>(device_.multiprocessors);
  }

  std::string run(const Operands& operands, void* workspace, std::int32_t*, CUstream_st* stream) const override {
    std::string problem = check_operands(configuration_, operands, values_);
    if (!problem.empty()) return problem;
    if (reinterpret_cast<std::uintptr_t>(workspace) % 256 != 0) return "[double] the workspace is not aligned";
    const auto& q = operands[kQ].shape;
    std::memset(workspace, 0x5A, workspace_bytes(q[0], q[1], q[2]));
    TitansDouble& record = titans_double();
    ++record.runs;
    record.operands = operands;
    record.workspace = workspace;
    record.stream = stream;
    const auto* learn = operands[kLearn].as<std::uint8_t>();
    record.learn.assign(learn, operands[kLearn].present() ? learn + q[0] : learn);
    return compute(operands);
  }

  std::string placement(std::int64_t, std::int64_t, std::int64_t) const override { return "host memory"; }

 private:
  std::string compute(Operands operands) const {
    std::array<std::vector<float>, kOperands> wide;
    const Tensor y = operands[kY];
    if (values_ != DType::kFloat32) {
      for (const Operand operand : {kQ, kK, kV, kY}) {
        Tensor& tensor = operands[operand];
        if (!tensor.present()) continue;
        const auto* bits = tensor.as<std::uint16_t>();
        for (std::int64_t i = 0; i < tensor.elements(); ++i)
          wide[operand].push_back(plugin_host::widen(values_, bits[i]));
        tensor.data = wide[operand].data();
        tensor.dtype = DType::kFloat32;
      }
    }
    const Parallel alone{[](void*, std::size_t count, void (*body)(void*, std::size_t), void* context) {
                           for (std::size_t i = 0; i < count; ++i) body(context, i);
                         },
                         nullptr};
    std::string problem = kernel_->run(operands, alone);
    for (std::size_t i = 0; i < wide[kY].size(); ++i)
      y.as<std::uint16_t>()[i] = plugin_host::narrow(values_, wide[kY][i]);
    return problem;
  }

  Configuration configuration_;
  DType values_;
  CudaDevice device_;
  std::unique_ptr<CpuKernel> kernel_;
};

}  // namespace

std::string CudaDevice::current(CudaDevice& device) {
  if (titans_double().device.sm == 0) return failure("double", "E0612", "no device", "set one");
  device = titans_double().device;
  return {};
}

std::unique_ptr<CudaKernel> CudaKernel::create(const Configuration& configuration, DType values,
                                               const CudaDevice& device, std::string& error) {
  if (values != DType::kFloat32 && values != DType::kFloat16 && values != DType::kBFloat16) {
    error = failure("double", "E0705", "wrong dtype of q: expected float32, float16 or bfloat16, got another type",
                    "cast it");
    return nullptr;
  }
  std::unique_ptr<CpuKernel> kernel = CpuKernel::create(configuration, {}, error);
  if (kernel == nullptr) return nullptr;
  ++titans_double().created;
  return std::make_unique<Double>(configuration, values, device, std::move(kernel));
}

}  // namespace titans::kernels
