#include "backends/onnxruntime/initializers.h"

#include <utility>

#include "backends/onnxruntime/wire_format.h"
#include "base/error.h"

namespace titans::core {
namespace {

// Field numbers from onnx.proto.
constexpr std::uint64_t kModelGraph = 7;
constexpr std::uint64_t kGraphInitializer = 5;
constexpr std::uint64_t kTensorDims = 1;
constexpr std::uint64_t kTensorType = 2;
constexpr std::uint64_t kTensorName = 8;

std::pair<std::string, Initializer> read_tensor(WireMessage tensor) {
  std::pair<std::string, Initializer> out;
  while (tensor.next()) {
    if (tensor.is_bytes(kTensorName)) out.first = std::string(tensor.bytes());
    // An enumeration has 32 bits. Parsers drop the others.
    if (tensor.is_number(kTensorType)) out.second.type = static_cast<std::int32_t>(tensor.number());
    if (tensor.is_number(kTensorDims)) out.second.shape.push_back(tensor.number());
    if (tensor.is_bytes(kTensorDims)) {
      for (WireMessage packed = tensor.message(); packed.next_packed();) out.second.shape.push_back(packed.number());
    }
  }
  return out;
}

}  // namespace

std::map<std::string, Initializer> read_initializers(std::string_view model, std::string_view file_name) {
  std::map<std::string, Initializer> initializers;
  for (WireMessage root(model, file_name); root.next();) {
    if (!root.is_bytes(kModelGraph)) continue;
    for (WireMessage graph = root.message(); graph.next();) {
      if (!graph.is_bytes(kGraphInitializer)) continue;
      auto [name, initializer] = read_tensor(graph.message());
      if (!initializers.emplace(name, std::move(initializer)).second) graph.fail(text("initialiser ", name, " twice"));
    }
  }
  return initializers;
}

}  // namespace titans::core
