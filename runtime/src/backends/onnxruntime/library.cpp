#include "backends/onnxruntime/library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#include "base/error.h"

namespace titans::core {
namespace {

constexpr std::string_view kAdvice = "run pip install onnxruntime, or set TITANS_ONNXRUNTIME to a libonnxruntime.so";

std::vector<std::string> candidates(const std::string& path) {
  if (!path.empty()) return {path};
  const char* named = std::getenv("TITANS_ONNXRUNTIME");
  if (named != nullptr && *named != '\0') return {named};
  return {"libonnxruntime.so.1", "libonnxruntime.so"};
}

void* open_first(const std::vector<std::string>& names) {
  std::string reasons;
  for (const std::string& name : names) {
    if (void* library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    reasons += text(reasons.empty() ? "" : ", ", ::dlerror());
  }
  throw Error(TITANS_UNSUPPORTED, "onnxruntime", "the ONNX Runtime library", reasons, kAdvice);
}

}  // namespace

const OrtLibrary& OrtLibrary::load(const std::string& path) {
  static std::mutex mutex;
  // Never destroyed: the order in which a process takes down its libraries is not ours to know.
  static auto& loaded = *new std::map<std::vector<std::string>, std::unique_ptr<const OrtLibrary>>;
  const std::lock_guard lock(mutex);
  auto& library = loaded[candidates(path)];
  if (!library) library.reset(new OrtLibrary(path));
  return *library;
}

OrtLibrary::OrtLibrary(const std::string& path) {
  void* library = open_first(candidates(path));
  const auto get_base = reinterpret_cast<const OrtApiBase* (*)()>(::dlsym(library, "OrtGetApiBase"));
  if (get_base == nullptr) {
    throw Error(TITANS_UNSUPPORTED, "onnxruntime", "the ONNX Runtime library", "one without OrtGetApiBase", kAdvice);
  }
  version_ = get_base()->GetVersionString();
  api_ = get_base()->GetApi(ORT_API_VERSION);
  if (api_ == nullptr) {
    throw Error(TITANS_UNSUPPORTED, "onnxruntime", text("ONNX Runtime 1.", ORT_API_VERSION, " or newer"), version_,
                kAdvice);
  }
  // What ONNX Runtime has to say comes back as a status; its log would only repeat that on stderr.
  check(api_->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "titans", &env_), "an environment", kAdvice);
}

void OrtLibrary::check(OrtStatus* status, std::string_view expected, std::string_view advice,
                       titans_status failure) const {
  if (status == nullptr) return;
  const OrtHandle<OrtStatus> owned(status, api_->ReleaseStatus);
  throw Error(failure, "onnxruntime", expected, api_->GetErrorMessage(status), advice);
}

}  // namespace titans::core
