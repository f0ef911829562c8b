#include "backends/tensorrt/library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#include "base/error.h"

namespace titans::core {
namespace {

std::vector<std::string> candidates(const std::string& path) {
  if (!path.empty()) return {path};
  const char* named = std::getenv(kVendorVariable);
  if (named != nullptr && *named != '\0') return {named};
  return {kVendorLibraries.begin(), kVendorLibraries.end()};
}

void* open_first(const std::vector<std::string>& names) {
  std::string reasons;
  for (const std::string& name : names) {
    if (void* library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    reasons += text(reasons.empty() ? "" : ", ", ::dlerror());
  }
  throw Error(TITANS_UNSUPPORTED, "E0604", kVendor, text("cannot open the library of ", kVendor, ": ", reasons),
              kVendorFix);
}

}  // namespace

const VendorLibrary& VendorLibrary::load(const std::string& path) {
  static std::mutex mutex;
  // Never destroyed, because the order of destruction at process exit is unspecified.
  static auto& loaded = *new std::map<std::vector<std::string>, std::unique_ptr<const VendorLibrary>>;
  const std::lock_guard lock(mutex);
  auto& library = loaded[candidates(path)];
  if (!library) library.reset(new VendorLibrary(path));
  return *library;
}

VendorLibrary::VendorLibrary(const std::string& path) {
  void* library = open_first(candidates(path));
  const auto get_version = reinterpret_cast<std::int32_t (*)()>(::dlsym(library, "getInferLibVersion"));
  create_runtime_ = reinterpret_cast<decltype(create_runtime_)>(::dlsym(library, "createInferRuntime_INTERNAL"));
  if (get_version == nullptr || create_runtime_ == nullptr) {
    throw Error(TITANS_UNSUPPORTED, "E0604", kVendor,
                text("not a library of ", kVendor, ": no getInferLibVersion and createInferRuntime_INTERNAL"),
                kVendorFix);
  }
  version_code_ = get_version();
  const int major = version_code_ / 10000;
  const int minor = version_code_ / 100 % 100;
  version_ = text(major, ".", minor, ".", version_code_ % 100);
  if (major != kVendorMajor || minor < kLeastMinor) {
    throw Error(TITANS_UNSUPPORTED, "E0604", kVendor,
                text("expected ", kVendor, " from ", kVendorMajor, ".", kLeastMinor, " up to ", kVendorMajor,
                     ".x, got ", version_),
                kVendorFix);
  }
}

std::unique_ptr<nvinfer1::IRuntime> VendorLibrary::make_runtime() const {
  VendorLogger::clear();
#ifdef TITANS_TENSORRT_RTX
  const int code = version_code_;  // the value in the library's own headers
#else
  const int code = NV_TENSORRT_VERSION;
#endif
  std::unique_ptr<nvinfer1::IRuntime> runtime(
      static_cast<nvinfer1::IRuntime*>(create_runtime_(&VendorLogger::get(), code)));
  if (!runtime) {
    throw Error(TITANS_UNSUPPORTED, "E0609", kVendor,
                text("cannot create a runtime of ", kVendor, " ", version_, ": ", VendorLogger::errors(kNoReason)),
                "check driver and device with nvidia-smi");
  }
  return runtime;
}

}  // namespace titans::core
