// Undo data for a failed call: copies of the parts of in-place state that the call may overwrite.
//
// The manifest lists when each field of a packed row is written (docs/bundle.md). A call within a chunk changes the
// fields written by every token, which are small, and one row for each token in the fields of the open chunk. Nothing
// reads these rows before the chunk ends, but a failed call must leave no trace of its tokens, so both are saved. A
// call that completes a chunk saves all other fields too. A cache saves the rows that the manifest lists for the tokens
// of the call.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "backends/backend.h"

namespace titans::core {

// Words [begin, end) of a packed row.
struct Words {
  std::size_t begin, end;
};

// The ranges of a row that every token writes, ascending and disjoint. The whole row if the tensor has no chunks.
std::vector<Words> words_written_by_token(const StateTensor& state);

// Maps replaced buffers to their successors.
using BufferMap = std::map<const Buffer*, Buffer*>;

inline void move_to(const BufferMap& moved, std::vector<Buffer*>& buffers) {
  for (Buffer*& buffer : buffers) {
    if (buffer != nullptr) buffer = moved.at(buffer);
  }
}

class Journal {
 public:
  // The journal owns the content of `backup` from here on. Both buffers must outlive the journal.
  void watch(const StateTensor& state, Buffer& live, Buffer& backup);

  // Starts a change from the current content of the live buffers.
  void begin();
  // Saves the parts that a call of `tokens` >= 1 tokens at `position` may overwrite, unless this change has saved them
  // already.
  void save_for(std::uint64_t position, std::uint64_t tokens);
  // Saves all parts that this change has not saved yet.
  void save_all();
  // Restores the live buffers to their content at the start of the change.
  void restore();

  // Switches to other buffers with the same content.
  void move_to(const BufferMap& moved);

 private:
  struct Part {
    std::vector<Stripe> stripes;
    bool saved = false;
  };
  // A field of the open chunk, whose row i the i-th token of a chunk writes.
  struct RowField {
    std::size_t offset, words;  // within a packed row
    std::size_t elements;       // of one row; 0: rows cannot be told apart, so all are saved at once
    bool halves;                // elements of 16 bits
  };
  struct Entry {
    Buffer* live;
    Buffer* backup;
    std::uint64_t chunk;  // in stream rows
    StreamRows rows;
    Part chunkwise;  // written by the token that completes a chunk
    Part tokenwise;  // written by every token
    std::vector<RowField> row_fields;
    std::size_t pitch = 0, heads = 0;  // of the packed rows
    std::uint64_t begin = 0, end = 0;  // the saved rows of the open chunk
  };

  struct Cache {
    Buffer* live;
    Buffer* backup;
    std::uint64_t period;  // in stream rows
    StreamRows rows;
    std::vector<Stripe> places;  // the row of place 0, once per row that a stream row writes
    std::uint64_t begin, end;    // the saved places
  };

  static void save(const Entry& entry, Part& part);
  static void save(Cache& cache, std::uint64_t begin, std::uint64_t end);
  void save_for(Cache& cache, std::uint64_t position, std::uint64_t tokens) const;
  static void save_rows(Entry& entry, std::uint64_t begin, std::uint64_t end);
  void save_rows_for(Entry& entry, std::uint64_t position, std::uint64_t tokens) const;
  static void restore(const Entry& entry, const Part& part);
  static void restore_rows(const Entry& entry);

  std::vector<Entry> entries_;
  std::vector<Cache> caches_;
  std::optional<std::uint64_t> start_;  // position of this change's first call
};

}  // namespace titans::core
