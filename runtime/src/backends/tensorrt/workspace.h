// What one call needs beside state: contexts, a stream, the inputs and the output.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "backends/tensorrt/captures.h"
#include "backends/tensorrt/device_state.h"
#include "backends/tensorrt/graph_engine.h"

namespace titans::core {

// Whether calls of one token are recorded and launched as one. Shared by all workspaces of an engine; once a recording
// has failed nobody tries again.
class Recording {
 public:
  bool on() const noexcept { return on_.load(std::memory_order_relaxed); }
  void turn_off() noexcept { on_.store(false, std::memory_order_relaxed); }

 private:
  std::atomic<bool> on_{true};
};

// What all workspaces of an engine share. It outlives them.
struct WorkspaceShare {
  const Manifest& manifest;
  const cuda::Context& context;
  Copies& copies;
  Recording& recording;
  // By the manifest's graphs, NULL for one that the engine lacks.
  std::vector<std::unique_ptr<GraphEngine>>& graphs;
  // The device reads the inputs and writes the output where the host has them, so none are copied.
  bool unified;
};

class DeviceWorkspace final : public Workspace {
 public:
  explicit DeviceWorkspace(const WorkspaceShare& share);
  ~DeviceWorkspace() override;
  // Returns when the results are there; nothing of the call runs on when it throws.
  void run(const Call& call);
  const float* output(std::size_t first_row, std::size_t rows) override;

  std::size_t recorded() const { return captures_.size(); }
  // Why the last attempt to record failed.
  const std::string& why_not_recorded() const { return why_not_; }

 private:
  void fill_inputs(const Call& call);
  void wait_for_copies();
  void launch(const Call& call);
  void bind(const Call& call);
  void enqueue(const Call& call);
  nvinfer1::IExecutionContext& context_of(std::size_t graph);
  bool decodes(const Call& call) const { return share_.manifest.graphs[call.graph].tokens == 1; }

  const WorkspaceShare& share_;
  std::size_t output_row_;  // elements
  cuda::Stream stream_;
  cuda::Event copied_;
  std::uint64_t copies_seen_ = 0;
  std::size_t input_bytes_;
  cuda::PinnedMemory inputs_;                          // position, flag, tokens or vectors
  std::unique_ptr<cuda::DeviceMemory> device_inputs_;  // the same on the device, none where memory is unified
  std::unique_ptr<cuda::DeviceMemory> device_output_;
  std::unique_ptr<cuda::PinnedMemory> unified_output_;  // instead of it
  cuda::PinnedMemory last_row_;                         // of a call of one token
  std::unique_ptr<cuda::PinnedMemory> rows_;            // of other calls, as many as were ever asked for
  bool decoded_ = false;                                // the last call was of one token
  std::vector<std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;  // made when first needed
  Captures captures_;
  std::string why_not_;
};

}  // namespace titans::core
