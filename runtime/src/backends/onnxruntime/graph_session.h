// One graph of a bundle as an ONNX Runtime session.
#pragma once

#include <map>
#include <string>

#include "backends/onnxruntime/device_context.h"
#include "backends/onnxruntime/initializers.h"
#include "backends/onnxruntime/library.h"
#include "backends/onnxruntime/memory_kernel.h"
#include "bundle/bundle.h"

namespace titans::core {

// Shared by all sessions of an executor.
struct SessionShare {
  const OrtLibrary& library;
  const Bundle& bundle;
  // Initialisers by name. All sessions use the same memory.
  const std::map<std::string, OrtHandle<OrtValue>, std::less<>>& weights;
  // Weights prepacked by kernels, stored once for all sessions.
  OrtPrepackedWeightsContainer& prepacked;
  const DeviceContext& context;
  const MemoryKernel& memory_kernel;
  int threads;
};

// The graph's shared weights as its file declares them. Each is checked against its tensor in the bundle.
std::map<std::string, Initializer> shared_initializers(const Bundle& bundle, const EngineGraph& graph);

// Opens a graph file and checks its inputs and outputs against the manifest. With `spin`, idle threads busy-wait for
// the next call. That is fast but occupies processors, so only one session should use it.
OrtHandle<OrtSession> open_graph(const SessionShare& share, const EngineGraph& graph, bool spin);

}  // namespace titans::core
