#include "plugins/tensorrt/plugin_attributes.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <string_view>
#include <type_traits>

#include "plugins/tensorrt/logging.h"

namespace titans::plugins {
namespace {

using namespace titans::kernels;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

constexpr const char* kExport = "export the model again, or build the engine with titans-export build";
constexpr std::array kAliases{"declared", "undeclared", "two-buffers"};
// Engines store this field; graphs do not have it.
constexpr const char* kBuiltFor = "built_for";

std::string invalid(const std::string& name, const std::string& problem) {
  return failure(Configuration::kOperator, "E0714", "invalid plugin field " + name + ": " + problem, kExport);
}

// ---- reading ----

const PluginField* find(const PluginFieldCollection& fields, const char* name) {
  for (std::int32_t i = 0; i < fields.nbFields; ++i) {
    if (fields.fields[i].name != nullptr && std::strcmp(fields.fields[i].name, name) == 0) return &fields.fields[i];
  }
  return nullptr;
}

// Reads fields by name. Each read() sets the value if the field is present, and returns whether it is. `error` keeps
// the first error.
class FieldReader {
 public:
  explicit FieldReader(const PluginFieldCollection& fields) : fields_(fields) {}

  bool read(const char* name, std::string& value) {
    const PluginField* field = look_up(name);
    if (field == nullptr) return false;
    if (field->type != PluginFieldType::kCHAR) return fail(name, expected("characters", type_of(*field)));
    // TensorRT's parser counts the terminator; other callers do not.
    const std::string_view raw(static_cast<const char*>(field->data), static_cast<std::size_t>(field->length));
    value = raw.substr(0, raw.find('\0'));
    return true;
  }

  bool read(const char* name, std::vector<std::int64_t>& values) {
    const PluginField* field = look_up(name);
    if (field == nullptr) return false;
    const auto copy = [&](const auto* from) { values.assign(from, from + field->length); };
    if (field->type == PluginFieldType::kINT32) {
      copy(static_cast<const std::int32_t*>(field->data));
    } else if (field->type == PluginFieldType::kINT64) {
      copy(static_cast<const std::int64_t*>(field->data));
    } else {
      return fail(name, expected("int32 or int64", type_of(*field)));
    }
    return true;
  }

  bool read(const char* name, std::int64_t& value) {
    std::vector<std::int64_t> values;
    const bool found = read(name, values);
    if (!found || !error.empty()) return found;
    if (values.size() != 1) return fail(name, expected("one value", std::to_string(values.size())));
    value = values[0];
    return true;
  }

  bool read(const char* name, std::optional<std::int64_t>& value) {
    std::int64_t number = 0;
    if (!read(name, number)) return false;
    value = number;
    return true;
  }

  bool read(const char* name, float& value) {
    const PluginField* field = look_up(name);
    if (field == nullptr) return false;
    if (field->type != PluginFieldType::kFLOAT32 || field->length != 1) {
      return fail(name, expected("one float32", type_of(*field)));
    }
    value = *static_cast<const float*>(field->data);
    return true;
  }

  std::string error;

 private:
  // Returns true, so that an invalid field is not reported as missing too.
  bool fail(const std::string& name, const std::string& problem) {
    if (error.empty()) error = invalid(name, problem);
    return true;
  }

  // Returns null if the field is missing or has no values.
  const PluginField* look_up(const char* name) {
    const PluginField* field = find(fields_, name);
    if (field == nullptr || (field->length >= 0 && (field->length == 0 || field->data != nullptr))) return field;
    fail(name, "it has no values but length " + std::to_string(field->length));
    return nullptr;
  }

  static std::string type_of(const PluginField& field) {
    return "field type " + std::to_string(static_cast<std::int32_t>(field.type));
  }

