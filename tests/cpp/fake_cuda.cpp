// A fake libcuda.so.1 over host memory. Work in a stream runs as late as CUDA allows: when somebody waits for it. A
// missing wait in the runtime therefore gives wrong numbers every time, not just sometimes.
//
// Environment variables, read at each call: TITANS_FAKE_SM (89), TITANS_FAKE_DRIVER (13000), TITANS_FAKE_INTEGRATED
// (0), TITANS_FAKE_DEVICES (1), TITANS_FAKE_NAME (Fake GPU), TITANS_FAKE_NO_CAPTURE (0), TITANS_FAKE_CUDA_BROKEN (0;
// otherwise the result of cuInit).
#include <cuda.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define FAKE extern "C" __attribute__((visibility("default")))

using Work = std::function<void()>;

struct CUgraph_st {
  std::vector<Work> work;
};

struct CUgraphExec_st {
  std::vector<Work> work;
};

struct CUstream_st {
  std::deque<Work> work;
  std::size_t done = 0;  // tasks completed since the start
  CUgraph recording = nullptr;
};

struct CUevent_st {
  CUstream stream = nullptr;
  std::size_t after = 0;  // completes after this many of its tasks
};

namespace {

std::recursive_mutex mutex;
std::map<CUdeviceptr, std::size_t> device_memory;
std::map<void*, std::size_t> pinned_memory;
std::set<CUstream> streams;
std::size_t graph_launches = 0;
std::size_t contexts_held = 0;
std::size_t freed_unwiped = 0;
thread_local std::vector<CUcontext> current;
thread_local int recordings = 0;  // begun by this thread

int number(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}

void run_until(CUstream stream, std::size_t count) {
  while (stream->done < count && !stream->work.empty()) {
    const Work work = std::move(stream->work.front());
    stream->work.pop_front();
    ++stream->done;
    work();
  }
}

void run_all(CUstream stream) { run_until(stream, stream->done + stream->work.size()); }

bool no_context() { return current.empty(); }

// Whether [address, address + bytes) lies within one allocation.
bool owned(CUdeviceptr address, std::size_t bytes) {
  auto after = device_memory.upper_bound(address);
  if (after != device_memory.begin()) {
    const auto& [start, size] = *std::prev(after);
    if (address + bytes <= start + size) return true;
  }
  for (const auto& [start, size] : pinned_memory) {
    const auto first = reinterpret_cast<CUdeviceptr>(start);
    if (address >= first && address + bytes <= first + size) return true;
  }
  return false;
}

bool is_pinned(const void* data, std::size_t bytes) {
  for (const auto& [start, size] : pinned_memory) {
    const auto* first = static_cast<const char*>(start);
    if (data >= first && static_cast<const char*>(data) + bytes <= first + size) return true;
  }
  return false;
}

CUresult put(CUstream stream, Work work) {
  if (no_context()) return CUDA_ERROR_INVALID_CONTEXT;
  if (stream->recording != nullptr) {
    stream->recording->work.push_back(std::move(work));
  } else {
    stream->work.push_back(std::move(work));
  }
  return CUDA_SUCCESS;
}

void* bytes_at(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

void count_unwiped(const void* data, std::size_t bytes) {
  const auto* first = static_cast<const char*>(data);
  if (std::any_of(first, first + bytes, [](char byte) { return byte != 0; })) ++freed_unwiped;
}

void* allocate(std::size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }

}  // namespace

// Functions for tests.
FAKE std::size_t fake_cuda_graph_launches() { return graph_launches; }
FAKE bool fake_cuda_has_context() { return !no_context(); }
// The number of allocations that were not all zeros when freed.
FAKE std::size_t fake_cuda_unwiped() { return freed_unwiped; }
FAKE std::size_t fake_cuda_held() {
  return device_memory.size() + pinned_memory.size() + streams.size() + contexts_held;
}

FAKE CUresult cuInit(unsigned) { return static_cast<CUresult>(number("TITANS_FAKE_CUDA_BROKEN", 0)); }
FAKE CUresult cuDriverGetVersion(int* version) {
  *version = number("TITANS_FAKE_DRIVER", 13000);
  return CUDA_SUCCESS;
}
FAKE CUresult cuGetErrorName(CUresult result, const char** name) {
  *name = result == CUDA_ERROR_NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_FAKE";
  return CUDA_SUCCESS;
}
FAKE CUresult cuGetErrorString(CUresult, const char** meaning) {
  *meaning = "of the driver for tests";
  return CUDA_SUCCESS;
}
FAKE CUresult cuDeviceGetCount(int* count) {
  *count = number("TITANS_FAKE_DEVICES", 1);
  return CUDA_SUCCESS;
}
FAKE CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal < number("TITANS_FAKE_DEVICES", 1) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
FAKE CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  const char* wanted = std::getenv("TITANS_FAKE_NAME");
  std::strncpy(name, wanted == nullptr ? "Fake GPU" : wanted, static_cast<std::size_t>(size));
  return CUDA_SUCCESS;
}
FAKE CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  const int sm = number("TITANS_FAKE_SM", 89);
  if (which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) *value = sm / 10;
  if (which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) *value = sm % 10;
  if (which == CU_DEVICE_ATTRIBUTE_INTEGRATED) *value = number("TITANS_FAKE_INTEGRATED", 0);
  return CUDA_SUCCESS;
}
FAKE CUresult cuDeviceTotalMem(std::size_t* bytes, CUdevice) {
  *bytes = std::size_t{8} << 30;
  return CUDA_SUCCESS;
}

