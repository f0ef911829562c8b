#include "base/durable_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <thread>
#include <utility>

#include "base/error.h"
#include "base/file_descriptor.h"
#include "base/forks.h"

namespace titans::core {
namespace {

constexpr int kAttempts = 100;
// Linux limits read and write to slightly less than 2 GiB per call.
constexpr std::size_t kMostAtOnce = std::size_t{1} << 30;

std::string name_of(const std::filesystem::path& path) { return path.filename().string(); }

std::string reason(int error) { return std::generic_category().message(error); }

// Retries a call interrupted by a signal.
template <typename Call>
auto uninterrupted(Call&& call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

std::string_view fix_for(int error) {
  switch (error) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return "free disk space and save again; the previous file is intact";
    case ENOENT:
    case ENOTDIR:
      return "create the folder first";
    default:
      return "check the folder and its permissions; the previous file is intact";
  }
}

// Waits for another writer of this file. False if the writer takes too long. Without file locks there is no waiting.
bool lock(int descriptor) {
  constexpr std::chrono::milliseconds kPause{5};
  const auto end = std::chrono::steady_clock::now() + FileAside::patience;
  while (uninterrupted([&] { return ::flock(descriptor, LOCK_EX | LOCK_NB); }) != 0) {
    if (errno != EWOULDBLOCK) return true;
    if (std::chrono::steady_clock::now() >= end) return false;
    std::this_thread::sleep_for(kPause);
  }
  return true;
}

// True if the descriptor's file still has a name. Another writer may have removed it as abandoned before it was locked.
bool has_name(int descriptor) {
  struct stat status{};
  return ::fstat(descriptor, &status) == 0 && status.st_nlink > 0;
}

// Removes the file `aside` after its writer has finished or died, unless it was renamed meanwhile. False if the writer
// takes too long.
bool remove_abandoned(const std::filesystem::path& aside) {
  const int descriptor =
      open_unshared([&] { return ::open(aside.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK); });
  struct stat held{};
  struct stat named{};
  bool same = true;
  if (descriptor >= 0) {
    if (!lock(descriptor)) {
      close_unshared(descriptor);
      return false;
    }
    same = ::fstat(descriptor, &held) == 0 && ::lstat(aside.c_str(), &named) == 0 && held.st_ino == named.st_ino &&
           held.st_dev == named.st_dev;
  } else if (errno == ENOENT) {
    return true;
  }
  if (same) ::unlink(aside.c_str());
  if (descriptor >= 0) close_unshared(descriptor);
  return true;
}

}  // namespace

FileAside::FileAside(std::filesystem::path path, Durability durability)
    : path_(std::move(path)), aside_(path_), durability_(durability) {
  if (path_.filename().empty()) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0501", "state", text("path without a file name: ", quoted(path_.string())),
                "give the path of a file, such as NAME.tstate");
  }
  aside_ += ".tmp";
  open_locked();
}

FileAside::~FileAside() {
  if (descriptor_ < 0) return;
  ::unlink(aside_.c_str());
  close_unshared(descriptor_);
}

void FileAside::open_locked() {
  int error = EEXIST;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const int descriptor = uninterrupted([&] {
      return open_unshared([&] {
        return ::open(aside_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, S_IRUSR | S_IWUSR);
      });
    });
    error = errno;
    if (descriptor >= 0) {
      if (lock(descriptor) && has_name(descriptor)) {
        descriptor_ = descriptor;
        return;
      }
      close_unshared(descriptor);
    } else if (error == EEXIST) {
      if (!remove_abandoned(aside_)) {
        throw Error(TITANS_FAILED, "E0412", name_of(path_),
                    text("another writer has held ", name_of(aside_), " for ", patience.count() / 1000, " seconds"),
                    "end the other process, then save again");
      }
    } else {
      break;
    }
  }
  fail(text("cannot create ", name_of(aside_)), error);
}

void FileAside::append(const void* data, std::size_t bytes) {
  const auto* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = uninterrupted([&] { return ::write(descriptor_, at, std::min(bytes, kMostAtOnce)); });
    if (written <= 0) fail("cannot write the state", written == 0 ? ENOSPC : errno);
    at += written;
    bytes -= static_cast<std::size_t>(written);
  }
}

void FileAside::commit() {
  const bool sync = durability_ == Durability::kPower;
  if (sync && uninterrupted([&] { return ::fsync(descriptor_); }) != 0) fail("cannot flush the file to disk", errno);
  if (::rename(aside_.c_str(), path_.c_str()) != 0)
    fail(text("cannot rename ", name_of(aside_), " to ", name_of(path_)), errno);
  // Closed after the rename, so the lock lasts as long as the name NAME.tmp.
  const int closed = close_unshared(std::exchange(descriptor_, -1));
  if (closed != 0 && errno != EINTR) fail_in_place("cannot close the file", errno);
  if (!sync) return;
  const std::filesystem::path folder = path_.has_parent_path() ? path_.parent_path() : std::filesystem::path(".");
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  // A folder without read permission cannot be synchronised; some file systems support no folder sync.
  if (descriptor < 0) return;
  const int synced = uninterrupted([&] { return ::fsync(descriptor); });
  const int error = errno;
  ::close(descriptor);
  if (synced != 0 && error != EINVAL && error != ENOTSUP) fail_in_place("cannot flush the folder to disk", error);
}

void FileAside::fail_in_place(std::string_view problem, int error) const {
  throw Error(TITANS_FAILED, "E1001", name_of(path_), text(problem, ": ", reason(error)),
              "save again; the new file has its name, but a loss of power may undo that");
}

void FileAside::fail(std::string_view problem, int error) const {
  throw Error(TITANS_FAILED, "E1001", name_of(path_), text(problem, ": ", reason(error)), fix_for(error));
}

Bytes read_whole_file(const std::filesystem::path& path, std::uint64_t most) {
  const auto fail = [&](std::string_view why) {
    throw Error(TITANS_FAILED, "E1001", name_of(path), text("cannot read ", path.string(), ": ", why),
                "check the path");
  };
  // Without O_NONBLOCK a named pipe would block here forever.
  const FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) fail(reason(errno));
  struct stat status{};
  if (::fstat(file.get(), &status) != 0) fail(reason(errno));
  if (!S_ISREG(status.st_mode)) fail("not a regular file");
  const auto size = static_cast<std::uint64_t>(status.st_size);
  if (size > most) {
    throw Error(TITANS_FAILED, "E0407", name_of(path),
                text("expected a state of at most ", most, " bytes, got ", size, " bytes"),
                "give a state file of this model");
  }
  Bytes content(static_cast<std::size_t>(size));
  std::size_t done = 0;
  while (done < content.size()) {
    const ssize_t got = uninterrupted(
        [&] { return ::read(file.get(), content.data() + done, std::min(content.size() - done, kMostAtOnce)); });
    if (got < 0) fail(reason(errno));
    if (got == 0) break;  // truncated meanwhile; the caller's checks detect it
    done += static_cast<std::size_t>(got);
  }
  content.resize(done);
  return content;
}

}  // namespace titans::core
