// A file mapped read-only into memory.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

namespace titans::core {

class MappedFile {
 public:
  // Rejects symbolic links and everything except regular files.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

  // XXH3-128 of the content as 32 hexadecimal digits. Keeps only a few pages in memory at a time.
  std::string hash() const;

  // Gives the mapping's pages back. Later reads map them again, usually from the page cache.
  void release() const;

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace titans::core