FAKE CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  const std::lock_guard lock(mutex);
  ++contexts_held;
  *context = reinterpret_cast<CUcontext>(static_cast<std::uintptr_t>(device) + 1);
  return CUDA_SUCCESS;
}
FAKE CUresult cuDevicePrimaryCtxRelease(CUdevice) {
  const std::lock_guard lock(mutex);
  --contexts_held;
  return CUDA_SUCCESS;
}
FAKE CUresult cuCtxPushCurrent(CUcontext context) {
  current.push_back(context);
  return CUDA_SUCCESS;
}
FAKE CUresult cuCtxPopCurrent(CUcontext* context) {
  if (no_context()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = current.back();
  current.pop_back();
  return CUDA_SUCCESS;
}

FAKE CUresult cuMemAlloc(CUdeviceptr* address, std::size_t bytes) {
  const std::lock_guard lock(mutex);
  if (no_context()) return CUDA_ERROR_INVALID_CONTEXT;
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (recordings > 0) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  void* data = allocate(bytes);
  std::memset(data, 0x7f, bytes);  // unspecified contents
  *address = reinterpret_cast<CUdeviceptr>(data);
  device_memory[*address] = bytes;
  return CUDA_SUCCESS;
}
FAKE CUresult cuMemFree(CUdeviceptr address) {
  const std::lock_guard lock(mutex);
  if (no_context()) return CUDA_ERROR_INVALID_CONTEXT;
  for (const CUstream stream : streams) run_all(stream);  // like CUDA, waits for the device
  const auto found = device_memory.find(address);
  if (found == device_memory.end()) return CUDA_ERROR_INVALID_VALUE;
  count_unwiped(bytes_at(address), found->second);
  device_memory.erase(found);
  std::free(bytes_at(address));
  return CUDA_SUCCESS;
}
FAKE CUresult cuMemHostAlloc(void** data, std::size_t bytes, unsigned) {
  const std::lock_guard lock(mutex);
  if (no_context()) return CUDA_ERROR_INVALID_CONTEXT;
  *data = allocate(bytes);
  pinned_memory[*data] = bytes;
  return CUDA_SUCCESS;
}
FAKE CUresult cuMemFreeHost(void* data) {
  const std::lock_guard lock(mutex);
  if (no_context()) return CUDA_ERROR_INVALID_CONTEXT;
  for (const CUstream stream : streams) run_all(stream);
  const auto found = pinned_memory.find(data);
  if (found == pinned_memory.end()) return CUDA_ERROR_INVALID_VALUE;
  count_unwiped(data, found->second);
  pinned_memory.erase(found);
  std::free(data);
  return CUDA_SUCCESS;
}
FAKE CUresult cuMemHostGetDevicePointer(CUdeviceptr* address, void* data, unsigned) {
  *address = reinterpret_cast<CUdeviceptr>(data);
  return CUDA_SUCCESS;
}

FAKE CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, std::size_t bytes, CUstream stream) {
  const std::lock_guard lock(mutex);
  if (!owned(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
  if (is_pinned(from, bytes)) return put(stream, [=] { std::memcpy(bytes_at(to), from, bytes); });
  if (stream->recording != nullptr) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  // The caller may reuse pageable memory immediately.
  const std::string copy(static_cast<const char*>(from), bytes);
  return put(stream, [=] { std::memcpy(bytes_at(to), copy.data(), bytes); });
}
FAKE CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
  const std::lock_guard lock(mutex);
  if (!owned(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
  return put(stream, [=] { std::memcpy(to, bytes_at(from), bytes); });
}
FAKE CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
  const std::lock_guard lock(mutex);
  if (!owned(to, bytes) || !owned(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
  return put(stream, [=] { std::memmove(bytes_at(to), bytes_at(from), bytes); });
}
FAKE CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D* wanted, CUstream stream) {
  const std::lock_guard lock(mutex);
  const CUDA_MEMCPY2D copy = *wanted;
  const std::size_t last = (copy.Height - 1) * copy.srcPitch + copy.WidthInBytes;
  if (copy.WidthInBytes > copy.srcPitch || !owned(copy.srcDevice, last) || !owned(copy.dstDevice, last)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return put(stream, [=] {
    for (std::size_t row = 0; row < copy.Height; ++row) {
      std::memcpy(bytes_at(copy.dstDevice + row * copy.dstPitch), bytes_at(copy.srcDevice + row * copy.srcPitch),
                  copy.WidthInBytes);
    }
  });
}
FAKE CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, std::size_t bytes, CUstream stream) {
  const std::lock_guard lock(mutex);
  return put(stream, [=] { std::memset(bytes_at(to), value, bytes); });
}

FAKE CUresult cuStreamCreate(CUstream* stream, unsigned) {
  const std::lock_guard lock(mutex);
  if (no_context()) return CUDA_ERROR_INVALID_CONTEXT;
  streams.insert(*stream = new CUstream_st);
  return CUDA_SUCCESS;
}
FAKE CUresult cuStreamDestroy(CUstream stream) {
  const std::lock_guard lock(mutex);
  if (no_context()) return CUDA_ERROR_INVALID_CONTEXT;
  run_all(stream);
  streams.erase(stream);
  delete stream;
  return CUDA_SUCCESS;
}
FAKE CUresult cuStreamSynchronize(CUstream stream) {
  const std::lock_guard lock(mutex);
  if (no_context()) return CUDA_ERROR_INVALID_CONTEXT;
  if (stream->recording != nullptr) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  run_all(stream);
  return CUDA_SUCCESS;
}
FAKE CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
  const std::lock_guard lock(mutex);
  const CUevent_st of = *event;
  return of.stream == nullptr ? CUDA_SUCCESS : put(stream, [=] { run_until(of.stream, of.after); });
}
FAKE CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode) {
  const std::lock_guard lock(mutex);
  if (number("TITANS_FAKE_NO_CAPTURE", 0) != 0) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  stream->recording = new CUgraph_st;
  ++recordings;
  return CUDA_SUCCESS;
}
FAKE CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  const std::lock_guard lock(mutex);
  *graph = stream->recording;
  stream->recording = nullptr;
  --recordings;
  return CUDA_SUCCESS;
}
FAKE CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
  const std::lock_guard lock(mutex);
  return put(stream, [=] { function(data); });
}

