#include "stream/norms.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace titans::core {
namespace {

constexpr std::size_t kLanes = 8;
using Lanes = std::array<double, kLanes>;

double total(const Lanes& lanes) {
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

}  // namespace

double squares(const float* values, std::size_t count) {
  Lanes lanes{};
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const double value = values[i + lane];
      lanes[lane] += value * value;
    }
  }
  for (; i < count; ++i) lanes[0] += static_cast<double>(values[i]) * values[i];
  return total(lanes);
}

double squares_of_change(const float* before, const float* after, std::size_t count) {
  Lanes lanes{};
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const double change = static_cast<double>(after[i + lane]) - before[i + lane];
      lanes[lane] += change * change;
    }
  }
  for (; i < count; ++i) {
    const double change = static_cast<double>(after[i]) - before[i];
    lanes[0] += change * change;
  }
  return total(lanes);
}

void NormReader::read(std::size_t state, const Buffer& buffer) {
  const float* rows = nullptr;
  for (std::size_t index = 0; index < norms_.size(); ++index) {
    const NormField& field = session_.norm_fields()[index];
    if (field.state != state) continue;
    if (rows == nullptr) {
      if (const std::byte* host = buffer.host()) {
        rows = reinterpret_cast<const float*>(host);
      } else {
        copy_.resize(field.row * field.heads);
        buffer.download(reinterpret_cast<std::byte*>(copy_.data()));
        rows = copy_.data();
      }
    }
    Norm norm;
    for (std::size_t head = 0; head < field.heads; ++head) {
      const float* values = rows + head * field.row + field.offset;
      if (field.dtype != FieldDtype::kFloat32) {
        values_.resize(std::max(values_.size(), field.extent));
        unpack_field(field.dtype, values, field.extent, field.columns, values_.data());
        values = values_.data();
      }
      const double value = std::sqrt(squares(values, field.extent));
      if (norm.head >= 0 && !std::isnan(value) && value <= norm.value) continue;
      norm = {value, static_cast<std::int32_t>(head)};
      if (std::isnan(value)) break;
    }
    norms_[index] = norm;
  }
}

void NormReader::read_all(const std::vector<Buffer*>& state) {
  for (std::size_t index = 0; index < state.size(); ++index) read(index, *state[index]);
}

std::size_t NormReader::first_above(const std::vector<double>& limits) const {
  std::size_t index = 0;
  while (index < norms_.size() && std::isfinite(norms_[index].value) && norms_[index].value <= limits[index]) ++index;
  return index;
}

}  // namespace titans::core
