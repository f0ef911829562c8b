// What a failed call is undone from: copies of those parts of the state in place that it may have overwritten.
//
// The manifest lists when each field of a packed row is written (docs/bundle.md). While a chunk is open, a call changes
// the fields written by every token, a small part, and appends rows that nothing has read yet. So a token within a
// chunk saves the former alone. All other fields are saved when a call completes a chunk. A cache saves the rows that
// the manifest says a token writes.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "backends/backend.h"

namespace titans::core {

// Part of a packed row: words [begin, end).
struct Words {
  std::size_t begin, end;
};

// The parts of a row that every token writes, ascending and disjoint: the whole row for a tensor without chunks.
std::vector<Words> words_written_by_token(const StateTensor& state);

// What has taken the place of buffers that are gone.
using BufferMap = std::map<const Buffer*, Buffer*>;

inline void move_to(const BufferMap& moved, std::vector<Buffer*>& buffers) {
  for (Buffer*& buffer : buffers) {
    if (buffer != nullptr) buffer = moved.at(buffer);
  }
}

class Journal {
 public:
  // `backup` is the journal's own from here on. The buffers outlive it.
  void watch(const StateTensor& state, Buffer& live, Buffer& backup);

  // A change starts, from what the live buffers hold now.
  void begin();
  // Saves what a call that consumes `tokens` >= 1 tokens from `position` on may overwrite, unless this change has saved
  // it before.
  void save_for(std::uint64_t position, std::uint64_t tokens);
  // Saves everything that this change has not saved yet.
  void save_all();
  // Puts back what was saved: the live buffers are as they were when the change started.
  void restore();

  // Goes on with other buffers, which hold the same.
  void move_to(const BufferMap& moved);

 private:
  struct Part {
    std::vector<Stripe> stripes;
    bool saved = false;
  };
  struct Entry {
    Buffer* live;
    Buffer* backup;
    std::uint64_t chunk;  // rows of the stream
    StreamRows rows;
    Part chunkwise;  // written by the token that completes a chunk, and rows of the open chunk
    Part tokenwise;  // written by every token
  };

  struct Cache {
    Buffer* live;
    Buffer* backup;
    std::uint64_t period;  // rows of the stream
    StreamRows rows;
    std::vector<Stripe> places;  // the row of place 0, once for each of the rows that a row of the stream writes
    std::uint64_t begin, end;    // the places that are saved
  };

  static void save(const Entry& entry, Part& part);
  static void save(Cache& cache, std::uint64_t begin, std::uint64_t end);
  void save_for(Cache& cache, std::uint64_t position, std::uint64_t tokens) const;
  static void restore(const Entry& entry, const Part& part);

  std::vector<Entry> entries_;
  std::vector<Cache> caches_;
  std::optional<std::uint64_t> start_;  // the position of this change's first call
};

}  // namespace titans::core
