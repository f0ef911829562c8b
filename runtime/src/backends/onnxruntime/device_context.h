// Where the graphs compute: which of ONNX Runtime's providers runs them, and where state, weights and outputs lie.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "backends/backend.h"
#include "backends/onnxruntime/host_tensor.h"
#include "backends/onnxruntime/library.h"

namespace titans::core {

class StateBuffer : public Buffer {
 public:
  virtual OrtValue* value() const = 0;
};

// The output, logits or vectors, of one workspace.
class OutputMemory {
 public:
  virtual ~OutputMemory() = default;
  // Tensors over it are made of this.
  virtual const OrtMemoryInfo& memory() const = 0;
  virtual void* data() const = 0;
  // What the last call has left there, in host memory; valid until the next call.
  virtual const std::byte* read(std::size_t offset, std::size_t bytes) = 0;
};

class DeviceContext {
 public:
  virtual ~DeviceContext() = default;
  // The CUDA device, or -1 on the host.
  virtual int cuda_ordinal() const = 0;
  virtual void add_provider(OrtSessionOptions& options) const = 0;
  // The weight for all sessions, over the host memory of `tensor`, which lives longer, or over a copy of it. Its type
  // and shape are those that graphs declare: of int4 the tensor has the bytes alone.
  virtual OrtHandle<OrtValue> share_weight(const TensorView& tensor, ONNXTensorElementDataType type,
                                           const Shape& shape) = 0;
  virtual std::unique_ptr<StateBuffer> allocate(const StateTensor& state) = 0;
  virtual std::unique_ptr<OutputMemory> make_output(std::size_t bytes) = 0;
  // What was done with buffers before is seen by a graph that runs from here on.
  virtual void before_run() = 0;
};

// The description of host memory, which must be released.
OrtHandle<OrtMemoryInfo> describe_host(const OrtLibrary& library);

std::unique_ptr<DeviceContext> make_host_context(const OrtLibrary& library);
// An Error where this ONNX Runtime, this machine or this build has no CUDA.
std::unique_ptr<DeviceContext> make_cuda_context(const OrtLibrary& library, const std::string& device);
// By the session's device: "cpu", "cuda", "cuda:N".
std::unique_ptr<DeviceContext> make_device_context(const OrtLibrary& library, const std::string& device);

}  // namespace titans::core
