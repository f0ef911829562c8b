#include "tensorrt_plugin_fields.h"

#include <algorithm>

namespace titans::plugin_host {

using namespace nvinfer1;

Fields::Fields(const kernels::Attributes& a, const std::string& inputs, const std::string& outputs,
               const std::string& alias) {
  kernels::write_all(kernels::kAttributes, a, [this](const char* name, const auto& value) { set_value(name, value); });
  set_text("alias", alias);
  set_text("inputs", inputs);
  set_text("outputs", outputs);
}

Fields::Fields(const PluginFieldCollection& collection) {
  for (std::int32_t i = 0; i < collection.nbFields; ++i) {
    const PluginField& field = collection.fields[i];
    const std::size_t size = field.type == PluginFieldType::kCHAR ? 1 : field.type == PluginFieldType::kINT64 ? 8 : 4;
    const auto length = static_cast<std::size_t>(field.length);
    set(field.name, field.type, length, field.data, length * size);
  }
}

void Fields::set(const std::string& name, PluginFieldType type, std::size_t length, const void* data,
                 std::size_t bytes) {
  remove(name);
  const auto* begin = static_cast<const std::uint8_t*>(data);
  fields_.push_back({name, type, static_cast<std::int32_t>(length), {begin, begin + bytes}});
}

void Fields::set_text(const std::string& name, const std::string& value, bool terminated) {
  const std::size_t length = value.size() + (terminated ? 1 : 0);
  set(name, PluginFieldType::kCHAR, length, value.c_str(), length);
}

void Fields::set_int32(const std::string& name, const std::vector<std::int32_t>& values) {
  set(name, PluginFieldType::kINT32, values.size(), values.data(), values.size() * sizeof(values[0]));
}

void Fields::set_int64(const std::string& name, const std::vector<std::int64_t>& values) {
  set(name, PluginFieldType::kINT64, values.size(), values.data(), values.size() * sizeof(values[0]));
}

void Fields::set_float(const std::string& name, float value) {
  set(name, PluginFieldType::kFLOAT32, 1, &value, sizeof(value));
}

void Fields::set_value(const std::string& name, const std::string& value) { set_text(name, value); }
void Fields::set_value(const std::string& name, std::int64_t value) {
  set_int32(name, {static_cast<std::int32_t>(value)});
}
void Fields::set_value(const std::string& name, const std::optional<std::int64_t>& value) {
  if (value) set_value(name, *value);
}
void Fields::set_value(const std::string& name, float value) { set_float(name, value); }
void Fields::set_value(const std::string& name, const std::vector<std::int64_t>& values) {
  set_int32(name, {values.begin(), values.end()});
}

void Fields::remove(const std::string& name) {
  const auto is_it = [&](const Field& field) { return field.name == name; };
  fields_.erase(std::remove_if(fields_.begin(), fields_.end(), is_it), fields_.end());
}

bool Fields::has(const std::string& name) const {
  return std::any_of(fields_.begin(), fields_.end(), [&](const Field& field) { return field.name == name; });
}

const PluginFieldCollection& Fields::collection() {
  view_.clear();
  for (const Field& field : fields_) {
    view_.emplace_back(field.name.c_str(), field.bytes.data(), field.type, field.length);
  }
  collection_.nbFields = static_cast<std::int32_t>(view_.size());
  collection_.fields = view_.data();
  return collection_;
}

// ---- tensors ----

Dims dims(const std::vector<std::int64_t>& shape) {
  Dims out{};
  out.nbDims = static_cast<std::int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), out.d);
  return out;
}

std::vector<std::int64_t> shape_of(const Dims& dims) { return {dims.d, dims.d + dims.nbDims}; }

PluginTensorDesc tensor(DataType type, const std::vector<std::int64_t>& shape) {
  PluginTensorDesc out{};
  out.dims = dims(shape);
  out.type = type;
  out.format = TensorFormat::kLINEAR;
  out.scale = -1.0F;
  return out;
}

DynamicPluginTensorDesc open_tensor(const Range& range) {
  std::vector<std::int64_t> open = range.most;
  for (std::size_t i = 0; i < open.size(); ++i) {
    if (range.least[i] != range.most[i]) open[i] = -1;
  }
  DynamicPluginTensorDesc out{};
  out.desc = tensor(range.type, open);
  out.min = dims(range.least);
  out.opt = dims(range.typical);
  out.max = dims(range.most);
  return out;
}

}  // namespace titans::plugin_host