FAKE CUresult cuEventCreate(CUevent* event, unsigned) {
  *event = new CUevent_st;
  return CUDA_SUCCESS;
}
FAKE CUresult cuEventDestroy(CUevent event) {
  if (no_context()) return CUDA_ERROR_INVALID_CONTEXT;
  delete event;
  return CUDA_SUCCESS;
}
FAKE CUresult cuEventRecord(CUevent event, CUstream stream) {
  const std::lock_guard lock(mutex);
  *event = {stream, stream->done + stream->work.size()};
  return CUDA_SUCCESS;
}
FAKE CUresult cuEventSynchronize(CUevent event) {
  const std::lock_guard lock(mutex);
  if (event->stream != nullptr) run_until(event->stream, event->after);
  return CUDA_SUCCESS;
}

FAKE CUresult cuGraphDestroy(CUgraph graph) {
  delete graph;
  return CUDA_SUCCESS;
}
FAKE CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long) {
  *exec = new CUgraphExec_st{graph->work};
  return CUDA_SUCCESS;
}
FAKE CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
  const std::lock_guard lock(mutex);
  ++graph_launches;
  for (const Work& work : exec->work) {
    const CUresult result = put(stream, work);
    if (result != CUDA_SUCCESS) return result;
  }
  return CUDA_SUCCESS;
}
FAKE CUresult cuGraphExecDestroy(CUgraphExec exec) {
  if (no_context()) return CUDA_ERROR_INVALID_CONTEXT;
  delete exec;
  return CUDA_SUCCESS;
}
