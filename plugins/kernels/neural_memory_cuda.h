// NeuralMemory on an NVIDIA GPU. This header includes none of CUDA's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "plugins/kernels/neural_memory.h"

struct CUstream_st;  // a cudaStream_t points to one

namespace titans::kernels {

// The properties that decide where a head's state is kept and over how many blocks a head is spread.
struct CudaDevice {
  int sm = 0;  // compute capability times 10: 87, 90, 120
  int multiprocessors = 0;
  std::size_t shared_bytes = 0;  // that one block can have
  int most_cluster = 8;          // blocks with that much shared memory each that fit into a cluster; from sm_90 on

  // The current device. Returns an error if there is none, or an empty string.
  static std::string current(CudaDevice& device);
};

// The kernel of one node. Any number of threads may run it at once, with a workspace each.
class CudaKernel {
 public:
  // `values` is the type of q, k, v and y: kFloat32, kFloat16 or kBFloat16. Matmuls take operands of that
  // precision and add up in float32. Returns null and sets `error` if the device or the dtype is not supported.
  static std::unique_ptr<CudaKernel> create(const Configuration& configuration, DType values, const CudaDevice& device,
                                            std::string& error);
  virtual ~CudaKernel() = default;

  // Bytes of device memory that a call of this size needs beside its operands, aligned to 256 bytes. Grows with each.
  virtual std::size_t workspace_bytes(std::int64_t streams, std::int64_t heads, std::int64_t tokens) const = 0;

  // Checks all but the values of the operands, which are in device memory, and puts the work into `stream`: no
  // allocation, no synchronisation, so a CUDA graph can capture it. Returns an error, with nothing enqueued, or an
  // empty string. W and S are updated in place if `state` and `state_out` are one buffer, otherwise the pool is copied
  // first. Results do not depend on timing.
  //
  // A stream whose fill, valid or slot is out of range, or one of whose gates is not finite, keeps its state, and its y
  // and stats are NaN. If `status` (one word of device memory, set to 0 by the caller) is given, it then has the
  // operand: see status_message.
  virtual std::string run(const Operands& operands, void* workspace, std::int32_t* status,
                          CUstream_st* stream) const = 0;

  // How calls of this size are placed, for users and tests: "blocks 4, state shared, rows shared, 148 KiB".
  virtual std::string placement(std::int64_t streams, std::int64_t heads, std::int64_t tokens) const = 0;

  // The error of a status word, or an empty string for 0.
  static std::string status_message(std::int32_t status);
};

}  // namespace titans::kernels
