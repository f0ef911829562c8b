// The resources of one call: contexts, a stream, the inputs and the output.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "backends/tensorrt/captures.h"
#include "backends/tensorrt/device_state.h"
#include "backends/tensorrt/graph_engine.h"

namespace titans::core {

// Whether single-token calls are captured as CUDA graphs. All workspaces share it; after one failed capture no further
// attempt is made.
class Recording {
 public:
  bool on() const noexcept { return on_.load(std::memory_order_relaxed); }
  void turn_off() noexcept { on_.store(false, std::memory_order_relaxed); }

 private:
  std::atomic<bool> on_{true};
};

// Shared by all workspaces of an executor, which it must outlive.
struct WorkspaceShare {
  const Manifest& manifest;
  const cuda::Context& context;
  Copies& copies;
  Recording& recording;
  // By index in the manifest's graphs; NULL if the engine lacks the graph.
  std::vector<std::unique_ptr<GraphEngine>>& graphs;
  // Host and device share memory, so inputs and output are not copied.
  bool unified;
};

class DeviceWorkspace final : public Workspace {
 public:
  explicit DeviceWorkspace(const WorkspaceShare& share);
  ~DeviceWorkspace() override;
  // Returns after the results are complete. After an exception no work of the call is still running.
  void run(const Call& call);
  const float* output(std::size_t first_row, std::size_t rows) override;

  std::size_t recorded() const { return captures_.size(); }
  // Why the last capture failed.
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
  cuda::PinnedMemory inputs_;                          // position, learn flag, tokens or vectors
  std::unique_ptr<cuda::DeviceMemory> device_inputs_;  // device copy; NULL with unified memory
  std::unique_ptr<cuda::DeviceMemory> device_output_;
  std::unique_ptr<cuda::PinnedMemory> unified_output_;                  // replaces device_output_ with unified memory
  cuda::PinnedMemory last_row_;                                         // output of a single-token call
  std::unique_ptr<cuda::PinnedMemory> rows_;                            // output rows of other calls; grows on demand
  bool decoded_ = false;                                                // the last call had one token
  std::vector<std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;  // created on first use
  Captures captures_;
  std::string why_not_;
};

}  // namespace titans::core
