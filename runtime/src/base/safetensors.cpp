#include "base/safetensors.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/json_reader.h"

namespace titans::core {
namespace {

constexpr std::size_t kLengthBytes = 8;
// The limit of the format's own reader.
constexpr std::uint64_t kLongestHeader = 100'000'000;

[[noreturn]] void fail(std::string_view file_name, std::string_view problem) {
  throw Error(TITANS_FAILED, "E0204", file_name, text("damaged safetensors file: ", problem),
              "copy or export the bundle again");
}

std::size_t header_length(std::string_view content, std::string_view file_name) {
  if (content.size() < kLengthBytes) fail(file_name, text("no header in ", content.size(), " bytes"));
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    length |= static_cast<std::uint64_t>(static_cast<unsigned char>(content[i])) << (8 * i);  // little endian
  }
  const std::uint64_t most = std::min<std::uint64_t>(content.size() - kLengthBytes, kLongestHeader);
  if (length > most) fail(file_name, text("expected a header of at most ", most, " bytes, got ", length));
  return static_cast<std::size_t>(length);
}

struct Range {
  std::size_t begin;
  std::size_t end;
};

Range read_range(const JsonReader& entry, std::size_t data_bytes) {
  const JsonReader field = entry.at("data_offsets");
  const std::vector<JsonReader> offsets = field.items();
  if (offsets.size() != 2) field.fail("two offsets");
  const auto most = static_cast<std::int64_t>(data_bytes);
  const std::int64_t begin = offsets[0].integer(0, most);
  const std::int64_t end = offsets[1].integer(begin, most);
  return {static_cast<std::size_t>(begin), static_cast<std::size_t>(end)};
}

// The format allows neither overlaps nor gaps.
void check_ranges(std::vector<std::pair<Range, std::string>> ranges, std::size_t bytes, std::string_view file_name) {
  std::sort(ranges.begin(), ranges.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first.begin, a.first.end) < std::pair(b.first.begin, b.first.end);
  });
  std::size_t end = 0;
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    const auto& [range, name] = ranges[i];
    if (range.begin < end) fail(file_name, text("tensors ", ranges[i - 1].second, " and ", name, " overlap"));
    if (range.begin > end) fail(file_name, text("a gap of ", range.begin - end, " bytes before tensor ", name));
    end = range.end;
  }
  if (end != bytes) fail(file_name, text(bytes - end, " bytes after the last tensor"));
}

}  // namespace

std::string_view safetensors_header(std::string_view content, std::string_view file_name) {
  return content.substr(kLengthBytes, header_length(content, file_name));
}

Tensors read_safetensors(std::string_view content, std::string_view file_name) {
  const std::string_view source = safetensors_header(content, file_name);
  const nlohmann::json header = JsonReader::parse(source, file_name);
  const std::size_t data_start = kLengthBytes + source.size();
  const auto* data = reinterpret_cast<const std::byte*>(content.data());

  Tensors tensors;
  std::vector<std::pair<Range, std::string>> ranges;
  for (const auto& [name, entry] : JsonReader(header, file_name).members()) {
    if (name == "__metadata__") {
      for (const auto& [key, value] : entry.members()) {
        if (!value.raw().is_string()) value.fail("a string");
      }
      continue;
    }
    const Range range = read_range(entry, content.size() - data_start);
    ranges.emplace_back(range, name);
    const auto dtype = dtype_named(entry.at("dtype").string(), &DTypeInfo::safetensors);
    if (!dtype) entry.at("dtype").fail("a dtype that this runtime has");
    Shape shape = entry.at("shape").shape(0);
    if (entry.members().size() != 3) entry.fail("dtype, shape and data_offsets alone");
    const std::optional<std::size_t> bytes = tensor_bytes(shape, *dtype);
    if (!bytes || *bytes != range.end - range.begin) {
      fail(file_name, text("tensor ", name, ": expected the size of ", dtype_info(*dtype).name, " ", shape_text(shape),
                           ", got ", range.end - range.begin, " bytes"));
    }
    // The content is aligned (a mapping starts on a page), so file alignment equals memory alignment.
    if ((data_start + range.begin) % dtype_info(*dtype).bytes != 0) {
      fail(file_name, text("tensor ", name, " is not aligned to its elements: offset ", data_start + range.begin));
    }
    tensors.emplace(name, TensorView{data + data_start + range.begin, *dtype, std::move(shape), *bytes});
  }
  check_ranges(std::move(ranges), content.size() - data_start, file_name);
  return tensors;
}

}  // namespace titans::core
