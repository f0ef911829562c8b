// Files that are replaced atomically, also if the process or machine stops.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include "base/wipe.h"

namespace titans::core {

// Whether a file must survive power loss, which requires waiting for the disk, or only process exit.
enum class Durability : std::uint8_t { kPower, kProcess };

// Writes NAME.tmp beside `path` and renames it into place atomically in commit(). Without commit() the old file stays
// and the new one is removed. Writers of one path wait for each other, up to `patience`. A writer removes what a killed
// one left. The file mode is 0600. Children of fork() do not inherit the lock.
class FileAside {
 public:
  // How long a writer waits for another one of the same path.
  static inline std::chrono::milliseconds patience{60'000};

  FileAside(std::filesystem::path path, Durability durability);
  ~FileAside();
  FileAside(const FileAside&) = delete;
  FileAside& operator=(const FileAside&) = delete;

  void append(const void* data, std::size_t bytes);
  void commit();

 private:
  [[noreturn]] void fail(std::string_view problem, int error) const;
  [[noreturn]] void fail_in_place(std::string_view problem, int error) const;
  void open_locked();

  std::filesystem::path path_;
  std::filesystem::path aside_;
  Durability durability_;
  int descriptor_ = -1;
};

// The content of a regular file of at most `most` bytes.
Bytes read_whole_file(const std::filesystem::path& path, std::uint64_t most);

}  // namespace titans::core
