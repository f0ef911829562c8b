// The values bound for one call: tokens or vectors, position and learn flag in host memory, the state buffers and the
// output.
#pragma once

#include <vector>

#include "backends/onnxruntime/device_context.h"

namespace titans::core {

class OrtWorkspace final : public Workspace {
 public:
  OrtWorkspace(const OrtLibrary& library, const OrtMemoryInfo& host, DeviceContext& context, const Manifest& manifest);

  const float* output(std::size_t first_row, std::size_t rows) override;
  void bind(const Call& call);

  // Set by bind.
  const std::vector<const OrtValue*>& inputs() const { return inputs_; }
  std::vector<OrtValue*>& outputs() { return outputs_; }

 private:
  const Manifest& manifest_;
  std::size_t row_bytes_;  // of one output row
  HostMemory input_;
  std::unique_ptr<OutputMemory> output_;
  HostMemory position_;
  HostMemory learn_;
  OrtHandle<OrtValue> position_value_;
  OrtHandle<OrtValue> learn_value_;
  std::vector<OrtHandle<OrtValue>> input_values_;   // one per graph, all over input_
  std::vector<OrtHandle<OrtValue>> output_values_;  // one per graph, all over output_
  std::vector<const OrtValue*> inputs_;
  std::vector<OrtValue*> outputs_;
};

}  // namespace titans::core
