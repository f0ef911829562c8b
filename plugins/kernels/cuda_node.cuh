// Parts of CUDA kernels that serve a pool of streams: checks of the streams' indices, and the size of a launch.
#pragma once

#include "plugins/kernels/cuda_device.cuh"
#include "plugins/kernels/cuda_numbers.cuh"
#include "plugins/kernels/cuda_status.h"
#include "plugins/kernels/failure.h"

namespace titans::kernels::cuda {

// What a call says about its streams, in device memory. Both arrays may be null.
struct StreamIndices {
  const std::int64_t *valid, *slots;
  int streams, tokens;
  std::int64_t pool;
  int valid_status, slots_status;  // the status words of the two operands

  __device__ int valid_tokens(int stream) const { return valid == nullptr ? tokens : static_cast<int>(valid[stream]); }
  __device__ std::int64_t slot(int stream) const { return slots == nullptr ? stream : slots[stream]; }
};

// The status of a stream: 0, or that of an operand with a value out of range. Two streams with one slot are both
// invalid. All threads of the block call it and receive the same status.
__device__ inline int wrong_index(const StreamIndices& call, int stream) {
  if (call.valid != nullptr && (call.valid[stream] < 0 || call.valid[stream] > call.tokens)) return call.valid_status;
  if (call.slots == nullptr) return 0;
  if (call.slots[stream] < 0 || call.slots[stream] >= call.pool) return call.slots_status;
  bool twice = false;
  for (int other = thread_index(); other < call.streams; other += kThreads) {
    twice = twice || (other != stream && call.slots[other] == call.slots[stream]);
  }
  return any_in_block(twice) ? call.slots_status : 0;
}

// ---- the host's side ----

inline constexpr int kLeastSm = 80;
inline constexpr std::int64_t kLargestCall = std::int64_t{1} << 30;  // elements of a tensor: keeps sizes within 32 bits

// The error of a device that is too old, or an empty string.
inline std::string unsupported(const char* op, const CudaDevice& device) {
  if (device.sm >= kLeastSm) return {};
  return failure(op, "E0712",
                 "not supported on this GPU: expected compute capability 8.0 or newer, got " +
                     std::to_string(device.sm / 10) + "." + std::to_string(device.sm % 10),
                 "run on the CPU");
}

// The error of a size above `most`, or an empty string.
inline std::string too_large(const char* op, const char* what, std::int64_t most, std::int64_t got, const char* fix) {
  if (got <= most) return {};
  return failure(
      op, "E0712",
      "not supported on a GPU: expected at most " + std::to_string(most) + " " + what + ", got " + std::to_string(got),
      fix);
}

// Blocks of a launch whose blocks loop over `work` independent items.
inline constexpr std::int64_t kMostNodeBlocks = 1 << 20;
inline int blocks_for(std::int64_t work) { return static_cast<int>(work < kMostNodeBlocks ? work : kMostNodeBlocks); }

}  // namespace titans::kernels::cuda
