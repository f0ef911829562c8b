#include "backends/onnxruntime/graph_check.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "backends/onnxruntime/wire_format.h"
#include "base/error.h"
#include "base/names.h"

namespace titans::core {
namespace {

enum class Kind : std::uint8_t {
  kInt64,
  kInt32,
  kEnum,
  kFloat,
  kText,
  kBytes,
  kMessage,
  kPackedInt64,
  kPackedInt32,
  kPackedUint64,
  kPackedFloat,
  kPackedDouble
};

enum class Type : std::uint8_t {
  kNone,
  kModel,
  kOpset,
  kEntry,
  kGraph,
  kFunction,
  kNode,
  kAttribute,
  kTensor,
  kValueInfo,
  kType,
  kTensorType,
  kShape,
  kDimension
};

struct Field {
  Type owner;
  std::uint32_t number;
  Kind kind;
  bool repeated;
  Type message = Type::kNone;
};

// The part of onnx.proto that this project writes. A test compares it with titans_export/onnx/encoding.py.
constexpr std::array<Field, 75> kFields{{
    {Type::kModel, 1, Kind::kInt64, false},
    {Type::kModel, 2, Kind::kText, false},
    {Type::kModel, 3, Kind::kText, false},
    {Type::kModel, 4, Kind::kText, false},
    {Type::kModel, 5, Kind::kInt64, false},
    {Type::kModel, 6, Kind::kText, false},
    {Type::kModel, 7, Kind::kMessage, false, Type::kGraph},
    {Type::kModel, 8, Kind::kMessage, true, Type::kOpset},
    {Type::kModel, 14, Kind::kMessage, true, Type::kEntry},
    {Type::kModel, 25, Kind::kMessage, true, Type::kFunction},
    {Type::kOpset, 1, Kind::kText, false},
    {Type::kOpset, 2, Kind::kInt64, false},
    {Type::kEntry, 1, Kind::kText, false},
    {Type::kEntry, 2, Kind::kText, false},
    {Type::kGraph, 1, Kind::kMessage, true, Type::kNode},
    {Type::kGraph, 2, Kind::kText, false},
    {Type::kGraph, 5, Kind::kMessage, true, Type::kTensor},
    {Type::kGraph, 10, Kind::kText, false},
    {Type::kGraph, 11, Kind::kMessage, true, Type::kValueInfo},
    {Type::kGraph, 12, Kind::kMessage, true, Type::kValueInfo},
    {Type::kGraph, 13, Kind::kMessage, true, Type::kValueInfo},
    {Type::kGraph, 16, Kind::kMessage, true, Type::kEntry},
    {Type::kFunction, 1, Kind::kText, false},
    {Type::kFunction, 4, Kind::kText, true},
    {Type::kFunction, 5, Kind::kText, true},
    {Type::kFunction, 6, Kind::kText, true},
    {Type::kFunction, 7, Kind::kMessage, true, Type::kNode},
    {Type::kFunction, 8, Kind::kText, false},
    {Type::kFunction, 9, Kind::kMessage, true, Type::kOpset},
    {Type::kFunction, 10, Kind::kText, false},
    {Type::kFunction, 11, Kind::kMessage, true, Type::kAttribute},
    {Type::kFunction, 12, Kind::kMessage, true, Type::kValueInfo},
    {Type::kFunction, 13, Kind::kText, false},
    {Type::kFunction, 14, Kind::kMessage, true, Type::kEntry},
    {Type::kNode, 1, Kind::kText, true},
    {Type::kNode, 2, Kind::kText, true},
    {Type::kNode, 3, Kind::kText, false},
    {Type::kNode, 4, Kind::kText, false},
    {Type::kNode, 5, Kind::kMessage, true, Type::kAttribute},
    {Type::kNode, 6, Kind::kText, false},
    {Type::kNode, 7, Kind::kText, false},
    {Type::kNode, 8, Kind::kText, false},
    {Type::kNode, 9, Kind::kMessage, true, Type::kEntry},
    {Type::kAttribute, 1, Kind::kText, false},
    {Type::kAttribute, 2, Kind::kFloat, false},
    {Type::kAttribute, 3, Kind::kInt64, false},
    {Type::kAttribute, 4, Kind::kBytes, false},
    {Type::kAttribute, 5, Kind::kMessage, false, Type::kTensor},
    {Type::kAttribute, 6, Kind::kMessage, false, Type::kGraph},
    {Type::kAttribute, 7, Kind::kFloat, true},
    {Type::kAttribute, 8, Kind::kInt64, true},
    {Type::kAttribute, 9, Kind::kBytes, true},
    {Type::kAttribute, 13, Kind::kText, false},
    {Type::kAttribute, 20, Kind::kEnum, false},
    {Type::kAttribute, 21, Kind::kText, false},
    {Type::kTensor, 1, Kind::kInt64, true},
    {Type::kTensor, 2, Kind::kInt32, false},
    {Type::kTensor, 4, Kind::kPackedFloat, false},
    {Type::kTensor, 5, Kind::kPackedInt32, false},
    {Type::kTensor, 7, Kind::kPackedInt64, false},
    {Type::kTensor, 8, Kind::kText, false},
    {Type::kTensor, 9, Kind::kBytes, false},
    {Type::kTensor, 10, Kind::kPackedDouble, false},
    {Type::kTensor, 11, Kind::kPackedUint64, false},
    {Type::kTensor, 12, Kind::kText, false},
    {Type::kTensor, 13, Kind::kMessage, true, Type::kEntry},
    {Type::kTensor, 14, Kind::kEnum, false},
    {Type::kValueInfo, 1, Kind::kText, false},
    {Type::kValueInfo, 2, Kind::kMessage, false, Type::kType},
    {Type::kValueInfo, 3, Kind::kText, false},
    {Type::kType, 1, Kind::kMessage, false, Type::kTensorType},
    {Type::kTensorType, 1, Kind::kInt32, false},
    {Type::kTensorType, 2, Kind::kMessage, false, Type::kShape},
    {Type::kShape, 1, Kind::kMessage, true, Type::kDimension},
    {Type::kDimension, 1, Kind::kInt64, false},
}};
constexpr std::uint32_t kDimensionParameter = 2;  // a text, in place of field 1
constexpr std::uint32_t kAttributeType = 20;
constexpr std::int64_t kLastAttributeType = 14;
constexpr std::int64_t kLastLocation = 1;
constexpr std::uint32_t kTensorExternal = 13;
constexpr std::uint32_t kTensorLocation = 14;
constexpr std::uint32_t kNodeAttribute = 5;

// ONNX parsers stop at 100 nested messages.
constexpr int kDeepest = 90;
constexpr std::size_t kLongestQuote = 60;
constexpr std::size_t kLongestNumber = 18;  // digits; fewer than an int64 has

const Field* find_field(Type owner, std::uint32_t number) {
  static constexpr Field kParameter{Type::kDimension, kDimensionParameter, Kind::kText, false};
  if (owner == Type::kDimension && number == kDimensionParameter) return &kParameter;
  const auto* const found = std::find_if(kFields.begin(), kFields.end(), [&](const Field& field) {
    return field.owner == owner && field.number == number;
  });
  return found == kFields.end() ? nullptr : found;
}

WireMessage::Wire wire_of(Kind kind) {
  switch (kind) {
    case Kind::kInt64:
    case Kind::kInt32:
    case Kind::kEnum:
      return WireMessage::Wire::kVarint;
    case Kind::kFloat:
      return WireMessage::Wire::kFixed32;
    default:
      return WireMessage::Wire::kBytes;
  }
}

bool fits_int32(std::int64_t value) {
  return value >= std::numeric_limits<std::int32_t>::min() && value <= std::numeric_limits<std::int32_t>::max();
}

class EncodingCheck {
 public:
  void message(Type type, WireMessage message) {
    if (++depth_ > kDeepest) message.fail(text("messages nested deeper than ", kDeepest));
    std::uint32_t last = 0;
    for (WireMessage at = message; at.next();) {
      const Field* field = find_field(type, at.field());
      if (field == nullptr) at.fail(text("field ", at.field(), ", which this project does not write"));
      if (at.wire() != wire_of(field->kind)) at.fail(text("field ", at.field(), " of a wrong wire type"));
      const bool repeats = at.field() == last && !field->repeated;
      const bool both = type == Type::kDimension && last == 1;
      if (at.field() < last || repeats || both) at.fail(text("field ", at.field(), " twice or out of order"));
      last = at.field();
      value(*field, at);
    }
    if (type == Type::kTensor) external_data(message);
    if (type == Type::kNode) attribute_names(message);
    --depth_;
  }

