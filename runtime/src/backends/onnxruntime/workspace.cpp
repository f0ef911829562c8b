#include "backends/onnxruntime/workspace.h"

#include <algorithm>
#include <cstring>

namespace titans::core {
namespace {

// Graphs are sorted, so the first one consumes most tokens.
std::size_t most_tokens(const Manifest& manifest) { return static_cast<std::size_t>(manifest.graphs[0].tokens); }

}  // namespace

OrtWorkspace::OrtWorkspace(const OrtLibrary& library, const OrtMemoryInfo& host, DeviceContext& context,
                           const Manifest& manifest)
    : manifest_(manifest),
      row_bytes_(static_cast<std::size_t>(manifest.output_size) * sizeof(float)),
      input_(most_tokens(manifest) * manifest.input_row_bytes()),
      output_(context.make_output(most_tokens(manifest) * row_bytes_)),
      position_(sizeof(std::int64_t)),
      learn_(sizeof(bool)),
      position_value_(view_tensor(library, host, position_.data(), position_.size(), DType::kInt64, {1})),
      learn_value_(view_tensor(library, host, learn_.data(), learn_.size(), DType::kBool, {1})),
      inputs_(3 + manifest.state.size()),
      outputs_(1 + manifest.state.size()) {
  for (const Graph& graph : manifest.graphs) {
    const auto count = static_cast<std::size_t>(graph.tokens);
    input_values_.push_back(view_tensor(library, host, input_.data(), count * manifest.input_row_bytes(),
                                        manifest.input_dtype(), manifest.input_shape(graph)));
    output_values_.push_back(view_tensor(library, output_->memory(), output_->data(), count * row_bytes_,
                                         DType::kFloat32, manifest.output_shape(graph)));
  }
}

const float* OrtWorkspace::output(std::size_t first_row, std::size_t rows) {
  return reinterpret_cast<const float*>(output_->read(first_row * row_bytes_, rows * row_bytes_));
}

void OrtWorkspace::bind(const Call& call) {
  const auto count = static_cast<std::size_t>(manifest_.graphs[call.graph].tokens);
  if (call.vectors != nullptr) {
    std::memcpy(input_.data(), call.vectors, count * manifest_.input_row_bytes());
  } else {
    std::copy_n(call.tokens, count, reinterpret_cast<std::int64_t*>(input_.data()));
  }
  std::memcpy(position_.data(), &call.position, sizeof(call.position));
  std::memcpy(learn_.data(), &call.learn, sizeof(call.learn));
  inputs_[0] = input_values_[call.graph].get();
  inputs_[1] = position_value_.get();
  inputs_[2] = learn_value_.get();
  outputs_[0] = output_values_[call.graph].get();
  for (std::size_t state = 0; state + 1 < outputs_.size(); ++state) {
    inputs_[3 + state] = static_cast<const StateBuffer*>(call.state[state])->value();
    outputs_[1 + state] = static_cast<const StateBuffer*>(call.next_state[state])->value();
  }
}

}  // namespace titans::core
