#include "stream/sampler.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "stream/outputs.h"

namespace titans::core {
namespace {

void require(bool holds, std::string_view expected, double got) {
  if (holds) return;
  throw Error(TITANS_INVALID_ARGUMENT, "E0512", "generate", text("expected ", expected, ", got ", got),
              "change that option");
}

}  // namespace

// SplitMix64 gives the index-th output without the earlier ones.
double uniform(std::uint64_t seed, std::uint64_t index) {
  std::uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1.0p-53;
}

Sampler::Sampler(const Sampling& sampling) : sampling_(sampling) {
  // Written so that NaN fails.
  require(sampling.temperature >= 0.0 && std::isfinite(sampling.temperature), "a finite temperature >= 0",
          sampling.temperature);
  require(sampling.top_k >= 0, "top_k >= 0", sampling.top_k);
  require(sampling.top_p > 0.0 && sampling.top_p <= 1.0, "top_p in (0, 1]", sampling.top_p);
  require(sampling.min_p >= 0.0 && sampling.min_p <= 1.0, "min_p in [0, 1]", sampling.min_p);
}

std::int32_t Sampler::sample(const std::vector<float>& logits, std::uint64_t index) {
  const float top = finite_maximum(logits.data(), logits.size(), "generate");
  if (sampling_.temperature == 0.0) {
    return static_cast<std::int32_t>(std::find(logits.begin(), logits.end(), top) - logits.begin());
  }

  candidates_.clear();
  for (std::size_t token = 0; token < logits.size(); ++token) {
    const double distance = static_cast<double>(logits[token]) - static_cast<double>(top);
    candidates_.push_back(
        {logits[token], static_cast<std::int32_t>(token), std::exp(distance / sampling_.temperature)});
  }
  keep_top_k();
  keep_top_p();
  keep_min_p();

  double total = 0.0;
  for (const Candidate& candidate : candidates_) total += candidate.weight;
  double rest = uniform(sampling_.seed, index) * total;
  std::int32_t last_possible = 0;
  for (const Candidate& candidate : candidates_) {
    if (candidate.weight == 0.0) continue;
    if (rest < candidate.weight) return candidate.token;
    rest -= candidate.weight;
    last_possible = candidate.token;
  }
  return last_possible;  // reached only if rounding moved the draw past the end
}

// Ties are ordered by token, so equal logits give the same candidates everywhere.
void Sampler::keep_top_k() {
  const bool limits = sampling_.top_k > 0 && static_cast<std::size_t>(sampling_.top_k) < candidates_.size();
  if (!limits && sampling_.top_p >= 1.0) return;  // no filter needs an order
  const std::size_t kept = limits ? static_cast<std::size_t>(sampling_.top_k) : candidates_.size();
  const auto end = candidates_.begin() + static_cast<std::ptrdiff_t>(kept);
  std::partial_sort(candidates_.begin(), end, candidates_.end(), [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
  });
  candidates_.resize(kept);
}

// Keeps the smallest set of top candidates with probability top_p of those that top_k kept.
void Sampler::keep_top_p() {
  if (sampling_.top_p >= 1.0) return;
  double total = 0.0;
  for (const Candidate& candidate : candidates_) total += candidate.weight;
  double sum = 0.0;
  std::size_t kept = 0;
  while (kept < candidates_.size() && sum < sampling_.top_p * total) sum += candidates_[kept++].weight;
  candidates_.resize(kept);
}

void Sampler::keep_min_p() {
  // The most likely candidate has weight 1.
  candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(),
                                   [&](const Candidate& candidate) { return candidate.weight < sampling_.min_p; }),
                    candidates_.end());
}

}  // namespace titans::core
