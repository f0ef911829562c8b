// A CUDA kernel of an operator with operands of fixed dtypes and no workspace. This header needs no CUDA headers.
#pragma once

#include <cstdint>
#include <string>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace titans::kernels {

// The kernel of one node. Thread-safe.
template <class Operands>
class CudaNodeKernel {
 public:
  virtual ~CudaNodeKernel() = default;

  // Checks everything except the values of the operands, which are in device memory, and enqueues the work. It neither
  // allocates nor synchronizes, so a CUDA graph can capture it. Returns an error with nothing enqueued, or an empty
  // string. A state is updated in place if its input and output are one buffer; otherwise the pool is copied first.
  // Results are deterministic.
  //
  // A stream with an index out of range is invalid: its state stays unchanged and its y is NaN. `status` is optional:
  // one word of device memory that the caller has set to 0. It receives the number of an invalid operand
  // (cuda_status.h).
  virtual std::string run(const Operands& operands, std::int32_t* status, CUstream_st* stream) const = 0;
};

}  // namespace titans::kernels
