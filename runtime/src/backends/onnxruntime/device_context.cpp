#include "backends/onnxruntime/device_context.h"

#include "base/error.h"

namespace titans::core {

#ifndef TITANS_WITH_CUDA
std::unique_ptr<DeviceContext> make_cuda_context(const OrtLibrary&, const std::string& device) {
  throw Error(TITANS_UNSUPPORTED, "onnxruntime", "a runtime that was built where cuda.h is, for the device " + device,
              "one built without", "build it again with CUDA's headers (-DTITANS_CUDA_INCLUDE=FOLDER), or open on cpu");
}
#endif

std::unique_ptr<DeviceContext> make_device_context(const OrtLibrary& library, const std::string& device) {
  if (device == "cpu") return make_host_context(library);
  if (device == "cuda" || device.rfind("cuda:", 0) == 0) return make_cuda_context(library, device);
  throw Error(TITANS_UNSUPPORTED, "onnxruntime", "a device out of: cpu, cuda, cuda:N", device,
              "open the session on one of these");
}

}  // namespace titans::core
