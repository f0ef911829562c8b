// Recorded calls. What is recorded reads and writes the very addresses that it was recorded with, so each set of them
// has its own: one for a stream whose state is in place, up to six for one whose buffers swap.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "cuda/objects.h"

namespace titans::core {

class Captures {
 public:
  using Key = std::vector<CUdeviceptr>;

  // The recording for these addresses; NULL where there is none yet, and `wanted` says whether to make one: from the
  // second call on, as the first has to run without. A full store makes room only where a recording has long not been
  // used: with many streams some stay recorded and the others do without.
  cuda::GraphExec* find(const Key& key, bool& wanted);
  void add(const Key& key, std::unique_ptr<cuda::GraphExec> recording);

  std::size_t size() const { return recordings_.size(); }

 private:
  static constexpr std::size_t kMost = 64;
  static constexpr std::uint64_t kLongUnused = 1024;  // calls

  struct Recording {
    std::unique_ptr<cuda::GraphExec> exec;
    std::uint64_t used;
  };

  bool has_room() const;

  std::uint64_t calls_ = 0;
  std::map<Key, Recording> recordings_;
  std::map<Key, std::uint64_t> seen_;  // without a recording, and when
};

}  // namespace titans::core
