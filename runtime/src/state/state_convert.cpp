#include "state/state_convert.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "state/stream_state.h"

namespace titans::core {
namespace {

using Layout = std::vector<MemoryField>;

const MemoryField* find_field(const Layout& layout, std::string_view name) {
  const auto found = std::find_if(layout.begin(), layout.end(), [&](const auto& field) { return field.name == name; });
  return found == layout.end() ? nullptr : &*found;
}

bool is_error(const MemoryField& field) { return field.kind == field_kinds::kRoundingError; }
bool is_count(const MemoryField& field) { return field.kind == field_kinds::kUpdateCount; }

// The field with the rounding error of `name`; NULL if there is none.
const MemoryField* find_error(const Layout& layout, std::string_view name) {
  const auto found = std::find_if(layout.begin(), layout.end(),
                                  [&](const auto& field) { return is_error(field) && field.of == name; });
  return found == layout.end() ? nullptr : &*found;
}

// True for fields that exist only with some rounding modes.
bool is_added(const MemoryField& field) { return is_error(field) || is_count(field); }

// True if a rounding error has the shape of its field, and a count is one word.
bool is_sound(const Layout& layout, const MemoryField& field) {
  if (is_count(field)) return field.shape.empty() && field.dtype == FieldDtype::kFloat32;
  if (!is_error(field)) return true;
  const MemoryField* rounded = find_field(layout, field.of);
  return rounded != nullptr && !is_added(*rounded) && rounded->shape == field.shape;
}

// True if the tensor has rows of fields in 32-bit words, whose offsets may differ between bundles.
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
  const MemoryField* lost = find_error(from, field.name);
  const MemoryField* errors = find_error(to, field.name);
  // Packing again would round blocks with a scale a second time.
  const bool keeps_bits = source.dtype == field.dtype && (lost == nullptr || errors != nullptr);
  if (keeps_bits) {
    std::copy_n(in + source.offset, field_words(field.dtype, field.shape), out + field.offset);
    if (lost == nullptr) return;  // the errors stay zero
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
      if (!is_sound(*one, field)) return text("a field ", field.name, " ", shape_text(field.shape));
      if (is_added(field)) continue;
      const MemoryField* same = find_field(*other, field.name);
      if (same != nullptr && same->shape == field.shape && same->kind == field.kind) continue;
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
      if (!is_added(field)) {
        convert_field(from.layout, from_start, to.layout, field, to_start);
      } else if (const MemoryField* kept = is_count(field) ? find_field(from.layout, field.name) : nullptr) {
        if (is_count(*kept)) to_start[field.offset] = from_start[kept->offset];
      }
    }
  }
}

}  // namespace titans::core
