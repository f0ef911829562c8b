#include "backends/onnxruntime/workspace.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace titans::core {
namespace {

std::size_t tokens_of(const Graph& graph) { return static_cast<std::size_t>(graph.tokens); }

std::size_t streams_of(const Manifest& manifest) { return manifest.takes_streams() ? kMostStreams : 1; }

}  // namespace

OrtWorkspace::OrtWorkspace(const OrtLibrary& library, const OrtMemoryInfo& host, DeviceContext& context,
                           const Manifest& manifest)
    : library_(library),
      host_(host),
      context_(context),
      manifest_(manifest),
      row_bytes_(static_cast<std::size_t>(manifest.output_size) * sizeof(float)),
      positions_(streams_of(manifest) * sizeof(std::int64_t)),
      learn_(streams_of(manifest) * sizeof(bool)),
      valid_(streams_of(manifest) * sizeof(std::int64_t)),
      slots_(streams_of(manifest) * sizeof(std::int64_t)) {
  const std::size_t controls = 3 + (manifest.valid_input.empty() ? 0 : 1) + (manifest.slots_input.empty() ? 0 : 1);
  inputs_.resize(controls + manifest.state.size());
  outputs_.resize(1 + manifest.state.size());
  reserve(tokens_of(manifest.graphs[0]));  // graphs are sorted, so the first one consumes most tokens
}

const float* OrtWorkspace::output(std::size_t first_row, std::size_t rows) {
  return reinterpret_cast<const float*>(output_->read(first_row * row_bytes_, rows * row_bytes_));
}

OrtWorkspace::Values OrtWorkspace::make_values(const Graph& graph, std::size_t streams) const {
  const auto count = static_cast<std::int64_t>(streams);
  const std::size_t rows = streams * tokens_of(graph);
  const auto control = [&](const HostMemory& memory, DType dtype) {
    return view_tensor(library_, host_, memory.data(), streams * dtype_info(dtype).bytes, dtype, {count});
  };
  return {view_tensor(library_, host_, input_->data(), rows * manifest_.input_row_bytes(), manifest_.input_dtype(),
                      manifest_.input_shape(graph, count)),
          view_tensor(library_, output_->memory(), output_->data(), rows * row_bytes_, DType::kFloat32,
                      manifest_.output_shape(graph, count)),
          control(positions_, DType::kInt64),
          control(learn_, DType::kBool),
          control(valid_, DType::kInt64),
          control(slots_, DType::kInt64)};
}

void OrtWorkspace::reserve(std::size_t rows) {
  if (rows <= rows_) return;
  auto input = std::make_unique<HostMemory>(rows * manifest_.input_row_bytes());
  auto output = context_.make_output(rows * row_bytes_);
  std::swap(input_, input);
  std::swap(output_, output);
  std::vector<Values> singles;
  try {
    for (const Graph& graph : manifest_.graphs) singles.push_back(make_values(graph, 1));
  } catch (...) {
    std::swap(input_, input);
    std::swap(output_, output);
    throw;
  }
  together_.reset();
  singles_ = std::move(singles);
  rows_ = rows;
}

void OrtWorkspace::write(const Call& call, std::size_t stream, std::size_t slot) {
  const std::size_t count = tokens_of(manifest_.graphs[call.graph]);
  std::byte* input = input_->data() + stream * count * manifest_.input_row_bytes();
  if (call.vectors != nullptr) {
    std::memcpy(input, call.vectors, count * manifest_.input_row_bytes());
  } else {
    std::copy_n(call.tokens, count, reinterpret_cast<std::int64_t*>(input));
  }
  reinterpret_cast<std::int64_t*>(positions_.data())[stream] = call.position;
  reinterpret_cast<bool*>(learn_.data())[stream] = call.learn;
  reinterpret_cast<std::int64_t*>(valid_.data())[stream] = static_cast<std::int64_t>(count);
  reinterpret_cast<std::int64_t*>(slots_.data())[stream] = static_cast<std::int64_t>(slot);
}

void OrtWorkspace::use(const Values& values) {
  std::size_t at = 0;
  inputs_[at++] = values.input.get();
  inputs_[at++] = values.position.get();
  inputs_[at++] = values.learn.get();
  if (!manifest_.valid_input.empty()) inputs_[at++] = values.valid.get();
  if (!manifest_.slots_input.empty()) inputs_[at++] = values.slots.get();
  outputs_[0] = values.output.get();
}

void OrtWorkspace::bind(const Call& call) {
  write(call, 0, 0);
  use(singles_[call.graph]);
  const std::size_t controls = inputs_.size() - manifest_.state.size();
  for (std::size_t state = 0; state < manifest_.state.size(); ++state) {
    inputs_[controls + state] = static_cast<const StateBuffer*>(call.state[state])->value();
    outputs_[1 + state] = static_cast<const StateBuffer*>(call.next_state[state])->value();
  }
}

void OrtWorkspace::bind_together(const Call* calls, std::size_t count) {
  const Graph& graph = manifest_.graphs[calls[0].graph];
  reserve(count * tokens_of(graph));
  std::size_t slots = 1;
  for (std::size_t stream = 0; stream < count; ++stream) {
    const std::size_t slot =
        manifest_.state.empty() ? 0 : static_cast<const StateBuffer*>(calls[stream].state[0])->slot();
    write(calls[stream], stream, slot);
    slots = std::max(slots, slot + 1);
  }
  together_.emplace(make_values(graph, count));
  use(*together_);
  // ONNX Runtime keeps a plan of its memory for each combination of shapes, so there are few: powers of two.
  std::size_t rounded = 1;
  while (rounded < slots) rounded *= 2;
  rounded = std::min(rounded, context_.pool_slots());
  if (rounded != pool_slots_) {
    pool_slots_ = 0;
    pools_.clear();
    for (std::size_t state = 0; state < manifest_.state.size(); ++state) {
      pools_.push_back(context_.view_pool(state, rounded));
    }
    pool_slots_ = rounded;
  }
  const std::size_t controls = inputs_.size() - manifest_.state.size();
  for (std::size_t state = 0; state < manifest_.state.size(); ++state) {
    inputs_[controls + state] = outputs_[1 + state] = pools_[state].get();
  }
}

}  // namespace titans::core
