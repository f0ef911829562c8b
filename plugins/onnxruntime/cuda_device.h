// A node's device on a GPU, its scratch memory, and its status word.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct CUstream_st;
struct CUmemPoolHandle_st;

namespace titans::plugins {

// The error of a CUDA call, or an empty string on success. `result`: a cudaError_t.
std::string cuda_failure(int result, const char* call);

// Makes a device the thread's current one while the object lives. Throws std::runtime_error.
class DeviceScope {
 public:
  explicit DeviceScope(int ordinal);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = -1;  // -1: unchanged
};

// Scratch memory of a call, allocated and freed in the order of its stream. The destructor may run before the call's
// work has begun. ONNX Runtime's allocators are not stream-ordered: they may hand freed memory to another stream at
// once.
class Scratch {
 public:
  Scratch(int ordinal, std::size_t bytes, CUstream_st* stream);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  CUstream_st* stream_;
  void* data_ = nullptr;
};

// The status word that kernels write for this thread's calls. It is in host memory that every device can write, so
// reading it after the work takes neither a copy nor a wait.
std::int32_t* thread_status();
// Returns the status word and resets it to 0.
std::int32_t take_thread_status();

}  // namespace titans::plugins
