#include "cuda/objects.h"

#include <array>
#include <cstring>
#include <optional>

#include "base/error.h"
#include "base/wipe.h"

namespace titans::core::cuda {
namespace {

// The N of "cuda:N".
std::optional<int> ordinal_of(const std::string& device) {
  constexpr std::string_view kPrefix = "cuda";
  if (device.compare(0, kPrefix.size(), kPrefix) != 0) return std::nullopt;
  const std::string rest = device.substr(kPrefix.size());
  if (rest.empty()) return 0;
  constexpr std::size_t kMostDigits = 4;
  const bool number = rest.size() > 1 && rest.size() <= kMostDigits + 1 && rest[0] == ':' &&
                      rest.find_first_not_of("0123456789", 1) == std::string::npos;
  return number ? std::optional(std::stoi(rest.substr(1))) : std::nullopt;
}

int attribute(const Driver& driver, CUdevice_attribute which, CUdevice device) {
  int value = 0;
  driver.check(driver.cuDeviceGetAttribute(&value, which, device), "cuDeviceGetAttribute");
  return value;
}

// Destructors ignore errors: a broken context has nothing left to free.
template <typename Free>
void free_in(const Context& context, Free&& free) noexcept {
  try {
    const Context::Scope scope(context);
    static_cast<void>(free(context.driver()));
  } catch (...) {  // NOLINT: a context that cannot be made current holds no resources
  }
}

}  // namespace

DeviceInfo find_device(const Driver& driver, const std::string& device) {
  const std::optional<int> ordinal = ordinal_of(device);
  if (!ordinal) {
    throw Error(TITANS_INVALID_ARGUMENT, "E0601", "session", text("unknown device: ", quoted(device)),
                "open the session on cpu, cuda or cuda:N");
  }
  const int count = driver.device_count();
  if (*ordinal >= count) {
    throw Error(TITANS_UNSUPPORTED, "E0601", "session",
                text("expected a device from cuda:0 to cuda:", count - 1, ", got ", device),
                "name one of these; CUDA_VISIBLE_DEVICES may hide others");
  }
  CUdevice handle = 0;
  driver.check(driver.cuDeviceGet(&handle, *ordinal), "cuDeviceGet");
  std::array<char, 256> name{};
  driver.check(driver.cuDeviceGetName(name.data(), static_cast<int>(name.size()) - 1, handle), "cuDeviceGetName");
  std::size_t total = 0;
  driver.check(driver.cuDeviceTotalMem(&total, handle), "cuDeviceTotalMem");
  const int major = attribute(driver, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle);
  const int minor = attribute(driver, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle);
  const bool integrated = attribute(driver, CU_DEVICE_ATTRIBUTE_INTEGRATED, handle) != 0;
  return {*ordinal, name.data(), major * 10 + minor, total, integrated, driver.version()};
}

Context::Context(const Driver& driver, int ordinal) : driver_(driver) {
  driver_.check(driver_.cuDeviceGet(&device_, ordinal), "cuDeviceGet");
  driver_.check(driver_.cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

// The result is ignored for the same reason.
Context::~Context() { static_cast<void>(driver_.cuDevicePrimaryCtxRelease(device_)); }

Context::Scope::Scope(const Context& context) : driver_(context.driver_) {
  driver_.check(driver_.cuCtxPushCurrent(context.context_), "cuCtxPushCurrent");
}

Context::Scope::~Scope() {
  CUcontext popped = nullptr;
  static_cast<void>(driver_.cuCtxPopCurrent(&popped));
}

Stream::Stream(const Context& context) : context_(context) {
  const Context::Scope scope(context_);
  const Driver& driver = context_.driver();
  driver.check(driver.cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
}

Stream::~Stream() {
  free_in(context_, [&](const Driver& driver) { return driver.cuStreamDestroy(stream_); });
}

void Stream::synchronize() const {
  const Context::Scope scope(context_);
  context_.driver().check(context_.driver().cuStreamSynchronize(stream_), "cuStreamSynchronize");
}

void Stream::wait_for(const Event& event) const {
  const Context::Scope scope(context_);
  context_.driver().check(context_.driver().cuStreamWaitEvent(stream_, event.get(), 0), "cuStreamWaitEvent");
}

Event::Event(const Context& context) : context_(context) {
  const Context::Scope scope(context_);
  const Driver& driver = context_.driver();
  driver.check(driver.cuEventCreate(&event_, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
}

Event::~Event() {
  free_in(context_, [&](const Driver& driver) { return driver.cuEventDestroy(event_); });
}

void Event::record(const Stream& stream) const {
  const Context::Scope scope(context_);
  context_.driver().check(context_.driver().cuEventRecord(event_, stream.get()), "cuEventRecord");
}

void Event::synchronize() const {
  const Context::Scope scope(context_);
  context_.driver().check(context_.driver().cuEventSynchronize(event_), "cuEventSynchronize");
}

DeviceMemory::DeviceMemory(const Stream& stream, std::size_t bytes) : stream_(stream), size_(bytes) {
  const Context::Scope scope(stream.context());
  const Driver& driver = stream.context().driver();
  // cuMemAlloc rejects 0 bytes.
  driver.check(driver.cuMemAlloc(&address_, bytes == 0 ? 1 : bytes), text("cuMemAlloc of ", bytes, " bytes"));
  try {
    driver.check(driver.cuMemsetD8Async(address_, 0, bytes, stream.get()), "cuMemsetD8Async");
    stream.synchronize();
  } catch (...) {
    static_cast<void>(driver.cuMemFree(address_));
    throw;
  }
}

DeviceMemory::~DeviceMemory() {
  free_in(stream_.context(), [&](const Driver& driver) {
    static_cast<void>(driver.cuMemsetD8Async(address_, 0, size_, stream_.get()));
    static_cast<void>(driver.cuStreamSynchronize(stream_.get()));
    return driver.cuMemFree(address_);
  });
}

PinnedMemory::PinnedMemory(const Context& context, std::size_t bytes) : context_(context), size_(bytes) {
  const Context::Scope scope(context_);
  const Driver& driver = context_.driver();
  void* data = nullptr;
  driver.check(
      driver.cuMemHostAlloc(&data, bytes == 0 ? 1 : bytes, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP),
      text("cuMemHostAlloc of ", bytes, " bytes"));
  data_ = static_cast<std::byte*>(data);
  std::memset(data_, 0, bytes);
  const CUresult mapped = driver.cuMemHostGetDevicePointer(&device_address_, data_, 0);
  if (mapped != CUDA_SUCCESS) static_cast<void>(driver.cuMemFreeHost(data_));
  driver.check(mapped, "cuMemHostGetDevicePointer");
}

PinnedMemory::~PinnedMemory() {
  free_in(context_, [&](const Driver& driver) {
    wipe(data_, size_);
    return driver.cuMemFreeHost(data_);
  });
}

void copy_to_device(const Stream& stream, CUdeviceptr to, const void* from, std::size_t bytes) {
  const Context::Scope scope(stream.context());
  const Driver& driver = stream.context().driver();
  driver.check(driver.cuMemcpyHtoDAsync(to, from, bytes, stream.get()), "cuMemcpyHtoDAsync");
}

void copy_to_host(const Stream& stream, void* to, CUdeviceptr from, std::size_t bytes) {
  const Context::Scope scope(stream.context());
  const Driver& driver = stream.context().driver();
  driver.check(driver.cuMemcpyDtoHAsync(to, from, bytes, stream.get()), "cuMemcpyDtoHAsync");
}

void copy_on_device(const Stream& stream, CUdeviceptr to, CUdeviceptr from, std::size_t bytes) {
  const Context::Scope scope(stream.context());
  const Driver& driver = stream.context().driver();
  driver.check(driver.cuMemcpyDtoDAsync(to, from, bytes, stream.get()), "cuMemcpyDtoDAsync");
}

void copy_stripe(const Stream& stream, CUdeviceptr to, CUdeviceptr from, const Stripe& stripe) {
  if (stripe.bytes == 0 || stripe.rows == 0) return;
  if (stripe.rows == 1 || stripe.bytes == stripe.pitch) {
    const std::size_t bytes = stripe.rows == 1 ? stripe.bytes : stripe.bytes * stripe.rows;
    return copy_on_device(stream, to + stripe.offset, from + stripe.offset, bytes);
  }
  CUDA_MEMCPY2D copy{};
  copy.srcMemoryType = copy.dstMemoryType = CU_MEMORYTYPE_DEVICE;
  copy.srcDevice = from + stripe.offset;
  copy.dstDevice = to + stripe.offset;
  copy.srcPitch = copy.dstPitch = stripe.pitch;
  copy.WidthInBytes = stripe.bytes;
  copy.Height = stripe.rows;
  const Context::Scope scope(stream.context());
  const Driver& driver = stream.context().driver();
  driver.check(driver.cuMemcpy2DAsync(&copy, stream.get()), "cuMemcpy2DAsync");
}

GraphExec::Recording::Recording(const Stream& stream, std::string& why_not) : stream_(stream), why_not_(why_not) {
  const Context::Scope scope(stream.context());
  const Driver& driver = stream.context().driver();
  // Captures this thread only, so other threads may allocate meanwhile.
  const CUresult begun = driver.cuStreamBeginCapture(stream.get(), CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
  running_ = begun == CUDA_SUCCESS;
  if (!running_) why_not_ = text("cuStreamBeginCapture: ", driver.describe(begun));
}

GraphExec::Recording::~Recording() {
  if (!running_) return;
  free_in(stream_.context(), [&](const Driver& driver) {
    CUgraph graph = nullptr;
    const CUresult ended = driver.cuStreamEndCapture(stream_.get(), &graph);
    return ended == CUDA_SUCCESS && graph != nullptr ? driver.cuGraphDestroy(graph) : ended;
  });
}

std::unique_ptr<GraphExec> GraphExec::Recording::finish() {
  const Context::Scope scope(stream_.context());
  const Driver& driver = stream_.context().driver();
  CUgraph graph = nullptr;
  running_ = false;
  const CUresult ended = driver.cuStreamEndCapture(stream_.get(), &graph);
  if (ended != CUDA_SUCCESS || graph == nullptr) {
    why_not_ = text("cuStreamEndCapture: ", driver.describe(ended));
    return nullptr;
  }
  CUgraphExec exec = nullptr;
  const CUresult made = driver.cuGraphInstantiateWithFlags(&exec, graph, 0);
  static_cast<void>(driver.cuGraphDestroy(graph));
  if (made != CUDA_SUCCESS) {
    why_not_ = text("cuGraphInstantiate: ", driver.describe(made));
    return nullptr;
  }
  return std::unique_ptr<GraphExec>(new GraphExec(stream_.context(), exec));
}

GraphExec::~GraphExec() {
  free_in(context_, [&](const Driver& driver) { return driver.cuGraphExecDestroy(exec_); });
}

void GraphExec::launch(const Stream& stream) const {
  const Context::Scope scope(context_);
  context_.driver().check(context_.driver().cuGraphLaunch(exec_, stream.get()), "cuGraphLaunch");
}

}  // namespace titans::core::cuda
