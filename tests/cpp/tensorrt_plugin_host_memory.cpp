// plugins/tools/device_memory.h in host memory, for plugin libraries whose kernel runs on the CPU.
#include <chrono>
#include <cstring>
#include <new>

#include "plugins/tools/device_memory.h"

namespace titans::kernels {

DeviceBuffer::DeviceBuffer(std::size_t bytes) : data_(::operator new(bytes, std::align_val_t{64})), bytes_(bytes) {
  std::memset(data_, 0xFF, bytes_);
}
DeviceBuffer::~DeviceBuffer() { ::operator delete(data_, std::align_val_t{64}); }
void DeviceBuffer::upload(const void* host) { std::memcpy(data_, host, bytes_); }
void DeviceBuffer::download(void* host) const { std::memcpy(host, data_, bytes_); }

void synchronize() {}
CUstream_st* work_stream() { return nullptr; }

std::vector<double> time_on_device(const std::function<void()>& work, std::size_t repeats, bool) {
  std::vector<double> times;
  for (std::size_t i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    times.push_back(std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count());
  }
  return times;
}

}  // namespace titans::kernels
