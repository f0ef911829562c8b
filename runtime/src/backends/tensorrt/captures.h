// Captured CUDA graphs of calls. A capture is bound to its buffer addresses, so each set of addresses needs its own:
// one for a stream with state in place, up to six for a stream with swapped buffers.
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

  // The recording for these addresses, or NULL. `wanted` is set if the caller should record one, which is from the
  // second call on because the first must run normally. A full store replaces only recordings unused for a long time.
  // With many streams, some stay recorded and the others run normally.
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
  std::map<Key, std::uint64_t> seen_;  // addresses without a recording, and their last call
};

}  // namespace titans::core
