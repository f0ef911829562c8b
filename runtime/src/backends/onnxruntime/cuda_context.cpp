// State, weights and outputs in GPU memory, for ONNX Runtime's CUDA provider. The memory comes from the driver, so
// addresses are stable whatever ONNX Runtime's allocators do.
#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "backends/onnxruntime/device_context.h"
#include "base/error.h"
#include "cuda/objects.h"

namespace titans::core {
namespace {

constexpr const char* kProvider = "CUDAExecutionProvider";

std::vector<std::string> providers(const OrtLibrary& library) {
  char** names = nullptr;
  int count = 0;
  library.check(library.api().GetAvailableProviders(&names, &count), "cannot list the providers", kReport);
  std::vector<std::string> found(names, names + count);
  library.check(library.api().ReleaseAvailableProviders(names, count), "cannot list the providers", kReport);
  return found;
}

void require_provider(const OrtLibrary& library) {
  const std::vector<std::string> found = providers(library);
  if (std::find(found.begin(), found.end(), kProvider) != found.end()) return;
  std::string names;
  for (const std::string& name : found) names += (names.empty() ? "" : ", ") + name;
  throw Error(TITANS_UNSUPPORTED, "E0604", "onnxruntime",
              text("ONNX Runtime ", library.version(), " has no ", kProvider, ", only ", names),
              "run pip install onnxruntime-gpu instead of onnxruntime, or set TITANS_ONNXRUNTIME to its "
              "libonnxruntime.so, or open the session on cpu");
}

class CudaBuffer final : public StateBuffer {
 public:
  CudaBuffer(const OrtLibrary& library, const OrtMemoryInfo& info, const cuda::Stream& stream, const StateTensor& state)
      : stream_(stream),
        memory_(stream, state.bytes),
        value_(view_tensor(library, info, memory_.data(), state.bytes, state.dtype, state.shape)) {}
  // Work on the buffer may still be running.
  ~CudaBuffer() override {
    try {
      stream_.synchronize();
    } catch (const Error&) {  // the device is lost, so its memory is too
    }
  }

  void upload(const std::byte* host) override {
    cuda::copy_to_device(stream_, memory_.address(), host, memory_.size());
    stream_.synchronize();
  }
  void download(std::byte* host) const override {
    cuda::copy_to_host(stream_, host, memory_.address(), memory_.size());
    stream_.synchronize();
  }
  // Device copies are ordered in one stream. A graph run waits for them.
  void copy_from(const Buffer& other) override {
    cuda::copy_on_device(stream_, memory_.address(), address_of(other), memory_.size());
  }
  void copy_stripe_from(const Buffer& other, const Stripe& stripe) override {
    cuda::copy_stripe(stream_, memory_.address(), address_of(other), stripe);
  }
  OrtValue* value() const override { return value_.get(); }

 private:
  static CUdeviceptr address_of(const Buffer& other) { return static_cast<const CudaBuffer&>(other).memory_.address(); }

  const cuda::Stream& stream_;
  cuda::DeviceMemory memory_;
  OrtHandle<OrtValue> value_;
};

// Copies only the requested rows to the host. With unified memory, the graph writes directly to host-visible memory.
class CudaOutput final : public OutputMemory {
 public:
  CudaOutput(const OrtMemoryInfo& info, const cuda::Stream& stream, std::size_t bytes, bool shared)
      : info_(info),
        stream_(stream),
        pinned_(stream.context(), bytes),
        device_(shared ? nullptr : std::make_unique<cuda::DeviceMemory>(stream, bytes)) {}

  const OrtMemoryInfo& memory() const override { return info_; }
  void* data() const override { return device_ ? device_->data() : reinterpret_cast<void*>(pinned_.device_address()); }
  const std::byte* read(std::size_t offset, std::size_t bytes) override {
    if (device_) {
      cuda::copy_to_host(stream_, pinned_.data() + offset, device_->address() + offset, bytes);
      stream_.synchronize();
    }
    return pinned_.data() + offset;
  }

 private:
  const OrtMemoryInfo& info_;
  const cuda::Stream& stream_;
  cuda::PinnedMemory pinned_;
  std::unique_ptr<cuda::DeviceMemory> device_;
};

class CudaContext final : public DeviceContext {
 public:
  CudaContext(const OrtLibrary& library, const cuda::Driver& driver, const cuda::DeviceInfo& device)
      : library_(library),
        device_(device),
        context_(driver, device.ordinal),
        stream_(context_),
        info_(nullptr, library.api().ReleaseMemoryInfo) {
    OrtMemoryInfo* info = nullptr;
    library_.check(
        library_.api().CreateMemoryInfo("Cuda", OrtDeviceAllocator, device.ordinal, OrtMemTypeDefault, &info),
        "the memory of a GPU", "report it");
    info_.reset(info);
  }

  int cuda_ordinal() const override { return device_.ordinal; }

  void add_provider(OrtSessionOptions& options) const override {
    const OrtApi& api = library_.api();
    constexpr std::string_view kFix =
        "install the CUDA and cuDNN that this ONNX Runtime was built for, or open the session on cpu";
    const auto check = [&](OrtStatus* status) {
      library_.check(status, text("cannot use ", kProvider, " on ", device_.name), kFix, TITANS_UNSUPPORTED);
    };
    OrtCUDAProviderOptionsV2* raw = nullptr;
    check(api.CreateCUDAProviderOptions(&raw));
    const OrtHandle<OrtCUDAProviderOptionsV2> provider(raw, api.ReleaseCUDAProviderOptions);
    const std::string ordinal = std::to_string(device_.ordinal);
    // TF32 matmuls exceed the error bounds that bundles promise.
    const std::array<const char*, 2> keys{"device_id", "use_tf32"};
    const std::array<const char*, 2> values{ordinal.c_str(), "0"};
    check(api.UpdateCUDAProviderOptions(raw, keys.data(), values.data(), keys.size()));
    check(api.SessionOptionsAppendExecutionProvider_CUDA_V2(&options, raw));
  }

  // Weights are on the device, so all graphs share one copy. For a weight needed on the host, ONNX Runtime reads the
  // bundle's file.
  OrtHandle<OrtValue> share_weight(const TensorView& tensor, ONNXTensorElementDataType type,
                                   const Shape& shape) override {
    weights_.push_back(std::make_unique<cuda::DeviceMemory>(stream_, tensor.bytes));
    cuda::copy_to_device(stream_, weights_.back()->address(), tensor.data, tensor.bytes);
    stream_.synchronize();
    return view_tensor(library_, *info_, weights_.back()->data(), tensor.bytes, type, shape);
  }

  std::unique_ptr<StateBuffer> allocate(const StateTensor& state) override {
    return std::make_unique<CudaBuffer>(library_, *info_, stream_, state);
  }
  std::unique_ptr<OutputMemory> make_output(std::size_t bytes) override {
    return std::make_unique<CudaOutput>(*info_, stream_, bytes, device_.integrated);
  }
  void before_run() override { stream_.synchronize(); }

 private:
  const OrtLibrary& library_;
  const cuda::DeviceInfo device_;
  cuda::Context context_;
  cuda::Stream stream_;
  OrtHandle<OrtMemoryInfo> info_;
  std::vector<std::unique_ptr<cuda::DeviceMemory>> weights_;
};

}  // namespace

std::unique_ptr<DeviceContext> make_cuda_context(const OrtLibrary& library, const std::string& device) {
  require_provider(library);
  const cuda::Driver& driver = cuda::Driver::require();
  return std::make_unique<CudaContext>(library, driver, cuda::find_device(driver, device));
}

}  // namespace titans::core
