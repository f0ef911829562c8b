// Memory of the device that a CUDA kernel runs on, for the programs that test and time it: a GPU's, or the emulation's.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

struct CUstream_st;

namespace titans::kernels {

class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t bytes);  // bytes of 0xFF
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  void upload(const void* host);
  void download(void* host) const;

 private:
  void* data_;
  std::size_t bytes_;
};

// All that follows throws std::runtime_error with CUDA's words where it fails.

// Waits for the device.
void synchronize();
// Nanoseconds of device time that each run of `work` took; with `graph`, captured once and replayed.
std::vector<double> time_on_device(const std::function<void()>& work, std::size_t repeats, bool graph);
// The stream that `work` puts its launches into.
CUstream_st* work_stream();

}  // namespace titans::kernels
