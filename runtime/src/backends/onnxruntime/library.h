// ONNX Runtime's shared library, loaded at run time. Nothing here is linked against it.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include <onnxruntime_c_api.h>

#include "titans/titans.h"

namespace titans::core {

// An ONNX Runtime object with the API function that releases it.
template <typename Object>
using OrtHandle = std::unique_ptr<Object, void (*)(Object*)>;

class OrtLibrary {
 public:
  // Loads `path`. If it is empty, tries $TITANS_ONNXRUNTIME, then the loader's search path. A loaded library stays
  // until the process ends, and all executors share its environment.
  static const OrtLibrary& load(const std::string& path);

  const OrtApi& api() const { return *api_; }
  OrtEnv& env() const { return *env_; }
  const std::string& version() const { return version_; }

  // Throws "`problem`: MESSAGE" if `status` is a failure.
  void check(OrtStatus* status, std::string_view problem, std::string_view fix,
             titans_status failure = TITANS_FAILED) const;

 private:
  explicit OrtLibrary(const std::string& path);

  const OrtApi* api_ = nullptr;
  OrtEnv* env_ = nullptr;
  std::string version_;
};

}  // namespace titans::core
