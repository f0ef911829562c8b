// A plugin's attributes, which an engine stores: the node's attributes, its operands, and the binding of its state. All
// access to TensorRT's fields is here.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "plugins/kernels/neural_memory.h"
#include "plugins/kernels/neural_memory_cuda.h"

namespace titans::plugins {

// How state_out gets the buffer of state.
enum class Alias : std::uint8_t {
  kDeclared,    // declared to TensorRT, which may insert copies
  kUndeclared,  // not declared; the executor binds one address to both
  kTwoBuffers,  // not shared
};

struct PluginAttributes {
  kernels::Attributes node;
  kernels::Configuration configuration;
  Alias alias = Alias::kTwoBuffers;
  std::vector<kernels::Operand> inputs, outputs;  // in the plugin's tensor order, which is the operator's
  kernels::CudaDevice built_for;                  // the engine reserves workspace for it; all 0: unknown

  // The index of an operand among the plugin's inputs or outputs, or -1.
  int input(kernels::Operand operand) const;
  int output(kernels::Operand operand) const;
};

// Returns an error, or an empty string.
std::string read_fields(const nvinfer1::PluginFieldCollection& fields, PluginAttributes& attributes);

// The plugin's fields, also as a line of text.
class PluginFields {
 public:
  explicit PluginFields(const PluginAttributes& attributes);
  PluginFields(const PluginFields&) = delete;
  PluginFields& operator=(const PluginFields&) = delete;

  const nvinfer1::PluginFieldCollection& collection() const { return collection_; }
  const std::string& text() const { return text_; }

  // The names and types of the fields that a graph may have.
  static const nvinfer1::PluginFieldCollection& names();

 private:
  void add(const char* name, const std::string& value);
  void add(const char* name, std::int64_t value) { add(name, std::vector{value}); }
  void add(const char* name, const std::optional<std::int64_t>& value) {
    if (value) add(name, *value);
  }
  void add(const char* name, float value);
  void add(const char* name, const std::vector<std::int64_t>& values);

  // Fields point to these members, so an object must not move.
  std::deque<std::string> texts_;
  std::deque<std::vector<std::int32_t>> integers_;
  std::deque<float> reals_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
  std::string text_;
};

}  // namespace titans::plugins
