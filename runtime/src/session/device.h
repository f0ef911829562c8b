// Describes the device that a session runs on.
#pragma once

#include <map>
#include <string>

#include "backends/backend.h"

namespace titans::core {

struct DeviceInfo {
  std::string kind;      // "cpu" or "cuda"
  std::string name;      // vendor's name; empty for a CPU
  std::string platform;  // "linux-aarch64"
  int sm = 0;            // compute capability times 10; 0 for a CPU
  int driver = 0;        // cuDriverGetVersion; 0 for a CPU
  // By backend module (engine_choice.h); only modules that were examined.
  std::map<std::string, LibraryInfo> libraries;
};

// Describes "cpu", "cuda" or "cuda:N", without libraries. Throws an Error if there is no such device.
DeviceInfo find_device_info(const std::string& device);

}  // namespace titans::core
