// What this machine has: the device that a session is to run on.
#pragma once

#include <map>
#include <string>

#include "backends/backend.h"

namespace titans::core {

struct DeviceInfo {
  std::string kind;      // "cpu" or "cuda"
  std::string name;      // as the vendor has it, empty for a cpu
  std::string platform;  // "linux-aarch64"
  int sm = 0;            // compute capability times 10, 0 for a cpu
  int driver = 0;        // cuDriverGetVersion, 0 for a cpu
  // By the module of the backend (engine_choice.h), for those that somebody asked about.
  std::map<std::string, LibraryInfo> libraries;
};

// Of "cpu", "cuda" or "cuda:N", without libraries. An Error where there is no such device.
DeviceInfo find_device_info(const std::string& device);

}  // namespace titans::core
