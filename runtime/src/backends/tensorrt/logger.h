// The vendor library's log. Error texts quote it, because the library's functions return no reason.
#pragma once

#include <string>

#include "backends/tensorrt/vendor.h"

namespace titans::core {

// For VendorLogger::errors if the library logged nothing.
inline constexpr const char* kNoReason = "no reason given";

class VendorLogger final : public nvinfer1::ILogger {
 public:
  // The only instance. It lives as long as the process, because the library keeps the first logger it gets.
  static VendorLogger& get();

  void log(Severity severity, const char* message) noexcept override;

  // Drops the messages of this thread.
  static void clear() noexcept;
  // The errors logged on this thread since clear(), or `otherwise`.
  static std::string errors(const std::string& otherwise);
};

}  // namespace titans::core
