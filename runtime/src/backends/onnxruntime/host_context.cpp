// State, weights and outputs in host memory, for ONNX Runtime's CPU provider.
#include <cstring>
#include <utility>

#include "backends/onnxruntime/device_context.h"
#include "backends/onnxruntime/state_pool.h"
#include "base/error.h"

namespace titans::core {
namespace {

class HostBuffer : public StateBuffer {
 public:
  HostBuffer(std::byte* data, OrtHandle<OrtValue> value, std::size_t bytes)
      : data_(data), bytes_(bytes), value_(std::move(value)) {}

  void upload(const std::byte* host) override { std::memcpy(data_, host, bytes_); }
  void download(std::byte* host) const override { std::memcpy(host, data_, bytes_); }
  void copy_from(const Buffer& other) override { upload(other.host()); }
  void copy_stripe_from(const Buffer& other, const Stripe& stripe) override {
    const std::byte* from = other.host();
    for (std::size_t row = 0; row < stripe.rows; ++row) {
      const std::size_t at = row * stripe.pitch + stripe.offset;
      std::memcpy(data_ + at, from + at, stripe.bytes);
    }
  }
  const std::byte* host() const override { return data_; }
  OrtValue* value() const override { return value_.get(); }

 private:
  std::byte* data_;
  std::size_t bytes_;
  OrtHandle<OrtValue> value_;
};

// A buffer in memory of its own.
class OwnBuffer final : public HostBuffer {
 public:
  OwnBuffer(const OrtLibrary& library, const OrtMemoryInfo& host, const StateTensor& state)
      : OwnBuffer(library, host, state, std::make_unique<HostMemory>(state.bytes)) {}

 private:
  OwnBuffer(const OrtLibrary& library, const OrtMemoryInfo& host, const StateTensor& state,
            std::unique_ptr<HostMemory> memory)
      : HostBuffer(memory->data(), view_tensor(library, host, memory->data(), state.bytes, state.dtype, state.shape),
                   state.bytes),
        memory_(std::move(memory)) {}

  std::unique_ptr<HostMemory> memory_;
};

// A slot of a pool. The last buffer of a stream gives the slot back.
class SlotBuffer final : public HostBuffer {
 public:
  SlotBuffer(std::shared_ptr<StatePool::Slot> slot, std::byte* data, OrtHandle<OrtValue> value, std::size_t bytes)
      : HostBuffer(data, std::move(value), bytes), slot_(std::move(slot)) {}
  bool in_pool() const override { return true; }
  std::size_t slot() const override { return slot_->index(); }

 private:
  std::shared_ptr<StatePool::Slot> slot_;
};

class HostOutput final : public OutputMemory {
 public:
  HostOutput(const OrtMemoryInfo& host, std::size_t bytes) : host_(host), memory_(bytes) {}
  const OrtMemoryInfo& memory() const override { return host_; }
  void* data() const override { return memory_.data(); }
  const std::byte* read(std::size_t offset, std::size_t) override { return memory_.data() + offset; }

 private:
  const OrtMemoryInfo& host_;
  HostMemory memory_;
};

class HostContext final : public DeviceContext {
 public:
  explicit HostContext(const OrtLibrary& library) : library_(library), host_(describe_host(library)) {}

  int cuda_ordinal() const override { return -1; }
  void add_provider(OrtSessionOptions&) const override {}
  OrtHandle<OrtValue> share_weight(const TensorView& tensor, ONNXTensorElementDataType type,
                                   const Shape& shape) override {
    // The API takes a mutable pointer but never writes initialisers. The pages are read-only.
    return view_tensor(library_, *host_, const_cast<std::byte*>(tensor.data), tensor.bytes, type, shape);
  }
  std::unique_ptr<StateBuffer> allocate(const StateTensor& state) override {
    return std::make_unique<OwnBuffer>(library_, *host_, state);
  }
  bool open_pools(const std::vector<StateTensor>& states) override {
    std::vector<std::size_t> bytes;
    for (const StateTensor& state : states) bytes.push_back(state.bytes);
    pool_ = std::make_unique<StatePool>(std::move(bytes));
    states_ = &states;
    return pool_->capacity() > 0;
  }
  std::vector<std::unique_ptr<Buffer>> allocate_slot() override {
    std::vector<std::unique_ptr<Buffer>> buffers;
    const std::shared_ptr<StatePool::Slot> slot = pool_->take();
    if (slot == nullptr) return buffers;
    for (std::size_t index = 0; index < states_->size(); ++index) {
      const StateTensor& state = (*states_)[index];
      std::byte* data = pool_->data(index, slot->index());
      buffers.push_back(std::make_unique<SlotBuffer>(
          slot, data, view_tensor(library_, *host_, data, state.bytes, state.dtype, state.shape), state.bytes));
    }
    return buffers;
  }
  OrtHandle<OrtValue> view_pool(std::size_t index, std::size_t slots) const override {
    const StateTensor& state = (*states_)[index];
    Shape shape = state.shape;
    shape[0] = static_cast<std::int64_t>(slots);
    return view_tensor(library_, *host_, pool_->data(index, 0), slots * state.bytes, state.dtype, shape);
  }
  std::size_t pool_slots() const override { return pool_->capacity(); }
  std::unique_ptr<OutputMemory> make_output(std::size_t bytes) override {
    return std::make_unique<HostOutput>(*host_, bytes);
  }
  void before_run() override {}

 private:
  const OrtLibrary& library_;
  OrtHandle<OrtMemoryInfo> host_;
  std::unique_ptr<StatePool> pool_;
  const std::vector<StateTensor>* states_ = nullptr;  // of the pool
};

}  // namespace

OrtHandle<OrtMemoryInfo> describe_host(const OrtLibrary& library) {
  OrtMemoryInfo* host = nullptr;
  library.check(library.api().CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &host),
                "cannot describe host memory", kReport);
  return {host, library.api().ReleaseMemoryInfo};
}

std::unique_ptr<DeviceContext> make_host_context(const OrtLibrary& library) {
  return std::make_unique<HostContext>(library);
}

}  // namespace titans::core
