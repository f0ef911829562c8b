// The content of one stream in host memory, independent of a session.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/wipe.h"

namespace titans::core {

struct StreamState {
  std::uint64_t position = 0;
  bool learning = true;
  Floats last_output;          // one output row; undefined at position 0
  std::vector<Bytes> tensors;  // one per state tensor of the manifest

  std::uint64_t bytes() const {
    std::uint64_t sum = last_output.size() * sizeof(float);
    for (const Bytes& tensor : tensors) sum += tensor.size();
    return sum;
  }
};

// A non-owning view of a stream's content, to write it without a copy.
struct StateView {
  StateView() = default;
  StateView(const StreamState& state)  // NOLINT: a state is a view of itself
      : position(state.position),
        learning(state.learning),
        last_output(state.last_output.data()),
        outputs(state.last_output.size()) {
    for (const Bytes& tensor : state.tensors) tensors.push_back(tensor.data());
  }

  std::uint64_t position = 0;
  bool learning = true;
  const float* last_output = nullptr;
  std::size_t outputs = 0;
  std::vector<const std::byte*> tensors;  // one per state tensor of the manifest
};

}  // namespace titans::core
