#include "state/spill_folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/file_descriptor.h"
#include "base/forks.h"
#include "base/log.h"
#include "base/wipe.h"
#include "state/state_file.h"

namespace titans::core {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "titans-spill-";
constexpr const char* kLock = "lock";
constexpr int kAttempts = 100;

bool starts_with(std::string_view name, std::string_view start) { return name.substr(0, start.size()) == start; }

bool ends_with(std::string_view name, std::string_view end) {
  return name.size() >= end.size() && name.substr(name.size() - end.size()) == end;
}

// Opens a folder without following a link, because others may write to the parent.
FileDescriptor open_folder(const fs::path& path) {
  return FileDescriptor(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
}

// Takes the folder's lock; `flags` may allow creating it. Returns -1 with errno if it is missing or held by another
// process.
int take_lock(const FileDescriptor& folder, int flags) {
  const int lock = open_unshared(
      [&] { return ::openat(folder.get(), kLock, O_RDWR | O_CLOEXEC | O_NOFOLLOW | flags, S_IRUSR | S_IWUSR); });
  if (lock < 0) return -1;
  struct stat status{};
  // An unlinked lock belongs to a folder that is being removed.
  if (::flock(lock, LOCK_EX | LOCK_NB) == 0 && ::fstat(lock, &status) == 0 && status.st_nlink > 0) return lock;
  close_unshared(lock);
  errno = EWOULDBLOCK;
  return -1;
}

// Removes our files, and no others, from a folder whose lock we hold; the lock last. The next session retries files
// that cannot be removed.
void remove_folder(const fs::path& path, const FileDescriptor& folder) {
  const int own = ::dup(folder.get());
  DIR* listing = own < 0 ? nullptr : ::fdopendir(own);
  if (listing == nullptr) {
    if (own >= 0) ::close(own);
    return;
  }
  std::vector<std::string> names;
  while (const dirent* entry = ::readdir(listing)) names.emplace_back(entry->d_name);
  ::closedir(listing);
  for (const std::string& name : names) {
    if (ends_with(name, ".tstate") || ends_with(name, ".tstate.tmp")) ::unlinkat(folder.get(), name.c_str(), 0);
  }
  ::unlinkat(folder.get(), kLock, 0);
  ::rmdir(path.c_str());
}

// Removes the folder if its process has ended.
void remove_leftover(const fs::path& path) {
  const FileDescriptor folder = open_folder(path);
  struct stat status{};
  if (folder.get() < 0 || ::fstat(folder.get(), &status) != 0 || status.st_uid != ::geteuid()) return;
  const int lock = take_lock(folder, 0);
  if (lock >= 0) {
    log(TITANS_LOG_INFO, "spill", text("removing what a session that did not end has left: ", path.string()));
    remove_folder(path, folder);
    close_unshared(lock);
  } else if (errno == ENOENT) {
    ::rmdir(path.c_str());  // its process ended before locking it, or will create another
  }
}

void remove_leftovers(const fs::path& parent) {
  std::error_code ignored;
  std::vector<fs::path> folders;
  for (fs::directory_iterator entry(parent, ignored), end; !ignored && entry != end; entry.increment(ignored)) {
    if (starts_with(entry->path().filename().string(), kPrefix)) folders.push_back(entry->path());
  }
  for (const fs::path& folder : folders) remove_leftover(folder);
}

}  // namespace

SpillFolder::SpillFolder(const fs::path& parent) : key_(make_key()), process_(::getpid()) {
  std::error_code ignored;
  if (!fs::is_directory(parent, ignored)) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0502", "spill", text("spill_dir is not a folder: ", quoted(parent.string())),
                "create the folder first");
  }
  remove_leftovers(parent);
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    if (make_own(parent)) return;
  }
  throw Error(TITANS_FAILED, "E0411", "spill", text("cannot lock a file in ", parent.string()),
              "choose a spill_dir on a local disk");
}

// True if the folder exists and is locked. Until it is locked, another session may take it for a dead process's folder.
bool SpillFolder::make_own(const fs::path& parent) {
  std::string pattern = (fs::absolute(parent) / (std::string(kPrefix) + "XXXXXX")).string();
  if (::mkdtemp(pattern.data()) == nullptr) {
    throw Error(TITANS_FAILED, "E0411", "spill",
                text("cannot create a folder in ", parent.string(), ": ", std::generic_category().message(errno)),
                "check spill_dir and its permissions");
  }
  path_ = pattern;
  const FileDescriptor folder = open_folder(path_);
  lock_ = folder.get() < 0 ? -1 : take_lock(folder, O_CREAT | O_EXCL);
  if (lock_ >= 0) return true;
  if (folder.get() >= 0) ::unlinkat(folder.get(), kLock, 0);
  ::rmdir(path_.c_str());
  return false;
}

SpillFolder::~SpillFolder() {
  if (::getpid() == process_) {
    try {
      const FileDescriptor folder = open_folder(path_);
      if (folder.get() >= 0) remove_folder(path_, folder);
    } catch (const std::exception&) {  // out of memory for names: the next session removes the rest
    }
  }
  if (lock_ >= 0) close_unshared(lock_);
}

void SpillFolder::WipingDelete::operator()(StateKey* key) const noexcept {
  wipe(key->data(), key->size());
  delete key;
}

SpillFolder::Key SpillFolder::make_key() {
  if (!has_crypto()) {
    log(TITANS_LOG_WARNING, "spill", "no libcrypto on this machine: states are spilled as they are, not encrypted");
    return nullptr;
  }
  Key key(new StateKey{});
  fill_random(key->data(), key->size());
  return key;
}

fs::path SpillFolder::file(std::uint64_t id, std::size_t part) const { return path_ / text(id, '-', part, ".tstate"); }

void SpillFolder::write(const StateSchema& schema, std::uint64_t id, std::size_t part, const StreamState& state) const {
  save_state(file(id, part), schema, state, key_.get(), Durability::kProcess);
}

StreamState SpillFolder::read(const StateSchema& schema, std::uint64_t id, std::size_t part) const {
  return load_state(file(id, part), schema, key_.get());
}

void SpillFolder::remove(std::uint64_t id, std::size_t part) const noexcept {
  if (::getpid() != process_) return;
  try {
    ::unlink(file(id, part).c_str());
  } catch (const std::exception&) {  // out of memory for the name: removed with the folder
  }
}

}  // namespace titans::core
