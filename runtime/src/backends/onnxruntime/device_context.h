// The device of a session: the execution provider and the memory for state, weights and outputs.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "backends/backend.h"
#include "backends/onnxruntime/host_tensor.h"
#include "backends/onnxruntime/library.h"

namespace titans::core {

class StateBuffer : public Buffer {
 public:
  // The tensor of one stream.
  virtual OrtValue* value() const = 0;
  // The buffer's slot, if it is in a pool.
  virtual std::size_t slot() const { return 0; }
};

// The output of one workspace: logits or vectors.
class OutputMemory {
 public:
  virtual ~OutputMemory() = default;
  // The memory description for tensors that use it.
  virtual const OrtMemoryInfo& memory() const = 0;
  virtual void* data() const = 0;
  // The last call's output in host memory, valid until the next call.
  virtual const std::byte* read(std::size_t offset, std::size_t bytes) = 0;
};

class DeviceContext {
 public:
  virtual ~DeviceContext() = default;
  // The CUDA device's number; -1: the CPU.
  virtual int cuda_ordinal() const = 0;
  virtual void add_provider(OrtSessionOptions& options) const = 0;
  // A weight shared by all sessions, as a view of `tensor` or a copy on the device. `tensor` must outlive it. Type and
  // shape are those that the graphs declare; an int4 tensor provides only the bytes.
  virtual OrtHandle<OrtValue> share_weight(const TensorView& tensor, ONNXTensorElementDataType type,
                                           const Shape& shape) = 0;
  virtual std::unique_ptr<StateBuffer> allocate(const StateTensor& state) = 0;
  // Creates a pool for each state tensor. False if the device has none.
  virtual bool open_pools(const std::vector<StateTensor>&) { return false; }
  // One slot in each pool. Empty if no slot is free.
  virtual std::vector<std::unique_ptr<Buffer>> allocate_slot() { return {}; }
  // The first `slots` slots of a pool as one tensor.
  virtual OrtHandle<OrtValue> view_pool(std::size_t state, std::size_t slots) const;
  // The slots that a pool has room for.
  virtual std::size_t pool_slots() const { return 0; }
  virtual std::unique_ptr<OutputMemory> make_output(std::size_t bytes) = 0;
  // Makes earlier copies of buffers visible to the next graph run.
  virtual void before_run() = 0;
};

// Describes host memory. The handle releases it.
OrtHandle<OrtMemoryInfo> describe_host(const OrtLibrary& library);

std::unique_ptr<DeviceContext> make_host_context(const OrtLibrary& library);
// Throws an Error if this ONNX Runtime, machine or build lacks CUDA.
std::unique_ptr<DeviceContext> make_cuda_context(const OrtLibrary& library, const std::string& device);
// `device` is the session's: "cpu", "cuda" or "cuda:N".
std::unique_ptr<DeviceContext> make_device_context(const OrtLibrary& library, const std::string& device);

}  // namespace titans::core
