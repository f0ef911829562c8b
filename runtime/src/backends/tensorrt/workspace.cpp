#include "backends/tensorrt/workspace.h"

#include <algorithm>
#include <cstring>

#include "backends/tensorrt/logger.h"
#include "base/error.h"

namespace titans::core {
namespace {

// TensorRT requires this alignment for every tensor.
constexpr std::size_t kAlignment = 256;
// Offsets of the inputs in their block.
constexpr std::size_t kPosition = 0;
constexpr std::size_t kLearn = kAlignment;
constexpr std::size_t kInput = 2 * kAlignment;

void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

std::size_t most_tokens(const WorkspaceShare& share) {
  std::int64_t most = 1;
  for (const auto& graph : share.graphs) {
    if (graph) most = std::max(most, graph->graph().tokens);
  }
  return static_cast<std::size_t>(most);
}

}  // namespace

DeviceWorkspace::DeviceWorkspace(const WorkspaceShare& share)
    : share_(share),
      output_row_(static_cast<std::size_t>(share.manifest.output_size)),
      stream_(share.context),
      copied_(share.context),
      input_bytes_(kInput + most_tokens(share) * share.manifest.input_row_bytes()),
      inputs_(share.context, input_bytes_),
      last_row_(share.context, share.unified ? 0 : output_row_ * sizeof(float)),
      contexts_(share.graphs.size()) {
  const std::size_t output_bytes = most_tokens(share) * output_row_ * sizeof(float);
  if (share.unified) {
    unified_output_ = std::make_unique<cuda::PinnedMemory>(share.context, output_bytes);
  } else {
    device_inputs_ = std::make_unique<cuda::DeviceMemory>(stream_, input_bytes_);
    device_output_ = std::make_unique<cuda::DeviceMemory>(stream_, output_bytes);
  }
}

DeviceWorkspace::~DeviceWorkspace() {
  try {
    // Vendor objects must be destroyed with their context current.
    const cuda::Context::Scope scope(share_.context);
    contexts_.clear();
  } catch (...) {  // NOLINT: a broken context has nothing left to free
  }
}

void DeviceWorkspace::run(const Call& call) {
  const cuda::Context::Scope scope(share_.context);
  fill_inputs(call);
  wait_for_copies();
  decoded_ = decodes(call);
  try {
    launch(call);
  } catch (...) {
    try {
      stream_.synchronize();  // work enqueued before the failure writes state
    } catch (...) {           // report the first failure
    }
    throw;
  }
  stream_.synchronize();
}

void DeviceWorkspace::fill_inputs(const Call& call) {
  std::memcpy(inputs_.data() + kPosition, &call.position, sizeof(call.position));
  std::memcpy(inputs_.data() + kLearn, &call.learn, sizeof(call.learn));
  const auto count = static_cast<std::size_t>(share_.manifest.graphs[call.graph].tokens);
  if (call.vectors != nullptr) {
    std::memcpy(inputs_.data() + kInput, call.vectors, count * share_.manifest.input_row_bytes());
  } else {
    std::copy_n(call.tokens, count, reinterpret_cast<std::int64_t*>(inputs_.data() + kInput));
  }
}

void DeviceWorkspace::wait_for_copies() {
  const std::uint64_t made = share_.copies.made();
  if (made == copies_seen_) return;
  copied_.record(share_.copies.stream());
  stream_.wait_for(copied_);
  copies_seen_ = made;
}

void DeviceWorkspace::launch(const Call& call) {
  const bool recordable = decoded_ && share_.recording.on() && !share_.graphs[call.graph]->any_on_host();
  if (!recordable) {
    bind(call);
    return enqueue(call);
  }
  const std::size_t states = share_.manifest.state.size();
  Captures::Key key{call.graph};
  for (std::size_t state = 0; state < states; ++state) {
    key.push_back(static_cast<const DeviceBuffer*>(call.state[state])->address());
    key.push_back(static_cast<const DeviceBuffer*>(call.next_state[state])->address());
  }
  bool wanted = false;
  if (const cuda::GraphExec* recorded = captures_.find(key, wanted)) return recorded->launch(stream_);
  bind(call);
  if (wanted) {
    if (auto recorded = cuda::GraphExec::capture(stream_, why_not_, [&] { enqueue(call); })) {
      recorded->launch(stream_);
      return captures_.add(key, std::move(recorded));
    }
    share_.recording.turn_off();
  }
  enqueue(call);
}

void DeviceWorkspace::bind(const Call& call) {
  nvinfer1::IExecutionContext& context = context_of(call.graph);
  const GraphEngine& graph = *share_.graphs[call.graph];
  const Manifest& manifest = share_.manifest;
  bool all = true;
  const CUdeviceptr inputs = share_.unified ? inputs_.device_address() : device_inputs_->address();
  const auto bind_input = [&](const std::string& name, std::size_t offset) {
    void* address = graph.on_host(name) ? static_cast<void*>(inputs_.data() + offset) : pointer(inputs + offset);
    all = context.setTensorAddress(name.c_str(), address) && all;
  };
  VendorLogger::clear();
  bind_input(manifest.position_input, kPosition);
  bind_input(manifest.learn_input, kLearn);
  bind_input(manifest.input, kInput);
  const CUdeviceptr output = share_.unified ? unified_output_->device_address() : device_output_->address();
  all = context.setTensorAddress(manifest.output.c_str(), pointer(output)) && all;
  for (std::size_t state = 0; state < manifest.state.size(); ++state) {
    const CUdeviceptr from = static_cast<const DeviceBuffer*>(call.state[state])->address();
    const CUdeviceptr to = static_cast<const DeviceBuffer*>(call.next_state[state])->address();
    all = context.setTensorAddress(manifest.state[state].input.c_str(), pointer(from)) && all;
    all = context.setTensorAddress(manifest.state[state].output.c_str(), pointer(to)) && all;
  }
  if (!all) {
    throw Error(TITANS_FAILED, "E0609", kVendor,
                text("cannot set the addresses of graph ", graph.graph().name, ": ", VendorLogger::errors(kNoReason)),
                "build the engine again");
  }
}

void DeviceWorkspace::enqueue(const Call& call) {
  if (!share_.unified) cuda::copy_to_device(stream_, device_inputs_->address(), inputs_.data(), input_bytes_);
  VendorLogger::clear();
  if (!context_of(call.graph).enqueueV3(stream_.get())) {
    throw Error(TITANS_FAILED, "E0609", kVendor,
                text("graph ", share_.manifest.graphs[call.graph].name, " failed: ", VendorLogger::errors(kNoReason)),
                "check the device with nvidia-smi, or build the engine again");
  }
  if (!share_.unified && decoded_) {
    cuda::copy_to_host(stream_, last_row_.data(), device_output_->address(), last_row_.size());
  }
}

nvinfer1::IExecutionContext& DeviceWorkspace::context_of(std::size_t graph) {
  std::unique_ptr<nvinfer1::IExecutionContext>& context = contexts_[graph];
  if (!context) context = share_.graphs[graph]->make_context();
  return *context;
}

const float* DeviceWorkspace::output(std::size_t first_row, std::size_t rows) {
  const std::size_t offset = first_row * output_row_ * sizeof(float);
  if (share_.unified) return reinterpret_cast<const float*>(unified_output_->data() + offset);
  if (decoded_) return reinterpret_cast<const float*>(last_row_.data());
  const std::size_t bytes = rows * output_row_ * sizeof(float);
  if (!rows_ || rows_->size() < bytes) {
    rows_.reset();
    rows_ = std::make_unique<cuda::PinnedMemory>(share_.context, bytes);
  }
  cuda::copy_to_host(stream_, rows_->data(), device_output_->address() + offset, bytes);
  stream_.synchronize();
  return reinterpret_cast<const float*>(rows_->data());
}

}  // namespace titans::core
