// Norms of a stream's memory: of each weights and surprise field, over all its elements, the largest of all heads.
//
// A memory that diverges shows it in a norm long before it becomes infinite and before the outputs suffer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/wipe.h"
#include "session/session.h"

namespace titans::core {

// Sums of squares in double. Squares of floats cannot overflow it, so the sum is finite exactly if all values are.
double squares(const float* values, std::size_t count);
double squares_of_change(const float* before, const float* after, std::size_t count);

struct Norm {
  double value = 0;  // may be NaN or infinite
  std::int32_t head = -1;
};

class NormReader {
 public:
  explicit NormReader(const Session& session) : session_(session), norms_(session.norm_fields().size()) {}

  // Measures the fields of that state tensor.
  void read(std::size_t state, const Buffer& buffer);
  void read_all(const std::vector<Buffer*>& state);
  // Forgets what was measured, as the state has changed.
  void clear() { std::fill(norms_.begin(), norms_.end(), Norm{}); }
  // One per field of Session::norm_fields, as measured last.
  const std::vector<Norm>& norms() const { return norms_; }
  // Index of the first field whose norm exceeds its limit or is not finite; the number of fields if there is none.
  std::size_t first_above(const std::vector<double>& limits) const;

 private:
  const Session& session_;
  std::vector<Norm> norms_;
  Floats copy_, values_;
};

}  // namespace titans::core
