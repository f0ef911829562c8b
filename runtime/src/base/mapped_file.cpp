#include "base/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <vector>

#include "base/error.h"
#include "base/file_descriptor.h"
#include "base/xxh3.h"

namespace titans::core {
namespace {

constexpr std::size_t kHashBlock = std::size_t{8} << 20;  // a multiple of every page size

// The range starts on a page. A failure costs memory only.
void release_pages(const std::byte* data, std::size_t bytes) {
  ::madvise(const_cast<std::byte*>(data), bytes, MADV_DONTNEED);
}

[[noreturn]] void fail(const std::filesystem::path& path, std::string_view why) {
  throw Error(TITANS_FAILED, "E0206", "bundle", text("cannot read ", path.string(), ": ", why),
              "copy or export the bundle again");
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  // Without O_NONBLOCK a named pipe would block here forever.
  const FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (file.get() < 0) fail(path, errno == ELOOP ? "a symbolic link" : std::generic_category().message(errno));
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) fail(path, std::generic_category().message(errno));
  if (!S_ISREG(status.st_mode)) fail(path, "not a regular file");
  if (status.st_size == 0) return;  // mmap rejects an empty range
  size_ = static_cast<std::size_t>(status.st_size);
  void* address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (address == MAP_FAILED) fail(path, std::generic_category().message(errno));
  data_ = static_cast<const std::byte*>(address);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

std::string MappedFile::hash() const {
  std::vector<XXH3_state_t> state(1);  // too large for a stack, and aligned by its type
  XXH3_128bits_reset(state.data());
  for (std::size_t at = 0; at < size_; at += kHashBlock) {
    const std::size_t bytes = std::min(kHashBlock, size_ - at);
    XXH3_128bits_update(state.data(), data_ + at, bytes);
    release_pages(data_ + at, bytes);
  }
  return hex_digits(XXH3_128bits_digest(state.data()));
}

void MappedFile::release() const {
  if (data_ != nullptr) release_pages(data_, size_);
}

}  // namespace titans::core
