// Fields and tensors as TensorRT passes them to a plugin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "plugins/kernels/neural_memory.h"

namespace titans::plugin_host {

// Fields that own their memory, from a graph or from an engine.
class Fields {
 public:
  Fields() = default;
  // Fields like TensorRT's parser makes them: integers are int32, and the length of a string includes its NUL.
  Fields(const kernels::Attributes& attributes, const std::string& inputs, const std::string& outputs,
         const std::string& alias);
  explicit Fields(const nvinfer1::PluginFieldCollection& collection);

  // Replaces or adds the field of that name.
  void set_text(const std::string& name, const std::string& value, bool terminated = true);
  void set_int32(const std::string& name, const std::vector<std::int32_t>& values);
  void set_int64(const std::string& name, const std::vector<std::int64_t>& values);
  void set_float(const std::string& name, float value);
  // Converts the value like the parser does for an attribute of this type.
  void set_value(const std::string& name, const std::string& value);
  void set_value(const std::string& name, std::int64_t value);
  void set_value(const std::string& name, const std::optional<std::int64_t>& value);
  void set_value(const std::string& name, float value);
  void set_value(const std::string& name, const std::vector<std::int64_t>& values);
  void remove(const std::string& name);
  bool has(const std::string& name) const;

  // Valid until the next change.
  const nvinfer1::PluginFieldCollection& collection();

 private:
  struct Field {
    std::string name;
    nvinfer1::PluginFieldType type;
    std::int32_t length;
    std::vector<std::uint8_t> bytes;
  };
  void set(const std::string& name, nvinfer1::PluginFieldType type, std::size_t length, const void* data,
           std::size_t bytes);

  std::vector<Field> fields_;
  std::vector<nvinfer1::PluginField> view_;
  nvinfer1::PluginFieldCollection collection_{};
};

nvinfer1::Dims dims(const std::vector<std::int64_t>& shape);
nvinfer1::PluginTensorDesc tensor(nvinfer1::DataType type, const std::vector<std::int64_t>& shape);
std::vector<std::int64_t> shape_of(const nvinfer1::Dims& dims);

// An input over one optimization profile. Sizes that differ between the bounds are dynamic.
struct Range {
  nvinfer1::DataType type;
  std::vector<std::int64_t> least, typical, most;
};
nvinfer1::DynamicPluginTensorDesc open_tensor(const Range& range);

}  // namespace titans::plugin_host
