// What the vendor's library says, kept for our error texts: its functions return no reason themselves.
#pragma once

#include <string>

#include "backends/tensorrt/vendor.h"

namespace titans::core {

class VendorLogger final : public nvinfer1::ILogger {
 public:
  // There is one, which lives as long as the process: the library keeps the first that it is given.
  static VendorLogger& get();

  void log(Severity severity, const char* message) noexcept override;

  // Forgets what was said on this thread.
  static void clear() noexcept;
  // The errors that were reported on this thread since then, or `otherwise` where there was none.
  static std::string errors(const std::string& otherwise);
};

}  // namespace titans::core
