#include "state/state_convert.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "state/stream_state.h"

namespace titans::core {
namespace {

using Layout = std::vector<MemoryField>;

constexpr std::string_view kChunkUpdates = "chunk_updates";

const MemoryField* find_field(const Layout& layout, std::string_view name) {
  const auto found = std::find_if(layout.begin(), layout.end(), [&](const auto& field) { return field.name == name; });
  return found == layout.end() ? nullptr : &*found;
}

// The field that keeps what rounding has taken from `name` (docs/operator.md, "Storage").
std::string error_name(std::string_view name) { return name == "gamma" ? "EW_gamma" : "E" + std::string(name); }

// Whether the rounding has added the field to what the memory is.
bool is_added(const Layout& layout, const MemoryField& field) {
  if (field.name == kChunkUpdates) return true;
  return std::any_of(layout.begin(), layout.end(),
                     [&](const MemoryField& other) { return error_name(other.name) == field.name; });
}

// Whether it is rows of fields in 32-bit words, which may lie elsewhere in another bundle.
bool is_packed(const StateTensor& state) { return !state.layout.empty() && state.dtype == DType::kFloat32; }

bool same_layout(const Layout& a, const Layout& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const MemoryField& x, const MemoryField& y) {
    return x.name == y.name && x.offset == y.offset && x.shape == y.shape && x.dtype == y.dtype;
  });
}

std::size_t extent_of(const MemoryField& field) { return *tensor_bytes(field.shape, DType::kInt8); }

std::size_t columns_of(const MemoryField& field) {
  return field.shape.empty() ? 1 : static_cast<std::size_t>(field.shape.back());
}

Floats unpack(const MemoryField& field, const float* row) {
  Floats values(extent_of(field));
  unpack_field(field.dtype, row + field.offset, values.size(), columns_of(field), values.data());
  return values;
}

void pack(const MemoryField& field, const Floats& values, float* row) {
  pack_field(field.dtype, values.data(), values.size(), columns_of(field), row + field.offset);
}

void convert_field(const Layout& from, const float* in, const Layout& to, const MemoryField& field, float* out) {
  const MemoryField& source = *find_field(from, field.name);
  const MemoryField* lost = find_field(from, error_name(field.name));
  const MemoryField* errors = find_field(to, error_name(field.name));
  // Packed again, blocks with a scale would be rounded a second time.
  const bool keeps_bits = source.dtype == field.dtype && (lost == nullptr || errors != nullptr);
  if (keeps_bits) {
    std::copy_n(in + source.offset, field_words(field.dtype, field.shape), out + field.offset);
    if (lost == nullptr) return;  // the errors are zeros, as the row was
    if (lost->dtype == errors->dtype) {
      std::copy_n(in + lost->offset, field_words(errors->dtype, errors->shape), out + errors->offset);
    } else {
      pack(*errors, unpack(*lost, in), out);
    }
    return;
  }
  Floats values = unpack(source, in);
  if (lost != nullptr) {
    const Floats more = unpack(*lost, in);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] += more[i];
  }
  pack(field, values, out);
  if (errors == nullptr) return;
  const Floats kept = unpack(field, out);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] -= kept[i];
  pack(*errors, values, out);
}

}  // namespace

std::optional<std::string> difference(const StateTensor& from, const StateTensor& to) {
  const std::string found = text(dtype_info(from.dtype).name, " ", shape_text(from.shape));
  if (from.dtype != to.dtype || from.layout.empty() != to.layout.empty()) return found;
  if (!is_packed(to)) return from.shape == to.shape ? std::nullopt : std::optional(found);
  if (from.shape.size() != to.shape.size()) return found;
  if (!std::equal(from.shape.begin(), from.shape.end() - 1, to.shape.begin())) return found;
  for (const auto& [one, other] : {std::pair(&from.layout, &to.layout), std::pair(&to.layout, &from.layout)}) {
    for (const MemoryField& field : *one) {
      // Of their own field's shape alone is what is kept of its errors read and written.
      const bool fits = std::all_of(one->begin(), one->end(), [&](const MemoryField& other) {
        return error_name(other.name) != field.name || other.shape == field.shape;
      });
      if (!fits) return text("a field ", field.name, " ", shape_text(field.shape));
      if (is_added(*one, field)) continue;
      const MemoryField* same = find_field(*other, field.name);
      if (same != nullptr && same->shape == field.shape) continue;
      const MemoryField* got = find_field(from.layout, field.name);
      return got == nullptr ? text("no field ", field.name) : text("a field ", field.name, " ", shape_text(got->shape));
    }
  }
  return std::nullopt;
}

void convert_state(const StateTensor& from, const std::byte* in, const StateTensor& to, std::byte* out) {
  if (!is_packed(to) || (from.shape == to.shape && same_layout(from.layout, to.layout))) {
    std::memcpy(out, in, to.bytes);
    return;
  }
  std::memset(out, 0, to.bytes);
  const auto from_row = static_cast<std::size_t>(from.shape.back());
  const auto to_row = static_cast<std::size_t>(to.shape.back());
  const std::size_t rows = to_row == 0 ? 0 : to.bytes / sizeof(float) / to_row;
  const auto* source = reinterpret_cast<const float*>(in);
  auto* target = reinterpret_cast<float*>(out);
  for (std::size_t row = 0; row < rows; ++row) {
    const float* from_start = source + row * from_row;
    float* to_start = target + row * to_row;
    for (const MemoryField& field : to.layout) {
      if (!is_added(to.layout, field)) {
        convert_field(from.layout, from_start, to.layout, field, to_start);
      } else if (const MemoryField* kept =
                     field.name == kChunkUpdates ? find_field(from.layout, kChunkUpdates) : nullptr) {
        to_start[field.offset] = from_start[kept->offset];
      }
    }
  }
}

}  // namespace titans::core
