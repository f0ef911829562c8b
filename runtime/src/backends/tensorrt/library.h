// The vendor library, loaded at run time. Nothing here is linked against it.
#pragma once

#include <memory>
#include <string>

#include "backends/tensorrt/logger.h"
#include "backends/tensorrt/vendor.h"

namespace titans::core {

class VendorLibrary {
 public:
  // Loads `path`. If it is empty, tries the environment variable, then the loader's search path. A loaded library stays
  // until the process ends. Throws TITANS_UNSUPPORTED if no compatible library is found.
  static const VendorLibrary& load(const std::string& path);

  const std::string& version() const { return version_; }  // "10.3.0"
  // Requires a device.
  std::unique_ptr<nvinfer1::IRuntime> make_runtime() const;

 private:
  explicit VendorLibrary(const std::string& path);

  std::string version_;
  int version_code_ = 0;
  void* (*create_runtime_)(void* logger, std::int32_t version) = nullptr;
};

}  // namespace titans::core
