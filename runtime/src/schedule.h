// Which graph runs next (docs/bundle.md, Schedule).
#pragma once

#include <cstddef>
#include <cstdint>

#include "manifest.h"

namespace titans::core {

// Index of the graph with most tokens that may start at `position` and does not overrun `remaining` >= 1 tokens.
inline std::size_t next_graph(const std::vector<Graph>& graphs, std::uint64_t position, std::size_t remaining) {
  std::size_t index = 0;  // most tokens first; the last one always fits
  while (static_cast<std::size_t>(graphs[index].tokens) > remaining ||
         position % static_cast<std::uint64_t>(graphs[index].align) != 0) {
    ++index;
  }
  return index;
}

}  // namespace titans::core
