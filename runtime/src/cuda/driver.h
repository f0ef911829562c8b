// The CUDA driver's functions, opened at run time: nothing is linked against CUDA, and a machine without it does
// without.
//
// Compiled where cuda.h is found (TITANS_CUDA_INCLUDE). cuda.h turns some names into others of a fixed version, such as
// cuMemAlloc into cuMemAlloc_v2; the members of Driver carry the names that result, so both ways of writing work.
#pragma once

#include <cuda.h>

#include <string>
#include <string_view>

namespace titans::core::cuda {

// Only what drivers of CUDA 12.0 and newer have under the names that cuda.h of 12.0 up to 13.x gives them.
#define TITANS_CUDA_FUNCTIONS(X) \
  X(cuInit)                      \
  X(cuDriverGetVersion)          \
  X(cuGetErrorName)              \
  X(cuGetErrorString)            \
  X(cuDeviceGet)                 \
  X(cuDeviceGetCount)            \
  X(cuDeviceGetName)             \
  X(cuDeviceGetAttribute)        \
  X(cuDeviceTotalMem)            \
  X(cuDevicePrimaryCtxRetain)    \
  X(cuDevicePrimaryCtxRelease)   \
  X(cuCtxPushCurrent)            \
  X(cuCtxPopCurrent)             \
  X(cuMemAlloc)                  \
  X(cuMemFree)                   \
  X(cuMemHostAlloc)              \
  X(cuMemFreeHost)               \
  X(cuMemHostGetDevicePointer)   \
  X(cuMemcpyHtoDAsync)           \
  X(cuMemcpyDtoHAsync)           \
  X(cuMemcpyDtoDAsync)           \
  X(cuMemcpy2DAsync)             \
  X(cuMemsetD8Async)             \
  X(cuStreamCreate)              \
  X(cuStreamDestroy)             \
  X(cuStreamSynchronize)         \
  X(cuStreamWaitEvent)           \
  X(cuStreamBeginCapture)        \
  X(cuStreamEndCapture)          \
  X(cuEventCreate)               \
  X(cuEventDestroy)              \
  X(cuEventRecord)               \
  X(cuEventSynchronize)          \
  X(cuGraphDestroy)              \
  X(cuGraphInstantiateWithFlags) \
  X(cuGraphLaunch)               \
  X(cuGraphExecDestroy)

class Driver {
 public:
  // The driver of $TITANS_CUDA_DRIVER, or the loader's libcuda.so.1, initialised. It stays loaded until the process
  // ends. Where there is none, or no device, NULL, and `why_not` says what was found instead.
  static const Driver* load(std::string& why_not);
  // The same, or an Error with TITANS_UNSUPPORTED.
  static const Driver& require();

  // The newest CUDA that this driver serves, as cuDriverGetVersion has it: 12060 is 12.6.
  int version() const;
  int device_count() const;

  // Throws "[cuda] CALL failed: NAME (TEXT)" if the driver reports a failure.
  void check(CUresult result, std::string_view call, std::string_view fix = kFix) const;
  // "CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)".
  std::string describe(CUresult result) const;

#define TITANS_CUDA_MEMBER(name) decltype(&::name) name = nullptr;
  TITANS_CUDA_FUNCTIONS(TITANS_CUDA_MEMBER)
#undef TITANS_CUDA_MEMBER

 private:
  static constexpr std::string_view kFix = "check the device with nvidia-smi, and start the program again";
  Driver() = default;
  // What is wrong with the library at `path`, or an empty string.
  std::string open(const std::string& path);
};

// "12.6" for 12060.
std::string cuda_version_text(int version);

}  // namespace titans::core::cuda
