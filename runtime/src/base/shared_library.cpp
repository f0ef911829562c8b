#include "base/shared_library.h"

#include <dlfcn.h>

#include <system_error>

namespace titans::core {

std::filesystem::path library_that_holds(const void* symbol) noexcept {
  Dl_info info{};
  if (::dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) return {};
  try {
    std::error_code unresolved;  // the loader's path is used then
    const std::filesystem::path path(info.dli_fname);
    const std::filesystem::path resolved = std::filesystem::canonical(path, unresolved);
    return unresolved ? path : resolved;
  } catch (...) {
    return {};  // out of memory at startup: the loader's search path remains
  }
}

}  // namespace titans::core
