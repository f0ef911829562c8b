#include "backends/onnxruntime/initializers.h"

#include <utility>

#include "error.h"

namespace titans::core {
namespace {

// Numbers of the fields, from onnx.proto.
constexpr std::uint64_t kModelGraph = 7;
constexpr std::uint64_t kGraphInitializer = 5;
constexpr std::uint64_t kTensorDims = 1;
constexpr std::uint64_t kTensorType = 2;
constexpr std::uint64_t kTensorName = 8;

enum class Wire { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

// Reads one message of the protocol buffers' wire format field by field.
class Message {
 public:
  Message(std::string_view bytes, std::string_view file_name) : rest_(bytes), file_name_(file_name) {}

  // Goes to the next field; false at the end.
  bool next() {
    if (rest_.empty()) return false;
    const std::uint64_t tag = varint();
    field_ = tag >> 3;
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

  bool is_number(std::uint64_t field) const { return field_ == field && wire_ == Wire::kVarint; }
  bool is_bytes(std::uint64_t field) const { return field_ == field && wire_ == Wire::kBytes; }
  std::int64_t number() const { return static_cast<std::int64_t>(number_); }
  std::string_view bytes() const { return bytes_; }
  Message message() const { return {bytes_, file_name_}; }

  // A number, where this message is a packed list of numbers.
  bool next_packed() {
    if (rest_.empty()) return false;
    number_ = varint();
    return true;
  }

  [[noreturn]] void fail(std::string_view got) const {
    throw Error(TITANS_FAILED, file_name_, "an ONNX model", got, "export the bundle again");
  }

 private:
  std::string_view take(std::uint64_t count) {
    if (count > rest_.size()) fail("a field that ends after the file");
    const std::string_view taken = rest_.substr(0, static_cast<std::size_t>(count));
    rest_.remove_prefix(taken.size());
    return taken;
  }

  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      value |= static_cast<std::uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
    fail("a number of more than 64 bits");
  }

  std::string_view rest_;
  std::string_view file_name_;
  std::uint64_t field_ = 0;
  Wire wire_ = Wire::kVarint;
  std::uint64_t number_ = 0;
  std::string_view bytes_;
};

std::pair<std::string, Initializer> read_tensor(Message tensor) {
  std::pair<std::string, Initializer> out;
  while (tensor.next()) {
    if (tensor.is_bytes(kTensorName)) out.first = std::string(tensor.bytes());
    // An enumeration has 32 bits; a parser drops the others.
    if (tensor.is_number(kTensorType)) out.second.type = static_cast<std::int32_t>(tensor.number());
    if (tensor.is_number(kTensorDims)) out.second.shape.push_back(tensor.number());
    if (tensor.is_bytes(kTensorDims)) {
      for (Message packed = tensor.message(); packed.next_packed();) out.second.shape.push_back(packed.number());
    }
  }
  return out;
}

}  // namespace

std::map<std::string, Initializer> read_initializers(std::string_view model, std::string_view file_name) {
  std::map<std::string, Initializer> initializers;
  for (Message root(model, file_name); root.next();) {
    if (!root.is_bytes(kModelGraph)) continue;
    for (Message graph = root.message(); graph.next();) {
      if (!graph.is_bytes(kGraphInitializer)) continue;
      auto [name, initializer] = read_tensor(graph.message());
      if (!initializers.emplace(name, std::move(initializer)).second) graph.fail(text("two initialisers ", name));
    }
  }
  return initializers;
}

}  // namespace titans::core
