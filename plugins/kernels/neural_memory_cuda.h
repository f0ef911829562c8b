// NeuralMemory and ChunkNeuralMemory on an NVIDIA GPU. This header needs no CUDA headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "plugins/kernels/chunk_neural_memory.h"
#include "plugins/kernels/neural_memory.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace titans::kernels {

// The device properties that decide where a head's state is kept and how many blocks share a head.
struct CudaDevice {
  int sm = 0;  // compute capability times 10: 87, 90, 120
  int multiprocessors = 0;
  std::size_t shared_bytes = 0;  // per block, at most
  int most_cluster = 8;          // blocks of that much shared memory in one cluster, at most; needs sm_90

  // Reads the properties of the current device. Returns an error, or an empty string.
  static std::string current(CudaDevice& device);
};

// The kernel of one node. Thread-safe if each thread has its own workspace.
class CudaKernel {
 public:
  // `values` is the dtype of q, k, v and y: kFloat32, kFloat16 or kBFloat16. Matmuls take operands of that precision
  // and accumulate in float32. Returns null and sets `error` if the device or the dtype is not supported.
  static std::unique_ptr<CudaKernel> create(const Configuration& configuration, DType values, const CudaDevice& device,
                                            std::string& error);
  // For ChunkNeuralMemory, `values` is kFloat32.
  static std::unique_ptr<CudaKernel> create(const ChunkConfiguration& configuration, DType values,
                                            const CudaDevice& device, std::string& error);
  virtual ~CudaKernel() = default;

  // Bytes of device memory that a call of this size needs beside its operands, aligned to 256 bytes. Monotonic in each
  // argument.
  virtual std::size_t workspace_bytes(std::int64_t streams, std::int64_t heads, std::int64_t tokens) const = 0;

  // Checks everything except the values of the operands, which are in device memory, and enqueues the work. It neither
  // allocates nor synchronizes, so a CUDA graph can capture it. Returns an error with nothing enqueued, or an empty
  // string. W and S are updated in place if `state` and `state_out` are one buffer; otherwise the pool is copied first.
  // Results are deterministic.
  //
  // A stream is invalid if its fill, valid or slot is out of range, or if one of its gates is not finite. Its state
  // stays unchanged, and its y and stats are NaN. `status` is optional: one word of device memory that the caller has
  // set to 0. It receives the number of an invalid operand (cuda_status.h).
  virtual std::string run(const Operands& operands, void* workspace, std::int32_t* status,
                          CUstream_st* stream) const = 0;

  // A description of a call's plan, for users and tests: "blocks 4, state shared, rows shared, 148 KiB".
  virtual std::string placement(std::int64_t streams, std::int64_t heads, std::int64_t tokens) const = 0;
};

}  // namespace titans::kernels
