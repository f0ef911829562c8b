// Draws a token from logits.
#pragma once

#include <cstdint>
#include <vector>

#include "base/wipe.h"

namespace titans::core {

struct Sampling {
  double temperature = 1.0;
  std::int32_t top_k = 0;
  double top_p = 1.0;
  double min_p = 0.0;
  std::uint64_t seed = 0;
};

// A number in [0, 1) determined by seed and index, identical on all machines.
double uniform(std::uint64_t seed, std::uint64_t index);

class Sampler {
 public:
  explicit Sampler(const Sampling& sampling);

  // The index-th draw of this seed.
  std::int32_t sample(const std::vector<float>& logits, std::uint64_t index);

 private:
  struct Candidate {
    float logit;
    std::int32_t token;
    double weight;  // unnormalised probability
  };

  void keep_top_k();
  void keep_top_p();
  void keep_min_p();

  Sampling sampling_;
  std::vector<Candidate, WipingAllocator<Candidate>> candidates_;  // reused between calls
};

}  // namespace titans::core
