// A folder of a session's own for states that are not in memory.
//
// It is PARENT/titans-spill-XXXXXX, with a name that no other process has, and holds state files, encrypted with a key
// that is only in this process's memory, and the file "lock", which is locked as long as the process lives. What a
// killed one has left can be read by nobody, and goes when the next session opens with the same parent.
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

  // Part `part` of what a stream keeps, whose `id` is of this folder alone. What fails leaves no file.
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

  Key key_;  // NULL where the machine has no libcrypto
  std::filesystem::path path_;
  int lock_ = -1;
  int process_ = 0;  // of a fork()'s two, the folder is the parent's
};

}  // namespace titans::core
