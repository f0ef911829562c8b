// Calls of the operator from a safetensors file: `state` and, for each call, its operands by name ("0.q", "0.k", ...,
// "1.q", ...); its metadata are `calls`, their number, and `attributes`, the node's attributes as JSON.
#pragma once

#include <cstddef>
#include <map>
#include <string>

#include <nlohmann/json.hpp>

#include "plugins/kernels/neural_memory.h"

namespace titans::kernels {

// Memory on a cache line, NaN before anything is written, so that what is never written is seen.
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

// Throws std::runtime_error where the file is not one.
struct CaseFile {
  explicit CaseFile(const std::string& path);

  Attributes node_attributes() const;
  // The inputs of a call, but for `state`.
  Operands inputs(std::size_t call) const;

  std::size_t calls = 0;
  nlohmann::json attributes;
  std::map<std::string, Tensor> tensors;
  std::map<std::string, HostBuffer> memory;
};

// A tensor of float32 over memory of somebody else's.
Tensor float_tensor(void* data, std::initializer_list<std::int64_t> shape);

}  // namespace titans::kernels
