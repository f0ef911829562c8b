#include "plugins/kernels/operands.h"

#include <algorithm>

#include "plugins/kernels/attribute_table.h"
#include "plugins/kernels/failure.h"

namespace titans::kernels {

std::string check_expected(const char* where, const OperandList& operands, const Expectation* all, std::size_t count) {
  for (const Expectation* each = all; each != all + count; ++each) {
    std::string problem = check_tensor(where, operands.names[each->which], operands.tensors[each->which], each->dtype,
                                       each->rank, each->shape, each->required);
    if (!problem.empty()) return problem;
  }
  return {};
}

std::string check_overlaps(const char* where, const OperandList& operands, std::size_t first_output,
                           const InPlace* in_place, std::size_t pairs) {
  const Tensor* tensors = operands.tensors;
  for (std::size_t out = first_output; out < operands.count; ++out) {
    for (std::size_t other = 0; other < out; ++other) {
      const bool pair = std::any_of(in_place, in_place + pairs,
                                    [&](const InPlace& each) { return each.input == other && each.output == out; });
      if (pair && tensors[out].data == tensors[other].data) continue;
      if (!overlap(tensors[out], tensors[other])) continue;
      return overlapping(where, operands.names[out], operands.names[other],
                         pair ? "bind one buffer to both, or two that do not overlap" : "bind another buffer");
    }
  }
  return {};
}

std::string check_range(const char* where, const char* name, const Tensor& values, std::int64_t end, const char* of) {
  if (!values.present()) return {};
  for (std::int64_t i = 0; i < values.elements(); ++i) {
    const std::int64_t value = values.as<std::int64_t>()[i];
    if (value >= 0 && value < end) continue;
    return failure(where, "E0709",
                   "value out of range: " + std::string(name) + " of " + of + " " + std::to_string(i) + ": " +
                       expected("[0, " + std::to_string(end) + ")", std::to_string(value)),
                   "correct it");
  }
  return {};
}

std::string check_slots(const char* where, const char* name, const Tensor& slots, std::int64_t pool) {
  std::string problem = check_range(where, name, slots, pool, "stream");
  if (!problem.empty() || !slots.present()) return problem;
  const std::int64_t* all = slots.as<std::int64_t>();
  for (std::int64_t b = 0; b < slots.elements(); ++b) {
    if (std::find(all, all + b, all[b]) == all + b) continue;
    return failure(where, "E0709",
                   "value out of range: " + std::string(name) + " has " + std::to_string(all[b]) + " twice",
                   "give each stream its own slot");
  }
  return {};
}

}  // namespace titans::kernels
