// What one call of a graph binds: tokens or vectors, position and learn in host memory, the state's buffers, the
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

  // What bind has set.
  const std::vector<const OrtValue*>& inputs() const { return inputs_; }
  std::vector<OrtValue*>& outputs() { return outputs_; }

 private:
  const Manifest& manifest_;
  std::size_t row_bytes_;  // of the output
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
