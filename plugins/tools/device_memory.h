// Device memory for the programs that test and time a CUDA kernel, on a GPU or in the emulation.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

struct CUstream_st;

namespace titans::kernels {

class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t bytes);  // filled with 0xFF
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

// All functions below throw std::runtime_error with CUDA's message on failure.

// Waits for the device.
void synchronize();
// Nanoseconds of device time per run of `work`. With `graph`, `work` is captured once and replayed.
std::vector<double> time_on_device(const std::function<void()>& work, std::size_t repeats, bool graph);
// The stream in which `work` must launch.
CUstream_st* work_stream();

}  // namespace titans::kernels
