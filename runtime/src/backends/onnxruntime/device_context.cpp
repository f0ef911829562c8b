#include "backends/onnxruntime/device_context.h"

#include <stdexcept>

#include "base/error.h"

namespace titans::core {

OrtHandle<OrtValue> DeviceContext::view_pool(std::size_t, std::size_t) const {
  throw std::logic_error("this device has no pools");
}

#ifndef TITANS_WITH_CUDA
std::unique_ptr<DeviceContext> make_cuda_context(const OrtLibrary&, const std::string& device) {
  throw Error(TITANS_UNSUPPORTED, "E0611", "onnxruntime",
              text("the runtime was built without CUDA's headers, which device ", device, " needs"),
              "build it with -DTITANS_CUDA_INCLUDE=FOLDER, or open the session on cpu");
}
#endif

std::unique_ptr<DeviceContext> make_device_context(const OrtLibrary& library, const std::string& device) {
  if (device == "cpu") return make_host_context(library);
  if (device == "cuda" || device.rfind("cuda:", 0) == 0) return make_cuda_context(library, device);
  throw Error(TITANS_UNSUPPORTED, "E0601", "onnxruntime", text("unknown device: ", quoted(device)),
              "open the session on cpu, cuda or cuda:N");
}

}  // namespace titans::core
