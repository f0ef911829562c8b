// Selects the next graph (docs/bundle.md, Schedule).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "bundle/manifest.h"

namespace titans::core {

// Why a list of graphs is not a schedule, as the expectation of an error; empty if it is one. Graphs with equal tokens
// must not start at the same position. At every position a single-token graph must be able to start.
std::string missing_of_schedule(const std::vector<Graph>& graphs);

class Schedule {
 public:
  // Requires graphs that form a schedule, most tokens first.
  explicit Schedule(const std::vector<Graph>& graphs);

  // Index of the graph with most tokens that may start at `position` and consumes at most `remaining` >= 1 tokens.
  std::size_t next_graph(std::uint64_t position, std::size_t remaining) const {
    std::size_t index = 0;  // most tokens first; a single-token graph can always start
    while (entries_[index].tokens > remaining || !entries_[index].may_start(position)) ++index;
    return index;
  }

  // Index of the decode graph: the single-token graph that runs most often in decoding.
  std::size_t decoding_graph() const { return decoding_graph_; }

 private:
  // Consecutive offsets [begin, end).
  struct Span {
    std::uint64_t begin;
    std::uint64_t end;
  };
  struct Entry {
    bool may_start(std::uint64_t position) const {
      const std::uint64_t offset = position % stride;
      for (const Span& span : spans) {
        if (offset < span.end) return offset >= span.begin;
      }
      return false;
    }

    std::uint64_t tokens;
    std::uint64_t stride;
    std::vector<Span> spans;  // ascending; usually one
  };
  std::vector<Entry> entries_;
  std::size_t decoding_graph_ = 0;
};

}  // namespace titans::core
