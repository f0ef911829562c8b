#include "session/device.h"

#include "base/error.h"

#ifdef TITANS_WITH_CUDA
#include "cuda/objects.h"
#endif

namespace titans::core {
namespace {

#if defined(__x86_64__)
constexpr const char* kPlatform = "linux-x86_64";
#elif defined(__aarch64__)
constexpr const char* kPlatform = "linux-aarch64";
#else
constexpr const char* kPlatform = "linux-other";
#endif

DeviceInfo find_cuda_device([[maybe_unused]] const std::string& device) {
#ifdef TITANS_WITH_CUDA
  const cuda::DeviceInfo info = cuda::find_device(cuda::Driver::require(), device);
  return {"cuda", info.name, kPlatform, info.sm, info.driver_version, {}};
#else
  throw Error(TITANS_UNSUPPORTED, "E0611", "session", "the runtime was built without CUDA's headers",
              "build it with -DTITANS_CUDA_INCLUDE=FOLDER, or open the session on cpu");
#endif
}

}  // namespace

DeviceInfo find_device_info(const std::string& device) {
  if (device == "cpu") return {"cpu", {}, kPlatform, 0, 0, {}};
  constexpr std::string_view kCuda = "cuda";
  if (device.compare(0, kCuda.size(), kCuda) == 0) return find_cuda_device(device);
  throw Error(TITANS_UNSUPPORTED, "E0601", "session", text("unknown device: ", quoted(device)),
              "open the session on cpu, cuda or cuda:N");
}

}  // namespace titans::core
