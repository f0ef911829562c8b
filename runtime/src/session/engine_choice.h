// Chooses the engine of a bundle for a device and reports why others do not fit. No engine is opened for that, because
// a vendor library may fail in any way on an engine for another device.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "bundle/manifest.h"
#include "session/device.h"

namespace titans::core {

struct EngineRequest {
  std::string bundle;         // path, for commands in error texts
  std::string device;         // as given by the caller
  std::string engine;         // required engine; "none": the plain graphs; empty: any
  std::string backend;        // required backend; empty: any
  std::string memory_kernel;  // "auto", "require", "off"
};

struct EngineChoice {
  const EngineRecord* engine = nullptr;                     // NULL: the plain graphs
  std::string backend;                                      // public name of the backend
  std::string module;                                       // its library: libtitans_backend_MODULE.so
  std::string reason;                                       // one sentence without its period
  std::vector<std::pair<std::string, std::string>> others;  // name and reason of each engine not chosen
};

// The backend module for an engine. Each module serves one major version of TensorRT.
std::string module_of(const EngineRecord& engine);

// The modules of engines that fit the device itself. Only these need to be examined for DeviceInfo::libraries.
std::vector<std::string> modules_to_look_at(const Manifest& manifest, const DeviceInfo& device_info,
                                            const EngineRequest& request);

// Throws an Error if the requested engine does not fit the device. Also throws if the bundle has engines for a GPU of
// this kind and none fits: the plain graphs may be much slower, so they must be requested explicitly. `plain_backend`
// opens the plain graphs.
EngineChoice choose_engine(const Manifest& manifest, const DeviceInfo& device_info, const EngineRequest& request,
                           const std::string& plain_backend);

}  // namespace titans::core