 private:
  void value(const Field& field, const WireMessage& at) {
    switch (field.kind) {
      case Kind::kInt32:
        if (!fits_int32(at.number())) at.fail(text("field ", field.number, " beyond 32 bits"));
        break;
      case Kind::kEnum: {
        const std::int64_t most = field.number == kAttributeType ? kLastAttributeType : kLastLocation;
        if (at.number() < 0 || at.number() > most) at.fail(text("field ", field.number, " of an unknown value"));
        break;
      }
      case Kind::kText:
        if (!is_utf8(at.bytes())) at.fail(text("field ", field.number, " that is not UTF-8"));
        break;
      case Kind::kMessage:
        message(field.message, at.message());
        break;
      case Kind::kPackedInt32:
      case Kind::kPackedInt64:
      case Kind::kPackedUint64:
        for (WireMessage list = at.message(); list.next_packed();) {
          if (field.kind == Kind::kPackedInt32 && !fits_int32(list.number())) list.fail("a number beyond 32 bits");
        }
        break;
      case Kind::kPackedFloat:
        if (at.bytes().size() % sizeof(float) != 0) at.fail("floats that end within one");
        break;
      case Kind::kPackedDouble:
        if (at.bytes().size() % sizeof(double) != 0) at.fail("doubles that end within one");
        break;
      default:
        break;
    }
    const bool packed = field.kind >= Kind::kPackedInt64;
    if (packed && at.bytes().empty()) at.fail(text("field ", field.number, " without values"));
  }

