// The CUDA functions that the TensorRT plugin calls beside its kernel, in host memory. For the library with the
// emulated kernel.
#include <cuda_runtime_api.h>

#include <cstring>

extern "C" cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                                         std::size_t width, std::size_t height, cudaMemcpyKind, cudaStream_t) {
  for (std::size_t row = 0; row < height; ++row) {
    std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
  }
  return cudaSuccess;
}

extern "C" const char* cudaGetErrorString(cudaError_t) { return "an error of the emulation"; }
