// A reader for the protocol buffers wire format of ONNX files. It is limited to the parts needed here and safe on
// malformed files.
#pragma once

#include <cstdint>
#include <string_view>

namespace titans::core {

// Reads one message field by field. Results are views of the input bytes. A tag of more than 32 bits, a field number of
// 0 and a number that is longer than necessary are refused: parsers disagree about them.
class WireMessage {
 public:
  enum class Wire { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

  // `file_name` appears in errors.
  WireMessage(std::string_view bytes, std::string_view file_name) : rest_(bytes), file_name_(file_name) {}

  // Advances to the next field; false at the end. Throws an Error if the bytes are not a message.
  bool next();

  std::uint32_t field() const { return static_cast<std::uint32_t>(field_); }
  Wire wire() const { return wire_; }
  bool is_number(std::uint64_t field) const { return field_ == field && wire_ == Wire::kVarint; }
  bool is_bytes(std::uint64_t field) const { return field_ == field && wire_ == Wire::kBytes; }
  std::int64_t number() const { return static_cast<std::int64_t>(number_); }
  std::string_view bytes() const { return bytes_; }
  WireMessage message() const { return {bytes_, file_name_}; }

  // Advances to the next number of a packed list.
  bool next_packed();

  [[noreturn]] void fail(std::string_view problem) const;

 private:
  std::string_view take(std::uint64_t count);
  std::uint64_t varint();

  std::string_view rest_;
  std::string_view file_name_;
  std::uint64_t field_ = 0;
  Wire wire_ = Wire::kVarint;
  std::uint64_t number_ = 0;
  std::string_view bytes_;
};

}  // namespace titans::core
