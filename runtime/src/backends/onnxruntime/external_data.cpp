#include "backends/onnxruntime/external_data.h"

#include <cstdint>

#include "backends/onnxruntime/wire_format.h"
#include "base/error.h"

namespace titans::core {
namespace {

using Files = std::set<std::string, std::less<>>;

// Field numbers from onnx.proto.
constexpr std::uint64_t kModelGraph = 7;
constexpr std::uint64_t kModelTraining = 20;
constexpr std::uint64_t kModelFunctions = 25;
constexpr std::uint64_t kTrainingInitialization = 1;
constexpr std::uint64_t kTrainingAlgorithm = 2;
constexpr std::uint64_t kFunctionNode = 7;
constexpr std::uint64_t kFunctionAttribute = 11;
constexpr std::uint64_t kGraphNode = 1;
constexpr std::uint64_t kGraphInitializer = 5;
constexpr std::uint64_t kGraphSparseInitializer = 15;
constexpr std::uint64_t kSparseValues = 1;
constexpr std::uint64_t kSparseIndices = 2;
constexpr std::uint64_t kNodeAttribute = 5;
constexpr std::uint64_t kAttributeTensor = 5;
constexpr std::uint64_t kAttributeGraph = 6;
constexpr std::uint64_t kAttributeTensors = 10;
constexpr std::uint64_t kAttributeGraphs = 11;
constexpr std::uint64_t kAttributeSparse = 22;
constexpr std::uint64_t kAttributeSparses = 23;
constexpr std::uint64_t kTensorName = 8;
constexpr std::uint64_t kTensorExternal = 13;
constexpr std::uint64_t kEntryKey = 1;
constexpr std::uint64_t kEntryValue = 2;

// Deeper than ONNX parsers accept: they stop at 100 nested messages, and a subgraph takes three.
constexpr int kDeepest = 40;
constexpr std::size_t kLongestQuote = 60;

class Walker {
 public:
  Walker(std::string_view file_name, const Files& files) : file_name_(file_name), files_(files) {}

  void model(WireMessage message) {
    while (message.next()) {
      if (message.is_bytes(kModelGraph)) graph(message.message());
      if (message.is_bytes(kModelTraining)) training(message.message());
      if (message.is_bytes(kModelFunctions)) function(message.message());
    }
  }

 private:
  void training(WireMessage message) {
    while (message.next()) {
      if (message.is_bytes(kTrainingInitialization) || message.is_bytes(kTrainingAlgorithm)) graph(message.message());
    }
  }

  void function(WireMessage message) {
    while (message.next()) {
      if (message.is_bytes(kFunctionNode)) node(message.message());
      if (message.is_bytes(kFunctionAttribute)) attribute(message.message());
    }
  }

  void graph(WireMessage message) {
    if (++depth_ > kDeepest) message.fail(text("graphs nested deeper than ", kDeepest));
    while (message.next()) {
      if (message.is_bytes(kGraphNode)) node(message.message());
      if (message.is_bytes(kGraphInitializer)) tensor(message.message());
      if (message.is_bytes(kGraphSparseInitializer)) sparse(message.message());
    }
    --depth_;
  }

  void node(WireMessage message) {
    while (message.next()) {
      if (message.is_bytes(kNodeAttribute)) attribute(message.message());
    }
  }

  void attribute(WireMessage message) {
    while (message.next()) {
      if (message.is_bytes(kAttributeTensor) || message.is_bytes(kAttributeTensors)) tensor(message.message());
      if (message.is_bytes(kAttributeGraph) || message.is_bytes(kAttributeGraphs)) graph(message.message());
      if (message.is_bytes(kAttributeSparse) || message.is_bytes(kAttributeSparses)) sparse(message.message());
    }
  }

  void sparse(WireMessage message) {
    while (message.next()) {
      if (message.is_bytes(kSparseValues) || message.is_bytes(kSparseIndices)) tensor(message.message());
    }
  }

  void tensor(WireMessage message) {
    std::string_view name;
    for (WireMessage names = message; names.next();) {
      if (names.is_bytes(kTensorName)) name = names.bytes();
    }
    while (message.next()) {
      if (message.is_bytes(kTensorExternal)) entry(message.message(), name);
    }
  }

  void entry(WireMessage message, std::string_view tensor) const {
    std::string_view key;
    std::string_view value;
    while (message.next()) {
      if (message.is_bytes(kEntryKey)) key = message.bytes();
      if (message.is_bytes(kEntryValue)) value = message.bytes();
    }
    if (key != "location" || files_.count(value) != 0) return;
    std::string known;
    for (const std::string& file : files_) known += (known.empty() ? "" : " or ") + file;
    throw Error(TITANS_FAILED, "E0208", file_name_,
                text("data of ", tensor.substr(0, kLongestQuote), " outside the bundle: expected it in the file or in ",
                     known, ", got ", quoted(value.substr(0, kLongestQuote))),
                "export the bundle again, and do not trust the source of this one");
  }

  std::string_view file_name_;
  const Files& files_;
  int depth_ = 0;
};

}  // namespace

void check_external_data(std::string_view model, std::string_view file_name, const Files& files) {
  Walker(file_name, files).model(WireMessage(model, file_name));
}

}  // namespace titans::core
