// The CUDA driver's functions, loaded at run time. Nothing is linked against CUDA, so the runtime works on machines
// without it.
//
// Compiled only if cuda.h is found (TITANS_CUDA_INCLUDE). cuda.h maps some names to versioned ones, such as cuMemAlloc
// to cuMemAlloc_v2. The members of Driver have the mapped names, so both spellings work.
#pragma once

#include <cuda.h>

#include <string>
#include <string_view>

namespace titans::core::cuda {

// Functions that drivers of CUDA 12.0 and newer export under the names in cuda.h 12.0 to 13.x.
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
  // The initialised driver from $TITANS_CUDA_DRIVER or the loader's libcuda.so.1. It stays loaded until the process
  // ends. Returns NULL and sets `why_not` if there is no driver or no device.
  static const Driver* load(std::string& why_not);
  // Like load, but throws an Error with TITANS_UNSUPPORTED.
  static const Driver& require();

  // The newest CUDA version that the driver supports, as in cuDriverGetVersion: 12060 is 12.6.
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
  // Returns why the library at `path` is unusable, or an empty string.
  std::string open(const std::string& path);
};

// "12.6" for 12060.
std::string cuda_version_text(int version);

}  // namespace titans::core::cuda
