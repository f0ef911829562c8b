#include "bundle/schedule.h"

#include <numeric>
#include <set>
#include <utility>

#include "base/error.h"

namespace titans::core {
namespace {

// Limits the common period of single-token graphs. No model needs longer ones, and checking them is slow.
constexpr std::int64_t kLongestPeriod = std::int64_t{1} << 20;

// True if both may start at the same position, which requires offsets equal modulo the gcd of the strides.
bool meet(const Graph& a, const Graph& b) {
  const std::int64_t common = std::gcd(a.stride, b.stride);
  std::set<std::int64_t> residues;
  for (const std::int64_t offset : a.offsets) residues.insert(offset % common);
  for (const std::int64_t offset : b.offsets) {
    if (residues.count(offset % common) != 0) return true;
  }
  return false;
}

}  // namespace

std::string missing_of_schedule(const std::vector<Graph>& graphs) {
  for (std::size_t i = 0; i < graphs.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      if (graphs[i].tokens == graphs[j].tokens && meet(graphs[i], graphs[j])) {
        return text("no two graphs of equal tokens at one position, but ", graphs[j].name, " and ", graphs[i].name,
                    " share one");
      }
    }
  }
  std::int64_t period = 1;
  for (const Graph& graph : graphs) {
    if (graph.tokens != 1) continue;
    // Two factors of at most 2^20 cannot overflow.
    period = graph.stride > kLongestPeriod ? graph.stride : std::lcm(period, graph.stride);
    if (period > kLongestPeriod) {
      return text("graphs with tokens = 1 that repeat within ", kLongestPeriod, " positions");
    }
  }
  std::vector<bool> served(static_cast<std::size_t>(period), false);
  for (const Graph& graph : graphs) {
    if (graph.tokens != 1) continue;
    for (const std::int64_t offset : graph.offsets) {
      for (std::int64_t at = offset; at < period; at += graph.stride) served[static_cast<std::size_t>(at)] = true;
    }
  }
  for (std::size_t at = 0; at < served.size(); ++at) {
    if (!served[at]) {
      return text("a graph with tokens = 1 at every position, also at ", at, " modulo ", period);
    }
  }
  return {};
}

Schedule::Schedule(const std::vector<Graph>& graphs) {
  double most = 0.0;
  for (const Graph& graph : graphs) {
    const double share = static_cast<double>(graph.offsets.size()) / static_cast<double>(graph.stride);
    if (graph.tokens == 1 && share > most) {
      most = share;
      decoding_graph_ = entries_.size();
    }
    Entry entry{static_cast<std::uint64_t>(graph.tokens), static_cast<std::uint64_t>(graph.stride), {}};
    for (const std::int64_t offset : graph.offsets) {
      const auto begin = static_cast<std::uint64_t>(offset);
      if (!entry.spans.empty() && entry.spans.back().end == begin) {
        ++entry.spans.back().end;
      } else {
        entry.spans.push_back({begin, begin + 1});
      }
    }
    entries_.push_back(std::move(entry));
  }
}

}  // namespace titans::core
