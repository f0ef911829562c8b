// What a plugin is made of and what an engine keeps of it: the node's attributes, which operands it has, how its state
// is bound. Fields of TensorRT are read and written here and nowhere else.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "plugins/kernels/neural_memory.h"
#include "plugins/kernels/neural_memory_cuda.h"

namespace titans::plugins {

// How state_out gets the buffer of state.
enum class Alias : std::uint8_t {
  kDeclared,    // TensorRT is told, and may insert copies
  kUndeclared,  // TensorRT is not told; who runs the engine binds one address to both
  kTwoBuffers,  // it does not
};

struct Node {
  kernels::Attributes attributes;
  kernels::Configuration configuration;
  Alias alias = Alias::kTwoBuffers;
  std::vector<kernels::Operand> inputs, outputs;  // in the order of the plugin's tensors, which is the operator's
  kernels::CudaDevice built_for;                  // whose workspace the engine reserves; all 0: not known

  // The place of an operand among the inputs or outputs, or -1.
  int input(kernels::Operand operand) const;
  int output(kernels::Operand operand) const;
};

// Returns what is wrong, or an empty string.
std::string read_fields(const nvinfer1::PluginFieldCollection& fields, Node& node);

// The fields that describe a node, and the same as a line of text.
class NodeFields {
 public:
  explicit NodeFields(const Node& node);
  NodeFields(const NodeFields&) = delete;
  NodeFields& operator=(const NodeFields&) = delete;

  const nvinfer1::PluginFieldCollection& collection() const { return collection_; }
  const std::string& text() const { return text_; }

  // Names and types of what a node of a graph may have.
  static const nvinfer1::PluginFieldCollection& names();

 private:
  void add_text(const char* name, const std::string& value);
  void add_integers(const char* name, std::vector<std::int32_t> values);

  // Fields point to what is in here, so it must not move.
  std::deque<std::string> texts_;
  std::deque<std::vector<std::int32_t>> integers_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
  std::string text_;
};

}  // namespace titans::plugins