  // Where the data lies must not depend on which of two keys or places a reader takes.
  void external_data(WireMessage tensor) {
    bool external = false;
    bool own = false;
    std::vector<std::string_view> keys;
    while (tensor.next()) {
      const std::uint32_t field = tensor.field();
      if (field == kTensorLocation) external = tensor.number() == 1;
      own = own || (field >= 4 && field <= 11 && field != 8);
      if (field == kTensorExternal) entry(tensor.message(), keys);
    }
    if (external != !keys.empty() || (external && own)) {
      tensor.fail("a tensor whose data lies both in the file and outside, or nowhere");
    }
    if (external && std::find(keys.begin(), keys.end(), "location") == keys.end())
      tensor.fail("external data without a file");
  }

  void entry(WireMessage message, std::vector<std::string_view>& keys) {
    std::string_view key;
    std::string_view value;
    while (message.next()) (message.field() == 1 ? key : value) = message.bytes();
    const bool number = key == "offset" || key == "length";
    if (!number && key != "location" && key != "checksum") {
      message.fail(text("unknown key ", quoted(key.substr(0, kLongestQuote)), " of external data"));
    }
    if (std::find(keys.begin(), keys.end(), key) != keys.end())
      message.fail(text("key ", key, " of external data twice"));
    const bool digits = value.find_first_not_of("0123456789") == std::string_view::npos;
    if (number && (value.empty() || value.size() > kLongestNumber || !digits)) {
      message.fail(text(key, " of external data is no number: ", quoted(value.substr(0, kLongestQuote))));
    }
    keys.push_back(key);
  }

  void attribute_names(WireMessage node) {
    std::vector<std::string_view> names;
    while (node.next()) {
      if (node.field() != kNodeAttribute) continue;
      for (WireMessage attribute = node.message(); attribute.next();) {
        if (attribute.field() == 1) names.push_back(attribute.bytes());
      }
    }
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    if (twice != names.end()) node.fail(text("attribute ", quoted(twice->substr(0, kLongestQuote)), " twice"));
  }

