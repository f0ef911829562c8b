#include "plugins/tools/device_memory.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace titans::kernels {

constexpr std::align_val_t kAlignment{256};  // the same as cudaMalloc's

DeviceBuffer::DeviceBuffer(std::size_t bytes) : data_(::operator new(bytes, kAlignment)), bytes_(bytes) {
  std::memset(data_, 0xFF, bytes);
}
DeviceBuffer::~DeviceBuffer() { ::operator delete(data_, kAlignment); }
void DeviceBuffer::upload(const void* host) { std::memcpy(data_, host, bytes_); }
void DeviceBuffer::download(void* host) const { std::memcpy(host, data_, bytes_); }

void synchronize() {}
CUstream_st* work_stream() { return nullptr; }
std::vector<double> time_on_device(const std::function<void()>&, std::size_t, bool) {
  throw std::runtime_error("[emulation] nothing to time: this is an emulation. Fix: run on a GPU");
}

}  // namespace titans::kernels
