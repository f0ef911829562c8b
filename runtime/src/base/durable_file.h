// Files that are there whole or not at all, whenever the process or the machine stops.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include "base/wipe.h"

namespace titans::core {

// Whether a file must outlast a loss of power, which costs waiting for the disk, or only the process.
enum class Durability : std::uint8_t { kPower, kProcess };

// A file being written beside `path` as NAME.tmp, which takes its place when all is written. Without commit() the old
// file stays as it is and the new one goes. Writers of one path wait for each other. What a killed one has left is
// removed by the next. The file is the owner's alone (mode 0600).
class FileAside {
 public:
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

// What a regular file of at most `most` bytes holds.
Bytes read_whole_file(const std::filesystem::path& path, std::uint64_t most);

}  // namespace titans::core
