// CachedAttention on an NVIDIA GPU. This header needs no CUDA headers.
#pragma once

#include <memory>
#include <string>

#include "plugins/kernels/cached_attention.h"
#include "plugins/kernels/cuda_node.h"
#include "plugins/kernels/neural_memory_cuda.h"

namespace titans::kernels::cached_attention {

using CudaKernel = CudaNodeKernel<Operands>;

// Returns null and sets `error` if the device or the width is not supported.
std::unique_ptr<CudaKernel> make_cuda_kernel(const Configuration& configuration, const CudaDevice& device,
                                             std::string& error);

}  // namespace titans::kernels::cached_attention
