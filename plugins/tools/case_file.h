// Calls of a memory operator from a safetensors file. It has `state` and each call's operands by name ("0.q", "0.k",
// ..., "1.q", ...). The metadata are `calls` (their number), `operator` ("NeuralMemory", which is the default, or
// "ChunkNeuralMemory") and `attributes` (the node's attributes as JSON).
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "plugins/kernels/chunk_neural_memory.h"
#include "plugins/kernels/neural_memory.h"

namespace titans::kernels {

// Memory aligned to a cache line and filled with NaN, so that tests detect values that are never written.
class HostBuffer {
 public:
  explicit HostBuffer(std::size_t bytes);
  ~HostBuffer();
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;
  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_;
  std::size_t bytes_;
};

struct CaseFile {
  // Throws std::runtime_error if the file is not a safetensors file.
  explicit CaseFile(const std::string& path);

  // The node's configuration, a Configuration or a ChunkConfiguration, and its raw attributes. Both throw
  // std::runtime_error.
  template <class Configuration>
  Configuration configuration() const;
  template <class Attributes, class Table>
  Attributes read(const char* where, const Table& table) const;

  // The inputs of a call, without `state`.
  Operands inputs(std::size_t call) const;

  std::size_t calls = 0;
  std::string op = "NeuralMemory";
  nlohmann::json attributes;
  std::map<std::string, Tensor> tensors;
  std::map<std::string, HostBuffer> memory;
};

// A float32 tensor in the caller's memory.
Tensor float_tensor(void* data, std::initializer_list<std::int64_t> shape);

inline void throw_error(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

template <class Attributes, class Table>
Attributes CaseFile::read(const char* where, const Table& table) const {
  for (const auto& [name, value] : attributes.items()) {
    if (has_attribute(table, name)) continue;
    throw_error(failure(where, "E0701", "invalid attribute " + name + ": the operator has none of this name",
                        "write the case again"));
  }
  Attributes read;
  throw_error(read_all(where, table, read, [&](const char* name, auto& value) {
    const auto found = attributes.find(name);
    if (found == attributes.end()) return false;
    if constexpr (std::is_same_v<std::decay_t<decltype(value)>, std::optional<std::int64_t>>) {
      value = found->template get<std::int64_t>();
    } else {
      found->get_to(value);
    }
    return true;
  }));
  return read;
}

template <class Configuration>
Configuration CaseFile::configuration() const {
  using Attributes = typename Configuration::Attributes;
  Configuration configuration;
  throw_error(configure(read<Attributes>(Configuration::kOperator, attribute_table(Attributes())), configuration));
  return configuration;
}

}  // namespace titans::kernels
