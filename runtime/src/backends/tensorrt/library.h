// The vendor's shared library, found and loaded at run time: nothing here is linked against it.
#pragma once

#include <memory>
#include <string>

#include "backends/tensorrt/logger.h"
#include "backends/tensorrt/vendor.h"

namespace titans::core {

class VendorLibrary {
 public:
  // Loads `path`, or searches where it is empty: the environment's variable, then the loader's own path. A library once
  // loaded stays until the process ends. TITANS_UNSUPPORTED where there is none that fits.
  static const VendorLibrary& load(const std::string& path);

  const std::string& version() const { return version_; }  // "10.3.0"
  // Needs a device.
  std::unique_ptr<nvinfer1::IRuntime> make_runtime() const;

 private:
  explicit VendorLibrary(const std::string& path);

  std::string version_;
  int version_code_ = 0;
  void* (*create_runtime_)(void* logger, std::int32_t version) = nullptr;
};

}  // namespace titans::core
