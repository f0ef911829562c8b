#include "backends/onnxruntime/library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#include "base/error.h"

namespace titans::core {
namespace {

constexpr std::string_view kFix = "run pip install onnxruntime, or set TITANS_ONNXRUNTIME to a libonnxruntime.so";

std::vector<std::string> candidates(const std::string& path) {
  if (!path.empty()) return {path};
  const char* named = std::getenv("TITANS_ONNXRUNTIME");
  if (named != nullptr && *named != '\0') return {named};
  return {"libonnxruntime.so.1", "libonnxruntime.so"};
}

// Releases from 1.32 on write a device id below $HOME and send events. They read the switch when they are loaded.
void disable_telemetry() { ::setenv("ORT_DISABLE_TELEMETRY", "1", 0); }

void* open_first(const std::vector<std::string>& names) {
  std::string reasons;
  for (const std::string& name : names) {
    if (void* library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    reasons += text(reasons.empty() ? "" : ", ", ::dlerror());
  }
  throw Error(TITANS_UNSUPPORTED, "E0604", "onnxruntime", text("cannot open the ONNX Runtime library: ", reasons),
              kFix);
}

}  // namespace

const OrtLibrary& OrtLibrary::load(const std::string& path) {
  static std::mutex mutex;
  // Never destroyed, because the order of destruction at process exit is unspecified.
  static auto& loaded = *new std::map<std::vector<std::string>, std::unique_ptr<const OrtLibrary>>;
  const std::lock_guard lock(mutex);
  auto& library = loaded[candidates(path)];
  if (!library) library.reset(new OrtLibrary(path));
  return *library;
}

OrtLibrary::OrtLibrary(const std::string& path) {
  disable_telemetry();
  void* library = open_first(candidates(path));
  const auto get_base = reinterpret_cast<const OrtApiBase* (*)()>(::dlsym(library, "OrtGetApiBase"));
  if (get_base == nullptr) {
    throw Error(TITANS_UNSUPPORTED, "E0604", "onnxruntime", "not an ONNX Runtime library: no OrtGetApiBase", kFix);
  }
  version_ = get_base()->GetVersionString();
  api_ = get_base()->GetApi(ORT_API_VERSION);
  if (api_ == nullptr) {
    throw Error(TITANS_UNSUPPORTED, "E0604", "onnxruntime",
                text("expected ONNX Runtime 1.", ORT_API_VERSION, " or newer, got ", version_), kFix);
  }
  // ONNX Runtime returns failures as statuses. Its log would only repeat them on stderr.
  check(api_->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "titans", &env_), "cannot create an environment", kFix);
}

void OrtLibrary::check(OrtStatus* status, std::string_view problem, std::string_view fix, titans_status failure) const {
  if (status == nullptr) return;
  const OrtHandle<OrtStatus> owned(status, api_->ReleaseStatus);
  throw Error(failure, "E0609", "onnxruntime", text(problem, ": ", api_->GetErrorMessage(status)), fix);
}

}  // namespace titans::core
