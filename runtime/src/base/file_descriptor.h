// A file descriptor closed by its destructor.
#pragma once

#include <unistd.h>

#include <utility>

namespace titans::core {

class FileDescriptor {
 public:
  // Negative values are allowed: open() returns them on failure.
  explicit FileDescriptor(int descriptor) : descriptor_(descriptor) {}
  ~FileDescriptor() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return descriptor_; }
  int release() { return std::exchange(descriptor_, -1); }

 private:
  int descriptor_;
};

}  // namespace titans::core
