#include "backend_loader.h"

#include <dlfcn.h>

#include <array>
#include <string_view>

#include "error.h"
#include "shared_library.h"

namespace titans::core {
namespace {

struct Backend {
  std::string_view name;
  std::string_view device;
};

constexpr std::array<Backend, 1> kBackends{{{"onnxruntime", "cpu"}}};

std::string known(std::string_view Backend::* column) {
  std::string out;
  for (const Backend& backend : kBackends) {
    if (!out.empty()) out += ", ";
    out += backend.*column;
  }
  return out;
}

// Found when the library is loaded: the loader's name for it may be relative to a folder that the program leaves, or a
// link whose folder has no backends.
const std::filesystem::path kThisLibrary = library_that_holds(reinterpret_cast<const void*>(&default_backend));

}  // namespace

std::string default_backend(const std::string& device) {
  for (const Backend& backend : kBackends) {
    if (backend.device == device) return std::string(backend.name);
  }
  throw Error(TITANS_UNSUPPORTED, "session", text("a device out of: ", known(&Backend::device)), device,
              "open the session on one of these");
}

const BackendEntry& load_backend(const std::string& name, const std::filesystem::path& plugin_dir) {
  bool is_known = false;
  for (const Backend& backend : kBackends) is_known = is_known || backend.name == name;
  if (!is_known) {
    throw Error(TITANS_UNSUPPORTED, "session", text("a backend out of: ", known(&Backend::name)), name,
                "name one of these, or none to have it chosen by the device");
  }
  const std::filesystem::path folder = plugin_dir.empty() ? kThisLibrary.parent_path() : plugin_dir;
  const std::filesystem::path path = folder / ("libtitans_backend_" + name + ".so");
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Error(TITANS_UNSUPPORTED, "session", text("the backend library ", path.string()), ::dlerror(),
                "install the runtime with this backend, or give its folder as plugin_dir");
  }
  const auto entry = reinterpret_cast<BackendEntryFunction>(::dlsym(library, kBackendEntrySymbol));
  if (entry == nullptr || entry()->abi != kBackendAbi) {
    throw Error(TITANS_UNSUPPORTED, "session", text(path.string(), " with backend interface ", kBackendAbi),
                entry == nullptr ? std::string("no interface") : text(entry()->abi),
                "install runtime and backend of the same version");
  }
  return *entry();
}

}  // namespace titans::core
