// Which of a bundle's engines runs on a device, and why the others do not. Nothing of an engine is opened for that: one
// that is made for something else must not be, as what its vendor's library then does is not ours to know.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "bundle/manifest.h"
#include "session/device.h"

namespace titans::core {

struct EngineRequest {
  std::string bundle;         // its path, for commands in error texts
  std::string device;         // as the caller named it
  std::string engine;         // to insist on, "none" for the plain graphs, empty: any
  std::string backend;        // to insist on, empty: any
  std::string memory_kernel;  // "auto", "require", "off"
};

struct EngineChoice {
  const EngineRecord* engine = nullptr;                     // NULL: the plain graphs
  std::string backend;                                      // that opens it, as users know it
  std::string module;                                       // of the backend: libtitans_backend_MODULE.so
  std::string reason;                                       // one sentence without an end
  std::vector<std::pair<std::string, std::string>> others;  // engines that were not chosen: name and reason
};

// The backend's library for an engine: one serves one major version of TensorRT.
std::string module_of(const EngineRecord& engine);

// The modules of those engines that the device itself fits, for DeviceInfo::libraries: they alone need to be opened.
std::vector<std::string> modules_to_look_at(const Manifest& manifest, const DeviceInfo& device_info,
                                            const EngineRequest& request);

// Throws where the engine that the request names does not fit the device, and where the bundle has engines for devices
// of that kind other than a cpu and none fits this one: the plain graphs are a request of their own then, as they may
// be much slower. `plain_backend` opens the plain graphs.
EngineChoice choose_engine(const Manifest& manifest, const DeviceInfo& device_info, const EngineRequest& request,
                           const std::string& plain_backend);

}  // namespace titans::core