  int depth_ = 0;
};

using Names = std::vector<std::string_view>;

// Operators that this project writes; titans_export/operators/allowed.py has the same lists, and a test compares them.
const Names kStandard{"Abs",
                      "Add",
                      "And",
                      "Cast",
                      "Ceil",
                      "Clip",
                      "Concat",
                      "Constant",
                      "ConstantOfShape",
                      "Cos",
                      "CumSum",
                      "DequantizeLinear",
                      "Div",
                      "Equal",
                      "Erf",
                      "Exp",
                      "Expand",
                      "Floor",
                      "Gather",
                      "GatherElements",
                      "GatherND",
                      "Gelu",
                      "Gemm",
                      "Greater",
                      "GreaterOrEqual",
                      "Identity",
                      "If",
                      "IsInf",
                      "IsNaN",
                      "LayerNormalization",
                      "LeakyRelu",
                      "Less",
                      "LessOrEqual",
                      "Log",
                      "Loop",
                      "MatMul",
                      "Max",
                      "Min",
                      "Mod",
                      "Mul",
                      "Neg",
                      "Not",
                      "Or",
                      "Pad",
                      "Pow",
                      "QuantizeLinear",
                      "Range",
                      "Reciprocal",
                      "ReduceL2",
                      "ReduceMax",
                      "ReduceMean",
                      "ReduceMin",
                      "ReduceProd",
                      "ReduceSum",
                      "Relu",
                      "Reshape",
                      "Round",
                      "Scan",
                      "ScatterElements",
                      "ScatterND",
                      "Shape",
                      "Sigmoid",
                      "Sign",
                      "Sin",
                      "Slice",
                      "Softmax",
                      "Softplus",
                      "Split",
                      "Sqrt",
                      "Squeeze",
                      "Sub",
                      "Tanh",
                      "Tile",
                      "Transpose",
                      "Trilu",
                      "Unsqueeze",
                      "Where",
                      "Xor"};
const Names kFused{"BiasGelu",
                   "DequantizeLinear",
                   "DynamicQuantizeMatMul",
                   "FastGelu",
                   "FusedGemm",
                   "FusedMatMul",
                   "Gelu",
                   "MatMulIntegerToFloat",
                   "MatMulNBits",
                   "QGemm",
                   "QLinearAdd",
                   "QLinearConcat",
                   "QLinearMul",
                   "QLinearReduceMean",
                   "QLinearSigmoid",
                   "QLinearSoftmax",
                   "QLinearWhere",
                   "QuantizeLinear",
                   "QuickGelu",
                   "SkipLayerNormalization",
                   "SkipSimplifiedLayerNormalization"};
const Names kFusedStandard{"DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "SimplifiedLayerNormalization"};
const Names kOwn{"CachedAttention", "CausalConvolution", "ChunkNeuralMemory", "HyperConnection", "NeuralMemory"};

constexpr std::int64_t kFirstOpset = 18;
constexpr std::int64_t kLastOpset = 21;
constexpr std::int64_t kUnversioned = 1000;  // what ONNX Runtime writes for our operators
constexpr std::string_view kOwnDomain = "ai.titans";
constexpr std::string_view kFusedDomain = "com.microsoft";

bool has(const Names& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

class OperatorCheck {
 public:
  OperatorCheck(std::string_view file_name, bool compiled) : file_name_(file_name), compiled_(compiled) {}

  // The encoding has been checked, so the depth is bounded.
  void walk(Type type, WireMessage message) {
    if (type == Type::kOpset) return opset(message);
    if (type == Type::kNode) node(message);
    if (type == Type::kFunction) function(message);
    while (message.next()) {
      const Field* field = find_field(type, message.field());
      if (field == nullptr || field->kind != Kind::kMessage) continue;
      switch (field->message) {
        case Type::kGraph:
        case Type::kFunction:
        case Type::kNode:
        case Type::kAttribute:
        case Type::kOpset:
          walk(field->message, message.message());
          break;
        default:
          break;
      }
    }
  }

 private:
  void opset(WireMessage message) const {
    std::string_view domain;
    std::int64_t version = 0;
    while (message.next()) {
      if (message.is_bytes(1)) domain = message.bytes();
      if (message.is_number(2)) version = message.number();
    }
    const bool standard = domain.empty() && version >= kFirstOpset && version <= kLastOpset;
    const bool own = domain == kOwnDomain && (version == 1 || (compiled_ && version == kUnversioned));
    const bool fused = compiled_ && domain == kFusedDomain && version == 1;
    if (!standard && !own && !fused) refuse("operator set", domain, text(version));
  }

  void node(WireMessage message) const {
    std::string_view domain;
    std::string_view name;
    while (message.next()) {
      if (message.is_bytes(4)) name = message.bytes();
      if (message.is_bytes(7)) domain = message.bytes();
    }
    const bool standard = domain.empty() && (has(kStandard, name) || (compiled_ && has(kFusedStandard, name)));
    const bool own = domain == kOwnDomain && has(kOwn, name);
    const bool fused = compiled_ && domain == kFusedDomain && has(kFused, name);
    if (!standard && !own && !fused) refuse("operator", domain, name);
  }

  void function(WireMessage message) const {
    std::string_view domain;
    std::string_view name;
    while (message.next()) {
      if (message.is_bytes(1)) name = message.bytes();
      if (message.is_bytes(10)) domain = message.bytes();
    }
    if (domain != kOwnDomain || !has(kOwn, name)) refuse("function", domain, name);
  }

  [[noreturn]] void refuse(std::string_view what, std::string_view domain, std::string_view name) const {
    throw Error(
        TITANS_FAILED, "E0210", file_name_,
        text("unknown ", what, ": titans-export does not write ",
             domain.empty() ? "ai.onnx" : domain.substr(0, kLongestQuote), " ", quoted(name.substr(0, kLongestQuote))),
        R"(do not trust the source of this bundle, or open your own with operators="any")");
  }

  std::string_view file_name_;
  bool compiled_;
};

}  // namespace

void check_encoding(std::string_view model, std::string_view file_name) {
  EncodingCheck().message(Type::kModel, WireMessage(model, file_name));
}

void check_operators(std::string_view model, std::string_view file_name, bool compiled) {
  OperatorCheck(file_name, compiled).walk(Type::kModel, WireMessage(model, file_name));
}

}  // namespace titans::core
