// What a backend keeps on a CUDA device, each freed by its owner. All of it belongs to the device's primary context,
// which CUDA's own runtime, TensorRT and ONNX Runtime use too.
//
// Functions of the driver want the context to be current on the calling thread: each member here sees to it itself.
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

// "cuda" is device 0, "cuda:N" device N. An Error where `device` is neither, or there is no such device.
DeviceInfo find_device(const Driver& driver, const std::string& device);

// The primary context of a device, kept as long as somebody holds it.
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

// Ordered work. One that no implicit synchronisation with the default stream holds up.
class Stream {
 public:
  explicit Stream(const Context& context);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  CUstream get() const { return stream_; }
  const Context& context() const { return context_; }
  void synchronize() const;
  // What is put into the stream from now on starts when what `event` stands for has finished.
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

// Memory of the device, zeroed, and again before it goes back; the stream outlives it, and all work on it is in that
// stream or has finished.
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

// Host memory that the device reads and writes directly, zeroed, and again before it goes back.
class PinnedMemory {
 public:
  PinnedMemory(const Context& context, std::size_t bytes);
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  std::size_t size() const { return size_; }
  std::byte* data() const { return data_; }
  // Where the device sees it: on one that shares its memory with the host, no copy is needed.
  CUdeviceptr device_address() const { return device_address_; }

 private:
  const Context& context_;
  std::size_t size_;
  std::byte* data_ = nullptr;
  CUdeviceptr device_address_ = 0;
};

// Copies put into a stream; the caller synchronises. Host memory that is not pinned may be reused when they return.
void copy_to_device(const Stream& stream, CUdeviceptr to, const void* from, std::size_t bytes);
void copy_to_host(const Stream& stream, void* to, CUdeviceptr from, std::size_t bytes);
void copy_on_device(const Stream& stream, CUdeviceptr to, CUdeviceptr from, std::size_t bytes);
// A stripe, from where it lies in the tensor at `from` to the same place of the one at `to`: one copy for all rows.
void copy_stripe(const Stream& stream, CUdeviceptr to, CUdeviceptr from, const Stripe& stripe);

// Work recorded from a stream, launched as one.
class GraphExec {
 public:
  // Records what `enqueue` puts into the stream; nothing of it runs. NULL where the work cannot be recorded, with the
  // reason in `why_not`; what `enqueue` throws is such a reason too.
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
  // Ends the recording whatever happens: a stream left in it would take no more work.
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
