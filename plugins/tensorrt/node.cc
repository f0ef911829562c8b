#include "plugins/tensorrt/node.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <string_view>

#include "plugins/tensorrt/logging.h"

namespace titans::plugins {
namespace {

using namespace titans::kernels;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

constexpr const char* kExport = "export the model again, or build the engine with titans-export build";
constexpr std::array<const char*, 3> kAliases{"declared", "undeclared", "two-buffers"};
// An engine keeps it, no graph has it.
constexpr const char* kBuiltFor = "built_for";

// ---- reading ----

struct Text {
  const char* name;
  std::string* value;
  bool required;
};

struct Integers {
  const char* name;
  std::vector<std::int64_t>* values;
  bool required;
};

const PluginField* find(const PluginFieldCollection& fields, const char* name) {
  for (std::int32_t i = 0; i < fields.nbFields; ++i) {
    if (fields.fields[i].name != nullptr && std::strcmp(fields.fields[i].name, name) == 0) return &fields.fields[i];
  }
  return nullptr;
}

std::string type_of(const PluginField& field) {
  return "field type " + std::to_string(static_cast<std::int32_t>(field.type));
}

// Sets `field` to nothing where one that may be missing is.
std::string look_up(const PluginFieldCollection& fields, const char* name, bool required, const PluginField*& field) {
  field = find(fields, name);
  if (field == nullptr) return required ? wrong("field " + std::string(name), "none", kExport) : std::string();
  if (field->length < 0 || (field->length > 0 && field->data == nullptr)) {
    return wrong("field " + std::string(name) + " with its values", "length " + std::to_string(field->length), kExport);
  }
  return {};
}

std::string read(const PluginFieldCollection& fields, const Text& text) {
  const PluginField* field = nullptr;
  std::string problem = look_up(fields, text.name, text.required, field);
  if (!problem.empty() || field == nullptr) return problem;
  if (field->type != PluginFieldType::kCHAR) {
    return wrong("field " + std::string(text.name) + " of characters", type_of(*field), kExport);
  }
  // TensorRT's parser counts the terminator, other callers do not.
  const std::string_view raw(static_cast<const char*>(field->data), static_cast<std::size_t>(field->length));
  *text.value = raw.substr(0, raw.find('\0'));
  return {};
}

std::string read(const PluginFieldCollection& fields, const Integers& integers) {
  const PluginField* field = nullptr;
  std::string problem = look_up(fields, integers.name, integers.required, field);
  if (!problem.empty() || field == nullptr) return problem;
  const auto copy = [&](const auto* values) { integers.values->assign(values, values + field->length); };
  if (field->type == PluginFieldType::kINT32) {
    copy(static_cast<const std::int32_t*>(field->data));
  } else if (field->type == PluginFieldType::kINT64) {
    copy(static_cast<const std::int64_t*>(field->data));
  } else {
    return wrong("field " + std::string(integers.name) + " of int32 or int64", type_of(*field), kExport);
  }
  return {};
}

std::string single(const char* name, const std::vector<std::int64_t>& values, std::int64_t& value) {
  if (values.size() != 1) {
    return wrong("one value in field " + std::string(name), std::to_string(values.size()), kExport);
  }
  value = values[0];
  return {};
}

// An int32 field holds the seed's 32 bits, which may have made it negative.
std::string unwrap(std::int64_t& seed) {
  if (seed < 0 && seed >= std::numeric_limits<std::int32_t>::min()) seed = static_cast<std::uint32_t>(seed);
  return {};
}

// ---- operands ----

std::string read_operands(const char* field, const std::string& names, std::size_t begin, std::size_t end,
                          std::vector<Operand>& operands) {
  operands.clear();
  for (std::size_t at = 0; at <= names.size();) {
    const std::size_t comma = std::min(names.find(',', at), names.size());
    const std::string name = names.substr(at, comma - at);
    at = comma + 1;
    std::size_t operand = begin;
    while (operand < end && name != kOperandNames[operand]) ++operand;
    if (operand == end) {
      return wrong("names of operands, separated by commas, in field " + std::string(field), "\"" + name + "\"",
                   kExport);
    }
    if (!operands.empty() && operand <= operands.back()) {
      return wrong("operands in the operator's order, each once, in field " + std::string(field), "\"" + names + "\"",
                   kExport);
    }
    operands.push_back(static_cast<Operand>(operand));
  }
  return {};
}

std::string check_presence(const Node& node) {
  const Configuration& c = node.configuration;
  const bool update = c.mode == Mode::kUpdate, any = update && c.schedule == Schedule::kAny;
  for (std::size_t i = 0; i < kOperands; ++i) {
    const auto operand = static_cast<Operand>(i);
    const bool given = node.input(operand) >= 0 || node.output(operand) >= 0;
    bool needed = false, allowed = true;
    switch (operand) {
      case kState:
      case kQ:
      case kY:
        needed = true;
        break;
      case kFill:
        needed = allowed = any;
        break;
      case kNormScale:
        needed = c.layer_norm;
        break;
      case kSlots:
        break;
      case kModulation:
      case kPrevious:
      case kPreviousGate:
      case kInitialWeights:
        allowed = false;  // they come with gates "chunk"
        break;
      case kLearn:
      case kValid:
      case kUpdateLimit:
      case kStats:
        allowed = update;
        break;
      default:
        needed = allowed = update;
    }
    const std::string name = kOperandNames[i];
    const std::string where = i < kInputs ? "field inputs" : "field outputs";
    if (needed && !given) return wrong(name + " in " + where, "none", kExport);
    if (given && !allowed) {
      return wrong("no " + name + " in " + where + " with mode \"" + node.attributes.mode + "\", schedule \"" +
                       node.attributes.schedule + "\"",
                   "one", kExport);
    }
  }
  return {};
}

int place(const std::vector<Operand>& operands, Operand operand) {
  const auto found = std::find(operands.begin(), operands.end(), operand);
  return found == operands.end() ? -1 : static_cast<int>(found - operands.begin());
}

std::string join(const std::vector<Operand>& operands) {
  std::string names;
  for (const Operand operand : operands) names += (names.empty() ? "" : ",") + std::string(kOperandNames[operand]);
  return names;
}

}  // namespace

int Node::input(Operand operand) const { return place(inputs, operand); }
int Node::output(Operand operand) const { return place(outputs, operand); }

std::string read_fields(const PluginFieldCollection& fields, Node& node) {
  for (std::int32_t i = 0; i < fields.nbFields; ++i) {
    const std::string name = fields.fields[i].name == nullptr ? "" : fields.fields[i].name;
    if (name != kBuiltFor && find(NodeFields::names(), name.c_str()) == nullptr) {
      return wrong("fields that this plugin knows", "\"" + name + "\"",
                   "use the plugin library of the release that made this model or engine");
    }
  }
  Attributes& a = node.attributes;
  std::string alias = kAliases[static_cast<std::size_t>(Alias::kTwoBuffers)], inputs, outputs;
  for (const Text& text :
       {Text{"mode", &a.mode, true}, Text{"schedule", &a.schedule, true}, Text{"activation", &a.activation, true},
        Text{"memory_dtype", &a.memory_dtype, false}, Text{"gates", &a.gates, false},
        Text{"rounding", &a.rounding, false}, Text{"alias", &alias, false}, Text{"inputs", &inputs, true},
        Text{"outputs", &outputs, true}}) {
    std::string problem = read(fields, text);
    if (!problem.empty()) return problem;
  }
  if (a.gates == "chunk") {
    return wrong("gates \"token\", which this plugin computes", "\"chunk\"",
                 "build the engine with titans-export build, which writes such a memory as standard operators");
  }
  std::vector<std::int64_t> residual{a.residual}, layer_norm{a.layer_norm}, chunk_size, seed{a.seed}, built_for;
  for (const Integers& integers : {Integers{"widths", &a.widths, true}, Integers{"chunk_size", &chunk_size, true},
                                   Integers{"residual", &residual, false}, Integers{"layer_norm", &layer_norm, false},
                                   Integers{"seed", &seed, false}, Integers{kBuiltFor, &built_for, false}}) {
    std::string problem = read(fields, integers);
    if (!problem.empty()) return problem;
  }
  for (const std::string& problem :
       {single("residual", residual, a.residual), single("layer_norm", layer_norm, a.layer_norm),
        single("chunk_size", chunk_size, a.chunk_size), single("seed", seed, a.seed), unwrap(a.seed),
        configure(a, node.configuration), read_operands("inputs", inputs, kState, kInputs, node.inputs),
        read_operands("outputs", outputs, kY, kOperands, node.outputs)}) {
    if (!problem.empty()) return problem;
  }
  const auto* known = std::find(kAliases.begin(), kAliases.end(), alias);
  if (known == kAliases.end()) {
    return wrong("field alias to be \"declared\" or \"undeclared\" or \"two-buffers\"", "\"" + alias + "\"", kExport);
  }
  node.alias = static_cast<Alias>(known - kAliases.begin());
  if (built_for.size() == 3) {
    node.built_for = {static_cast<int>(built_for[0]), static_cast<int>(built_for[1]),
                      static_cast<std::size_t>(built_for[2])};
  } else if (!built_for.empty()) {
    return wrong("3 values in field built_for", std::to_string(built_for.size()), "build the engine again");
  }
  return check_presence(node);
}

NodeFields::NodeFields(const Node& node) {
  const Attributes& a = node.attributes;
  const CudaDevice& device = node.built_for;
  add_text("mode", a.mode);
  add_text("schedule", a.schedule);
  add_text("activation", a.activation);
  add_text("memory_dtype", a.memory_dtype);
  add_text("gates", a.gates);
  add_text("rounding", a.rounding);
  add_integers("widths", {a.widths.begin(), a.widths.end()});
  add_integers("residual", {static_cast<std::int32_t>(a.residual)});
  add_integers("layer_norm", {static_cast<std::int32_t>(a.layer_norm)});
  add_integers("chunk_size", {static_cast<std::int32_t>(a.chunk_size)});
  add_integers("seed", {static_cast<std::int32_t>(a.seed)});
  add_text("alias", kAliases[static_cast<std::size_t>(node.alias)]);
  add_text("inputs", join(node.inputs));
  add_text("outputs", join(node.outputs));
  if (device.sm != 0) {
    add_integers(kBuiltFor, {device.sm, device.multiprocessors, static_cast<std::int32_t>(device.shared_bytes)});
  }
  collection_.nbFields = static_cast<std::int32_t>(fields_.size());
  collection_.fields = fields_.data();
}

void NodeFields::add_text(const char* name, const std::string& value) {
  const std::string& kept = texts_.emplace_back(value);
  fields_.emplace_back(name, kept.c_str(), PluginFieldType::kCHAR, static_cast<std::int32_t>(kept.size()) + 1);
  text_ += (text_.empty() ? "" : " ") + std::string(name) + "=" + value;
}

void NodeFields::add_integers(const char* name, std::vector<std::int32_t> values) {
  const std::vector<std::int32_t>& kept = integers_.emplace_back(std::move(values));
  fields_.emplace_back(name, kept.data(), PluginFieldType::kINT32, static_cast<std::int32_t>(kept.size()));
  text_ += " " + std::string(name) + "=";
  for (std::size_t i = 0; i < kept.size(); ++i) text_ += (i == 0 ? "" : "x") + std::to_string(kept[i]);
}

const PluginFieldCollection& NodeFields::names() {
  static const std::array<PluginField, 14> fields{{{"mode", nullptr, PluginFieldType::kCHAR},
                                                   {"schedule", nullptr, PluginFieldType::kCHAR},
                                                   {"activation", nullptr, PluginFieldType::kCHAR},
                                                   {"memory_dtype", nullptr, PluginFieldType::kCHAR},
                                                   {"gates", nullptr, PluginFieldType::kCHAR},
                                                   {"rounding", nullptr, PluginFieldType::kCHAR},
                                                   {"widths", nullptr, PluginFieldType::kINT32},
                                                   {"residual", nullptr, PluginFieldType::kINT32},
                                                   {"layer_norm", nullptr, PluginFieldType::kINT32},
                                                   {"chunk_size", nullptr, PluginFieldType::kINT32},
                                                   {"seed", nullptr, PluginFieldType::kINT32},
                                                   {"alias", nullptr, PluginFieldType::kCHAR},
                                                   {"inputs", nullptr, PluginFieldType::kCHAR},
                                                   {"outputs", nullptr, PluginFieldType::kCHAR}}};
  static const PluginFieldCollection collection{static_cast<std::int32_t>(fields.size()), fields.data()};
  return collection;
}

}  // namespace titans::plugins
