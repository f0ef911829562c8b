// Checks of logits, shared by sampling and scoring.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <string_view>

#include "base/error.h"

namespace titans::core {

// The largest of `count` logits. Throws an Error if it is not finite or a logit is NaN, because such logits define no
// distribution.
inline float finite_maximum(const float* logits, std::size_t count, std::string_view where) {
  float most = -std::numeric_limits<float>::infinity();
  bool has_nan = false;
  for (std::size_t i = 0; i < count; ++i) {
    has_nan = has_nan || std::isnan(logits[i]);
    if (logits[i] > most) most = logits[i];
  }
  if (has_nan || !std::isfinite(most)) {
    throw Error(TITANS_FAILED, "E0511", where,
                text("expected logits with a finite maximum, got ", has_nan ? std::string("NaN") : text(most)),
                "reset the stream, or check the model in full precision");
  }
  return most;
}

}  // namespace titans::core
