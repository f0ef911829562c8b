// HyperConnection on an NVIDIA GPU. This header needs no CUDA headers.
#pragma once

#include <memory>
#include <string>

#include "plugins/kernels/cuda_node.h"
#include "plugins/kernels/hyper_connection.h"
#include "plugins/kernels/neural_memory_cuda.h"

namespace titans::kernels::hyper_connection {

using CudaKernel = CudaNodeKernel<Operands>;

// Returns null and sets `error` if the device is not supported.
std::unique_ptr<CudaKernel> make_cuda_kernel(const Configuration& configuration, const CudaDevice& device,
                                             std::string& error);

}  // namespace titans::kernels::hyper_connection
