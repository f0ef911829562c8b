// A test double of the CUDA kernel and of the one CUDA function that the TensorRT plugin calls. It computes with the
// CPU kernel in host memory and records its arguments. The plugin's library has it in place of both.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "plugins/kernels/neural_memory_cuda.h"

struct TitansDouble {
  titans::kernels::CudaDevice device;  // sm 0: no device
  std::size_t created = 0;             // number of kernels made
  std::size_t copies = 0;              // number of cudaMemcpy2DAsync calls

  // The last call that the kernel ran.
  std::size_t runs = 0;
  titans::kernels::Operands operands;
  std::vector<std::uint8_t> learn;
  void* workspace = nullptr;
  CUstream_st* stream = nullptr;
};

// The symbol that a library with the double exports beside the plugin.
inline constexpr const char* kTitansDouble = "titans_double";
using TitansDoubleFunction = TitansDouble& (*)();
