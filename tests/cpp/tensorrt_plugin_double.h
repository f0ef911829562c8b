// A test double of the CUDA kernel, and of the one function of CUDA that the TensorRT plugin calls: computes with the
// CPU kernel in host memory, and remembers what it was given. It stands in the plugin's library instead of both.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "plugins/kernels/neural_memory_cuda.h"

struct TitansDouble {
  titans::kernels::CudaDevice device;  // sm 0: there is none
  std::size_t created = 0;             // kernels
  std::size_t copies = 0;              // by cudaMemcpy2DAsync

  // Of the last call that the kernel ran.
  std::size_t runs = 0;
  titans::kernels::Operands operands;
  std::vector<std::uint8_t> learn;
  void* workspace = nullptr;
  CUstream_st* stream = nullptr;
};

// What the library that has the double exports beside the plugin.
inline constexpr const char* kTitansDouble = "titans_double";
using TitansDoubleFunction = TitansDouble& (*)();
