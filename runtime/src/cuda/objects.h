// RAII owners of CUDA driver objects. All belong to the device's primary context, which the CUDA runtime, TensorRT and
// ONNX Runtime also use.
//
// Driver functions need the context current on the calling thread. Each member here ensures that itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "backends/backend.h"
#include "cuda/driver.h"

namespace titans::core::cuda {

struct DeviceInfo {
  int ordinal;
  std::string name;
  int sm;  // compute capability times 10: 87, 90, 120
  std::uint64_t total_bytes;
  bool integrated;     // shares its memory with the host: a Jetson, DGX Spark
  int driver_version;  // cuDriverGetVersion
};

// "cuda" is device 0, "cuda:N" device N. Throws an Error for other strings and missing devices.
DeviceInfo find_device(const Driver& driver, const std::string& device);

// The primary context of a device, retained for the life of the object.
class Context {
 public:
  Context(const Driver& driver, int ordinal);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  const Driver& driver() const { return driver_; }

  // Makes the context current on this thread for the life of the object.
  class Scope {
   public:
    explicit Scope(const Context& context);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    const Driver& driver_;
  };

 private:
  const Driver& driver_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
};

class Event;

// A non-blocking CUDA stream, which does not synchronise with the default stream.
class Stream {
 public:
  explicit Stream(const Context& context);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  CUstream get() const { return stream_; }
  const Context& context() const { return context_; }
  void synchronize() const;
  // Later work in the stream waits for `event`.
  void wait_for(const Event& event) const;

 private:
  const Context& context_;
  CUstream stream_ = nullptr;
};

class Event {
 public:
  explicit Event(const Context& context);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  CUevent get() const { return event_; }
  void record(const Stream& stream) const;
  void synchronize() const;

 private:
  const Context& context_;
  CUevent event_ = nullptr;
};

// Device memory, zeroed when allocated and again when freed. The stream must outlive it, and all work on it must be in
// that stream or finished.
class DeviceMemory {
 public:
  DeviceMemory(const Stream& stream, std::size_t bytes);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  std::size_t size() const { return size_; }
  CUdeviceptr address() const { return address_; }
  void* data() const { return reinterpret_cast<void*>(address_); }

 private:
  const Stream& stream_;
  std::size_t size_;
  CUdeviceptr address_ = 0;
};

// Page-locked host memory that the device can access, zeroed when allocated and again when freed.
class PinnedMemory {
 public:
  PinnedMemory(const Context& context, std::size_t bytes);
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  std::size_t size() const { return size_; }
  std::byte* data() const { return data_; }
  // The device's address for it. With unified memory no copy is needed.
  CUdeviceptr device_address() const { return device_address_; }

 private:
  const Context& context_;
  std::size_t size_;
  std::byte* data_ = nullptr;
  CUdeviceptr device_address_ = 0;
};

// Enqueue copies; the caller synchronises. Host memory that is not pinned may be reused after the call.
void copy_to_device(const Stream& stream, CUdeviceptr to, const void* from, std::size_t bytes);
void copy_to_host(const Stream& stream, void* to, CUdeviceptr from, std::size_t bytes);
void copy_on_device(const Stream& stream, CUdeviceptr to, CUdeviceptr from, std::size_t bytes);
// Copies a stripe to the same place of another tensor, as one copy for all rows.
void copy_stripe(const Stream& stream, CUdeviceptr to, CUdeviceptr from, const Stripe& stripe);

// Captured work that is launched as one CUDA graph.
class GraphExec {
 public:
  // Captures the work that `enqueue` puts into the stream without running it. Returns NULL and sets `why_not` if the
  // work cannot be captured or `enqueue` throws.
  template <typename Enqueue>
  static std::unique_ptr<GraphExec> capture(const Stream& stream, std::string& why_not, Enqueue&& enqueue) {
    Recording recording(stream, why_not);
    if (!recording.running()) return nullptr;
    try {
      enqueue();
    } catch (const std::exception& error) {
      why_not = error.what();
      return nullptr;
    }
    return recording.finish();
  }
  ~GraphExec();
  GraphExec(const GraphExec&) = delete;
  GraphExec& operator=(const GraphExec&) = delete;
  void launch(const Stream& stream) const;

 private:
  // Always ends the capture: a stream still capturing would accept no other work.
  class Recording {
   public:
    Recording(const Stream& stream, std::string& why_not);
    ~Recording();
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;
    bool running() const { return running_; }
    std::unique_ptr<GraphExec> finish();

   private:
    const Stream& stream_;
    std::string& why_not_;
    bool running_;
  };

  GraphExec(const Context& context, CUgraphExec exec) : context_(context), exec_(exec) {}
  const Context& context_;
  CUgraphExec exec_;
};

}  // namespace titans::core::cuda
