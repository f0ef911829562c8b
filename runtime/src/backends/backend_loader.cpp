#include "backends/backend_loader.h"

#include <dlfcn.h>

#include <array>
#include <string_view>

#include "base/error.h"
#include "base/shared_library.h"

namespace titans::core {
namespace {

struct Backend {
  std::string_view name;
  std::string_view devices;  // devices whose plain graphs it runs by default; empty: none
};

constexpr std::array<Backend, 3> kBackends{{{"onnxruntime", "cpu cuda"}, {"tensorrt", ""}, {"tensorrt_rtx", ""}}};

// Resolved at load time: the loader's path may be relative to a folder that the program leaves, or a link whose folder
// has no backends.
const std::filesystem::path kThisLibrary = library_that_holds(reinterpret_cast<const void*>(&default_backend));

}  // namespace

std::string default_backend(const std::string& device_kind) {
  for (const Backend& backend : kBackends) {
    if (backend.devices.find(device_kind) != std::string_view::npos) return std::string(backend.name);
  }
  throw Error(TITANS_UNSUPPORTED, "E0601", "session", text("unknown device kind: ", quoted(device_kind)),
              "open the session on cpu or cuda");
}

void check_backend(const std::string& name) {
  std::string known;
  for (const Backend& backend : kBackends) {
    if (backend.name == name) return;
    known += text(known.empty() ? "" : ", ", backend.name);
  }
  throw Error(TITANS_UNSUPPORTED, "E0602", "session", text("unknown backend: ", quoted(name)),
              text("name one of ", known, ", or omit the backend"));
}

const BackendEntry& load_backend(const std::string& module, const std::filesystem::path& plugin_dir) {
  const std::filesystem::path folder = plugin_dir.empty() ? kThisLibrary.parent_path() : plugin_dir;
  const std::filesystem::path path = folder / ("libtitans_backend_" + module + ".so");
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Error(TITANS_UNSUPPORTED, "E0602", "session",
                text("cannot open the backend library ", path.string(), ": ", ::dlerror()),
                "install the runtime with this backend, or give its folder as plugin_dir");
  }
  const auto entry = reinterpret_cast<BackendEntryFunction>(::dlsym(library, kBackendEntrySymbol));
  if (entry == nullptr || entry()->abi != kBackendAbi) {
    throw Error(TITANS_UNSUPPORTED, "E0603", "session",
                text(path.string(), ": expected backend interface ", kBackendAbi, ", got ",
                     entry == nullptr ? std::string("none") : text(entry()->abi)),
                "install runtime and backend of the same version");
  }
  return *entry();
}

LibraryInfo find_library(const std::string& module, const std::filesystem::path& plugin_dir,
                         const std::string& library) {
  try {
    const BackendEntry& backend = load_backend(module, plugin_dir);
    return backend.find_library == nullptr ? LibraryInfo{} : backend.find_library(library);
  } catch (const Error& error) {
    LibraryInfo info;
    info.why_not = error.problem();
    return info;
  }
}

}  // namespace titans::core
