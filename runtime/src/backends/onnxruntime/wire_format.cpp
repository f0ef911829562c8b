#include "backends/onnxruntime/wire_format.h"

#include <limits>

#include "base/error.h"

namespace titans::core {

bool WireMessage::next() {
  if (rest_.empty()) return false;
  const std::uint64_t tag = varint();
  if (tag > std::numeric_limits<std::uint32_t>::max()) fail("a tag of more than 32 bits");
  field_ = tag >> 3;
  if (field_ == 0) fail("a field without a number");
  wire_ = static_cast<Wire>(tag & 7);
  switch (wire_) {
    case Wire::kVarint:
      number_ = varint();
      return true;
    case Wire::kFixed64:
      take(8);
      return true;
    case Wire::kBytes:
      bytes_ = take(varint());
      return true;
    case Wire::kFixed32:
      take(4);
      return true;
  }
  fail("a field of unknown form");
}

bool WireMessage::next_packed() {
  if (rest_.empty()) return false;
  number_ = varint();
  return true;
}

void WireMessage::fail(std::string_view problem) const {
  throw Error(TITANS_FAILED, "E0209", file_name_, text("not an ONNX model: ", problem), "export the bundle again");
}

std::string_view WireMessage::take(std::uint64_t count) {
  if (count > rest_.size()) fail("a field that ends after the file");
  const std::string_view taken = rest_.substr(0, static_cast<std::size_t>(count));
  rest_.remove_prefix(taken.size());
  return taken;
}

std::uint64_t WireMessage::varint() {
  std::uint64_t value = 0;
  for (unsigned shift = 0; shift < 64; shift += 7) {
    const auto byte = static_cast<unsigned char>(take(1)[0]);
    value |= static_cast<std::uint64_t>(byte & 0x7f) << shift;
    if (byte >= 0x80) continue;
    if (byte == 0 && shift > 0) fail("a number that is longer than necessary");
    if (shift == 63 && byte > 1) break;
    return value;
  }
  fail("a number of more than 64 bits");
}

}  // namespace titans::core
