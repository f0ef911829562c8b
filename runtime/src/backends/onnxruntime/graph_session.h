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

// What all sessions of an engine have in common.
struct SessionShare {
  const OrtLibrary& library;
  const Bundle& bundle;
  // Initialisers by name: every session reads the same memory.
  const std::map<std::string, OrtHandle<OrtValue>, std::less<>>& weights;
  // Weights that kernels have rearranged for themselves, kept once for all sessions.
  OrtPrepackedWeightsContainer& prepacked;
  const DeviceContext& context;
  const MemoryKernel& memory_kernel;
  int threads;
};

// The weights of the graph that all sessions share, as its file declares them, each with a tensor of the bundle that is
// such a one.
std::map<std::string, Initializer> shared_initializers(const Bundle& bundle, const EngineGraph& graph);

// Opens the graph from its file and checks that its inputs and outputs are those that the manifest promises. Idle
// threads of a session that may spin wait busily for a while, which is fast and takes a processor: let only one do so.
OrtHandle<OrtSession> open_graph(const SessionShare& share, const EngineGraph& graph, bool spin);

}  // namespace titans::core
