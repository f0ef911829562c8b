// Locates loaded shared libraries.
#pragma once

#include <filesystem>

namespace titans::core {

// The file of the library that contains `symbol`, with links resolved; empty if unknown. Call this while the library is
// being loaded: the loader's path may be relative to a folder that the program leaves later.
std::filesystem::path library_that_holds(const void* symbol) noexcept;

}  // namespace titans::core