  const PluginFieldCollection& fields_;
};

// An int32 field holds the seed's 32 bits, so the value may be negative.
void unwrap(std::int64_t& seed) {
  if (seed < 0 && seed >= std::numeric_limits<std::int32_t>::min()) seed = static_cast<std::uint32_t>(seed);
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
    if (operand == end) return invalid(field, expected("names of operands, separated by commas", "\"" + name + "\""));
    if (!operands.empty() && operand <= operands.back()) {
      return invalid(field, expected("operands in the operator's order, each once", "\"" + names + "\""));
    }
    operands.push_back(static_cast<Operand>(operand));
  }
  return {};
}

std::string check_presence(const PluginAttributes& attributes) {
  const Configuration& c = attributes.configuration;
  const bool update = c.mode == Mode::kUpdate, any = update && c.schedule == Schedule::kAny;
  const auto check = [&](Operand operand, const char* field) -> std::string {
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
      case kLearn:
      case kValid:
      case kUpdateLimit:
      case kStats:
        allowed = update;
        break;
      default:
        needed = allowed = update;
    }
    const bool given = attributes.input(operand) >= 0 || attributes.output(operand) >= 0;
    const std::string name = kOperandNames[operand];
    if (needed && !given) {
      return failure(Configuration::kOperator, "E0703", "missing operand: " + name + " in field " + field, kExport);
    }
    if (given && !allowed) {
      return failure(Configuration::kOperator, "E0704",
                     "unexpected operand: " + name + " in field " + field + " with mode \"" + attributes.node.mode +
                         "\", schedule \"" + attributes.node.schedule + "\"",
                     kExport);
    }
    return {};
  };
  std::string problem;
  for (std::size_t i = 0; i < Configuration::kInputCount && problem.empty(); ++i) {
    problem = check(static_cast<Operand>(i), "inputs");
  }
  for (std::size_t i = 0; i < Configuration::kOutputCount && problem.empty(); ++i) {
    problem = check(static_cast<Operand>(kY + i), "outputs");
  }
  return problem;
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

int PluginAttributes::input(Operand operand) const { return place(inputs, operand); }
int PluginAttributes::output(Operand operand) const { return place(outputs, operand); }

std::string read_fields(const PluginFieldCollection& fields, PluginAttributes& attributes) {
  for (std::int32_t i = 0; i < fields.nbFields; ++i) {
    const std::string name = fields.fields[i].name == nullptr ? "" : fields.fields[i].name;
    if (name == kBuiltFor || find(PluginFields::names(), name.c_str()) != nullptr) continue;
    return failure(Configuration::kOperator, "E0714",
                   "invalid plugin field \"" + name + "\": the plugin has none of this name",
                   "use the plugin library of the release that made this model or engine");
  }
  FieldReader reader(fields);
  std::string problem = read_all(Configuration::kOperator, kAttributes, attributes.node,
                                 [&](const char* name, auto& value) { return reader.read(name, value); });
  std::string alias = kAliases[static_cast<std::size_t>(Alias::kTwoBuffers)], inputs, outputs;
  std::vector<std::int64_t> built_for;
  reader.read("alias", alias);
  reader.read(kBuiltFor, built_for);
  for (const auto& [name, value] : {std::pair{"inputs", &inputs}, std::pair{"outputs", &outputs}}) {
    if (reader.read(name, *value) || !problem.empty()) continue;
    problem =
        failure(Configuration::kOperator, "E0703", "missing attribute: plugin field " + std::string(name), kExport);
  }
  if (problem.empty()) problem = reader.error;
  if (!problem.empty()) return problem;
  unwrap(attributes.node.seed);
  problem = configure(attributes.node, attributes.configuration);
  constexpr std::size_t kLastOutput = kY + Configuration::kOutputCount;
  if (problem.empty()) {
    problem = read_operands("inputs", inputs, kState, Configuration::kInputCount, attributes.inputs);
  }
  if (problem.empty()) problem = read_operands("outputs", outputs, kY, kLastOutput, attributes.outputs);
  if (!problem.empty()) return problem;
  const auto* known = std::find(kAliases.begin(), kAliases.end(), alias);
  if (known == kAliases.end()) {
    return invalid("alias", expected("\"declared\" or \"undeclared\" or \"two-buffers\"", "\"" + alias + "\""));
  }
  attributes.alias = static_cast<Alias>(known - kAliases.begin());
  if (built_for.size() == 3) {
    attributes.built_for = {static_cast<int>(built_for[0]), static_cast<int>(built_for[1]),
                            static_cast<std::size_t>(built_for[2])};
  } else if (!built_for.empty()) {
    return invalid(kBuiltFor, expected("3 values", std::to_string(built_for.size())));
  }
  return check_presence(attributes);
}

PluginFields::PluginFields(const PluginAttributes& attributes) {
  write_all(kAttributes, attributes.node, [&](const char* name, const auto& value) { add(name, value); });
  add("alias", kAliases[static_cast<std::size_t>(attributes.alias)]);
  add("inputs", join(attributes.inputs));
  add("outputs", join(attributes.outputs));
  const CudaDevice& device = attributes.built_for;
  if (device.sm != 0)
    add(kBuiltFor,
        std::vector<std::int64_t>{device.sm, device.multiprocessors, static_cast<std::int64_t>(device.shared_bytes)});
  collection_.nbFields = static_cast<std::int32_t>(fields_.size());
  collection_.fields = fields_.data();
}

void PluginFields::add(const char* name, const std::string& value) {
  const std::string& kept = texts_.emplace_back(value);
  fields_.emplace_back(name, kept.c_str(), PluginFieldType::kCHAR, static_cast<std::int32_t>(kept.size()) + 1);
  text_ += std::string(name) + "=" + value + " ";
}

void PluginFields::add(const char* name, const std::vector<std::int64_t>& values) {
  std::vector<std::int32_t>& kept = integers_.emplace_back();
  for (const std::int64_t value : values) kept.push_back(static_cast<std::int32_t>(value));
  fields_.emplace_back(name, kept.data(), PluginFieldType::kINT32, static_cast<std::int32_t>(kept.size()));
  text_ += std::string(name) + "=";
  for (std::size_t i = 0; i < kept.size(); ++i) text_ += (i == 0 ? "" : "x") + std::to_string(kept[i]);
  text_ += " ";
}

void PluginFields::add(const char* name, float value) {
  fields_.emplace_back(name, &reals_.emplace_back(value), PluginFieldType::kFLOAT32, 1);
  text_ += std::string(name) + "=" + std::to_string(value) + " ";
}

const PluginFieldCollection& PluginFields::names() {
  static const std::vector<PluginField> fields = [] {
    std::vector<PluginField> all;
    write_all(kAttributes, Attributes(), [&](const char* name, const auto& value) {
      using Value = std::decay_t<decltype(value)>;
      constexpr bool kText = std::is_same_v<Value, std::string>, kReal = std::is_same_v<Value, float>;
      all.emplace_back(name, nullptr,
                       kText   ? PluginFieldType::kCHAR
                       : kReal ? PluginFieldType::kFLOAT32
                               : PluginFieldType::kINT32);
    });
    for (const char* name : {"alias", "inputs", "outputs"}) all.emplace_back(name, nullptr, PluginFieldType::kCHAR);
    return all;
  }();
  static const PluginFieldCollection collection{static_cast<std::int32_t>(fields.size()), fields.data()};
  return collection;
}

}  // namespace titans::plugins
