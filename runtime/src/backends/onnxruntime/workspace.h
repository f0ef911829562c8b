// The values bound for one call: tokens or vectors and the controls in host memory, the state buffers and the output.
#pragma once

#include <optional>
#include <vector>

#include "backends/onnxruntime/device_context.h"

namespace titans::core {

// The most streams of one call: matmuls of so many rows read each weight often enough.
inline constexpr std::size_t kMostStreams = 64;

class OrtWorkspace final : public Workspace {
 public:
  OrtWorkspace(const OrtLibrary& library, const OrtMemoryInfo& host, DeviceContext& context, const Manifest& manifest);

  const float* output(std::size_t first_row, std::size_t rows) override;
  void bind(const Call& call);
  // Binds `count` calls of one graph, whose state lies in pools, as one call.
  void bind_together(const Call* calls, std::size_t count);

  // Set by bind.
  const std::vector<const OrtValue*>& inputs() const { return inputs_; }
  std::vector<OrtValue*>& outputs() { return outputs_; }

 private:
  // The values of a call, other than the state.
  struct Values {
    OrtHandle<OrtValue> input, output, position, learn, valid, slots;
  };
  Values make_values(const Graph& graph, std::size_t streams) const;
  // Makes room for calls with so many tokens over all streams.
  void reserve(std::size_t rows);
  void write(const Call& call, std::size_t stream, std::size_t slot);
  void use(const Values& values);

  const OrtLibrary& library_;
  const OrtMemoryInfo& host_;
  DeviceContext& context_;
  const Manifest& manifest_;
  std::size_t row_bytes_;  // of one output row
  std::size_t rows_ = 0;   // of input_ and output_
  std::unique_ptr<HostMemory> input_;
  std::unique_ptr<OutputMemory> output_;
  HostMemory positions_, learn_, valid_, slots_;  // one per stream
  std::vector<Values> singles_;                   // of one stream, one per graph
  std::optional<Values> together_;                // of the last call of several streams
  std::size_t pool_slots_ = 0;                    // of pools_
  std::vector<OrtHandle<OrtValue>> pools_;        // one per state tensor
  std::vector<const OrtValue*> inputs_;
  std::vector<OrtValue*> outputs_;
};

}  // namespace titans::core
