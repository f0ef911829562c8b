// The device of a node on a GPU, its scratch memory, and its status word.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct CUstream_st;
struct CUmemPoolHandle_st;

namespace titans::plugins {

// The error of a CUDA call, or an empty string if `result`, a cudaError_t, is a success.
std::string cuda_failure(int result, const char* call);

// Makes a device the thread's current one for the life of the object. Throws std::runtime_error.
class DeviceScope {
 public:
  explicit DeviceScope(int ordinal);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = -1;  // -1: it was the same
};

// Device memory that a call needs until its work is done, in the order of its stream: taken when this is made, given
// back when it is destroyed, though the work may not have begun. What ONNX Runtime's own allocators give back may go at
// once to a call on another stream.
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

// The word that kernels write for the calls of this thread, in host memory that every device sees: a word that is
// there when the work has been done, without a copy and without waiting.
std::int32_t* thread_status();
// What it holds, and 0 from now on.
std::int32_t take_thread_status();

}  // namespace titans::plugins
