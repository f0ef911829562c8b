// A session's private folder for spilled states.
//
// The folder is PARENT/titans-spill-XXXXXX, with a unique name. It holds state files, encrypted with a key that exists
// only in this process's memory, and a file "lock", which is locked while the process lives. Files left by a killed
// process are unreadable. The next session with the same parent removes them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>

#include "state/state_crypto.h"
#include "state/state_schema.h"
#include "state/stream_state.h"

namespace titans::core {

class SpillFolder {
 public:
  explicit SpillFolder(const std::filesystem::path& parent);
  // Removes the folder.
  ~SpillFolder();
  SpillFolder(const SpillFolder&) = delete;
  SpillFolder& operator=(const SpillFolder&) = delete;

  // Writes part `part` of stream `id`, which is unique in this folder. A failed write leaves no file.
  void write(const StateSchema& schema, std::uint64_t id, std::size_t part, const StreamState& state) const;
  StreamState read(const StateSchema& schema, std::uint64_t id, std::size_t part) const;
  void remove(std::uint64_t id, std::size_t part) const noexcept;

  const std::filesystem::path& path() const { return path_; }
  bool encrypted() const { return key_ != nullptr; }

 private:
  struct WipingDelete {
    void operator()(StateKey* key) const noexcept;
  };
  using Key = std::unique_ptr<StateKey, WipingDelete>;
  static Key make_key();
  bool make_own(const std::filesystem::path& parent);
  std::filesystem::path file(std::uint64_t id, std::size_t part) const;

  Key key_;  // NULL without libcrypto
  std::filesystem::path path_;
  int lock_ = -1;
  int process_ = 0;  // after fork() the folder belongs to the parent
};

}  // namespace titans::core
