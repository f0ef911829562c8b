#include "backends/tensorrt/plugin_library.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstring>

#include "backends/tensorrt/vendor.h"
#include "base/error.h"
#include "base/shared_library.h"

namespace titans::core {
namespace {

constexpr std::string_view kPluginName = "NeuralMemory";

const std::filesystem::path kThisLibrary = library_that_holds(reinterpret_cast<const void*>(&find_plugin_library));

// The version of the NeuralMemory creator; empty if the library has none.
std::string version_in(void* library) {
  using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(std::int32_t& count);
  const auto get_creators = reinterpret_cast<GetCreators>(::dlsym(library, "getCreators"));
  if (get_creators == nullptr) return {};
  std::int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* creators = get_creators(count);
  for (std::int32_t i = 0; i < count; ++i) {
    const nvinfer1::InterfaceInfo info = creators[i]->getInterfaceInfo();
    if (info.kind == nullptr || std::strcmp(info.kind, "PLUGIN CREATOR_V3ONE") != 0) continue;
    const auto& creator = *static_cast<const nvinfer1::IPluginCreatorV3One*>(creators[i]);
    if (creator.getPluginName() == kPluginName) return creator.getPluginVersion();
  }
  return {};
}

}  // namespace

PluginLibrary find_plugin_library() {
  PluginLibrary found;
  if (!kTakesPlugins) {
    found.why_not = text(kVendor, ", which takes no plugins");
    return found;
  }
  found.path = kThisLibrary.parent_path() / text("libtitans_tensorrt_plugin_", kVendorMajor, ".so");
  void* library = ::dlopen(found.path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    found.why_not = ::dlerror();
    return found;
  }
  found.version = version_in(library);
  if (found.version.empty()) found.why_not = text(found.path.string(), " without that plugin");
  return found;
}

}  // namespace titans::core
