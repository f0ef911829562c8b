#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "plugins/kernels/failure.h"
#include "plugins/tools/device_memory.h"

namespace titans::kernels {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(failure(
      "cuda", "E0713",
      std::string("CUDA call failed: ") + what + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error),
      "check device, driver and memory"));
}

}  // namespace

DeviceBuffer::DeviceBuffer(std::size_t bytes) : data_(nullptr), bytes_(bytes) {
  if (bytes == 0) return;
  check(cudaMalloc(&data_, bytes), "cudaMalloc");
  check(cudaMemset(data_, 0xFF, bytes), "cudaMemset");
  // The work stream does not wait for the stream of this copy.
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}
DeviceBuffer::~DeviceBuffer() { cudaFree(data_); }
void DeviceBuffer::upload(const void* host) {
  check(cudaMemcpy(data_, host, bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}
void DeviceBuffer::download(void* host) const {
  check(cudaMemcpy(host, data_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
}

CUstream_st* work_stream() {
  static cudaStream_t stream = [] {
    cudaStream_t made = nullptr;
    check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "cudaStreamCreate");
    return made;
  }();
  return stream;
}

void synchronize() { check(cudaStreamSynchronize(work_stream()), "cudaStreamSynchronize"); }

std::vector<double> time_on_device(const std::function<void()>& work, std::size_t repeats, bool graph) {
  cudaStream_t stream = work_stream();
  cudaGraphExec_t captured = nullptr;
  if (graph) {
    cudaGraph_t recorded = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    work();
    check(cudaStreamEndCapture(stream, &recorded), "cudaStreamEndCapture");
    check(cudaGraphInstantiate(&captured, recorded, 0), "cudaGraphInstantiate");
    check(cudaGraphDestroy(recorded), "cudaGraphDestroy");
  }
  const auto once = [&] { graph ? check(cudaGraphLaunch(captured, stream), "cudaGraphLaunch") : work(); };
  cudaEvent_t start = nullptr, stop = nullptr;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&stop), "cudaEventCreate");
  constexpr std::size_t kWarmUp = 3;
  std::vector<double> times;
  for (std::size_t i = 0; i < kWarmUp + repeats; ++i) {
    check(cudaEventRecord(start, stream), "cudaEventRecord");
    once();
    check(cudaEventRecord(stop, stream), "cudaEventRecord");
    check(cudaEventSynchronize(stop), "cudaEventSynchronize");
    float milliseconds = 0.0F;
    check(cudaEventElapsedTime(&milliseconds, start, stop), "cudaEventElapsedTime");
    if (i >= kWarmUp) times.push_back(static_cast<double>(milliseconds) * 1e6);
  }
  check(cudaEventDestroy(start), "cudaEventDestroy");
  check(cudaEventDestroy(stop), "cudaEventDestroy");
  if (captured != nullptr) check(cudaGraphExecDestroy(captured), "cudaGraphExecDestroy");
  return times;
}

}  // namespace titans::kernels
