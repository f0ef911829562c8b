// ONNX Runtime's shared library, found and loaded at run time: nothing here is linked against it.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include <onnxruntime_c_api.h>

#include "titans/titans.h"

namespace titans::core {

// An ONNX Runtime object and the function of its API that releases it.
template <typename Object>
using OrtHandle = std::unique_ptr<Object, void (*)(Object*)>;

class OrtLibrary {
 public:
  // Loads `path`, or searches where it is empty: $TITANS_ONNXRUNTIME, then the loader's own path. A library once loaded
  // stays until the process ends, and all engines share its environment.
  static const OrtLibrary& load(const std::string& path);

  const OrtApi& api() const { return *api_; }
  OrtEnv& env() const { return *env_; }
  const std::string& version() const { return version_; }

  // Throws "`problem`: MESSAGE" if ONNX Runtime reports a failure.
  void check(OrtStatus* status, std::string_view problem, std::string_view fix,
             titans_status failure = TITANS_FAILED) const;

 private:
  explicit OrtLibrary(const std::string& path);

  const OrtApi* api_ = nullptr;
  OrtEnv* env_ = nullptr;
  std::string version_;
};

}  // namespace titans::core
