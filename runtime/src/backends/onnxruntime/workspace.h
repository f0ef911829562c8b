// What one call of a graph binds: tokens, position and learn in host memory, the state's buffers, the logits.
#pragma once

#include <vector>

#include "backends/onnxruntime/placement.h"

namespace titans::core {

class OrtWorkspace final : public Workspace {
 public:
  OrtWorkspace(const OrtLibrary& library, const OrtMemoryInfo& host, Placement& placement, const Manifest& manifest);

  const float* logits(std::size_t first_row, std::size_t rows) override;
  void bind(const Call& call, std::size_t token_count);

  // What bind has set.
  const std::vector<const OrtValue*>& inputs() const { return inputs_; }
  std::vector<OrtValue*>& outputs() { return outputs_; }

 private:
  std::size_t row_bytes_;
  HostMemory tokens_;
  std::unique_ptr<LogitsMemory> logits_;
  HostMemory position_;
  HostMemory learn_;
  OrtHandle<OrtValue> position_value_;
  OrtHandle<OrtValue> learn_value_;
  std::vector<OrtHandle<OrtValue>> token_values_;  // one per graph, all over tokens_
  std::vector<OrtHandle<OrtValue>> logit_values_;  // one per graph, all over logits_
  std::vector<const OrtValue*> inputs_;
  std::vector<OrtValue*> outputs_;
};

}  // namespace titans::core
