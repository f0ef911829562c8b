// State, weights and outputs in host memory, for ONNX Runtime's CPU provider.
#include <cstring>
#include <utility>

#include "backends/onnxruntime/device_context.h"
#include "base/error.h"

namespace titans::core {
namespace {

class HostBuffer final : public StateBuffer {
 public:
  HostBuffer(const OrtLibrary& library, const OrtMemoryInfo& host, const StateTensor& state)
      : memory_(state.bytes),
        value_(view_tensor(library, host, memory_.data(), state.bytes, state.dtype, state.shape)) {}

  void upload(const std::byte* host) override { std::memcpy(memory_.data(), host, memory_.size()); }
  void download(std::byte* host) const override { std::memcpy(host, memory_.data(), memory_.size()); }
  void copy_from(const Buffer& other) override { upload(static_cast<const HostBuffer&>(other).memory_.data()); }
  void copy_stripe_from(const Buffer& other, const Stripe& stripe) override {
    const std::byte* from = static_cast<const HostBuffer&>(other).memory_.data();
    for (std::size_t row = 0; row < stripe.rows; ++row) {
      const std::size_t at = row * stripe.pitch + stripe.offset;
      std::memcpy(memory_.data() + at, from + at, stripe.bytes);
    }
  }
  const std::byte* host() const override { return memory_.data(); }
  OrtValue* value() const override { return value_.get(); }

 private:
  HostMemory memory_;
  OrtHandle<OrtValue> value_;
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
    return std::make_unique<HostBuffer>(library_, *host_, state);
  }
  std::unique_ptr<OutputMemory> make_output(std::size_t bytes) override {
    return std::make_unique<HostOutput>(*host_, bytes);
  }
  void before_run() override {}

 private:
  const OrtLibrary& library_;
  OrtHandle<OrtMemoryInfo> host_;
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
