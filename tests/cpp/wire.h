// Protocol-buffer fields, as in ONNX files.
#pragma once

#include <cstddef>
#include <string>

namespace titans::test {

inline std::string varint(std::size_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes += static_cast<char>((value & 0x7f) | 0x80);
  return bytes + static_cast<char>(value);
}

inline std::string field(std::size_t number, const std::string& bytes) {
  return varint(number << 3 | 2) + varint(bytes.size()) + bytes;
}

inline std::string number(std::size_t field, std::size_t value) { return varint(field << 3) + varint(value); }

}  // namespace titans::test
