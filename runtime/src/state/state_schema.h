// The model and state tensors that a state file must match, independent of a session.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "bundle/manifest.h"

namespace titans::core {

struct StateSchema {
  StateSchema(const Manifest& manifest, std::string backend, std::string device);

  std::string model;    // JSON: name, variant and the hash that decides whether a state is of this model
  std::string memory;   // JSON: dtype, rounding and seed of the memories
  std::string backend;  // recorded in files, not compared
  std::string device;
  std::vector<StateTensor> tensors;
  std::size_t outputs;  // floats of the last output row

  // Bytes of a state's tensors in memory.
  std::uint64_t bytes() const;
};

}  // namespace titans::core
