// Where a shared library lies that is loaded.
#pragma once

#include <filesystem>

namespace titans::core {

// The file of the library that holds `symbol`, links resolved; empty where the loader does not know. To be asked while
// that library is being loaded: the loader's name for it may be relative to a folder that the program leaves later.
std::filesystem::path library_that_holds(const void* symbol) noexcept;

}  // namespace titans::core
