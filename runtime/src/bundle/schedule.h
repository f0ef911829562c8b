// Which graph runs next (docs/bundle.md, Schedule).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "bundle/manifest.h"

namespace titans::core {

// What a list of graphs needs to be a schedule and does not have, as an error's expectation; empty where it is one: of
// equal tokens no two may start at the same position, and at every position one of a single token may.
std::string missing_of_schedule(const std::vector<Graph>& graphs);

class Schedule {
 public:
  // Of graphs that are a schedule, most tokens first.
  explicit Schedule(const std::vector<Graph>& graphs);

  // Index of the graph with most tokens that may start at `position` and does not overrun `remaining` >= 1 tokens.
  std::size_t next_graph(std::uint64_t position, std::size_t remaining) const {
    std::size_t index = 0;  // most tokens first; of those with a single token one may always start
    while (entries_[index].tokens > remaining || !entries_[index].may_start(position)) ++index;
    return index;
  }

  // Index of the graph of a single token that runs most often where single tokens are fed.
  std::size_t decoding_graph() const { return decoding_graph_; }

 private:
  // Phases that follow each other: from `begin` on, before `end`.
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
    std::vector<Span> spans;  // ascending; mostly one
  };
  std::vector<Entry> entries_;
  std::size_t decoding_graph_ = 0;
};

}  // namespace titans::core
