// What a failed call is undone from: copies of those parts of the state in place that it may have overwritten.
//
// While a chunk is open a call changes only the coefficients at the end of each packed row, and appends to the rows of
// the chunk beyond its fill, where nothing is read that the position does not say is there. W and S change when a chunk
// is complete (docs/operator.md). So a token within a chunk costs a copy of the coefficients, which are a small part.
// Rows with one gate a chunk have no coefficients, and cost nothing then. Of a cache whose manifest says which rows a
// token writes, those rows are saved.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "backends/backend.h"

namespace titans::core {

// The part of a packed row that its open chunk has: the coefficients of its tokens.
struct OpenChunk {
  std::size_t rows;          // of the stream
  std::size_t coefficients;  // where they start in a row, in elements
};

// What the layout says of the open chunk; nothing unless it is a packed row that ends with e, a, m, f and beta, one
// after the other, perhaps a count of chunk_updates, and has everything else before them.
std::optional<OpenChunk> find_open_chunk(const StateTensor& state);

// The rows of the stream after which a memory changes; 1 where nothing says so.
std::uint64_t rows_of_chunk(const StateTensor& state);

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
    Stripe stripe;
    bool saved;
  };
  struct Entry {
    Buffer* live;
    Buffer* backup;
    std::uint64_t chunk;  // rows of the stream
    StreamRows rows;
    Part chunkwise;  // changes with the token that completes a chunk; up to the coefficients
    Part tokenwise;  // changes with every token; from the coefficients on
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
