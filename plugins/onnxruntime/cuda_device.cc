#include "plugins/onnxruntime/cuda_device.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "plugins/kernels/failure.h"

namespace titans::plugins {
namespace {

void check_cuda(cudaError_t result, const char* call) {
  const std::string error = cuda_failure(result, call);
  if (!error.empty()) throw std::runtime_error(error);
}

// One memory pool per device. It keeps freed memory for reuse, and lives as long as the process.
cudaMemPool_t pool_of(int ordinal) {
  static std::mutex mutex;
  static auto& pools = *new std::map<int, cudaMemPool_t>;
  const std::lock_guard lock(mutex);
  const auto found = pools.find(ordinal);
  if (found != pools.end()) return found->second;
  cudaMemPoolProps properties{};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = ordinal;
  cudaMemPool_t pool = nullptr;
  check_cuda(cudaMemPoolCreate(&pool, &properties), "cudaMemPoolCreate");
  std::uint64_t keep = UINT64_MAX;
  check_cuda(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep), "cudaMemPoolSetAttribute");
  return pools[ordinal] = pool;
}

// Status words are reused by later threads and never freed, because pending work may still write to them.
class StatusWords {
 public:
  std::int32_t* take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) {
      constexpr std::size_t kWords = 1024;
      void* page = nullptr;
      check_cuda(cudaHostAlloc(&page, kWords * sizeof(std::int32_t), cudaHostAllocPortable | cudaHostAllocMapped),
                 "cudaHostAlloc");
      for (std::size_t i = 0; i < kWords; ++i) free_.push_back(static_cast<std::int32_t*>(page) + i);
    }
    std::int32_t* word = free_.back();
    free_.pop_back();
    *word = 0;
    return word;
  }
  void give_back(std::int32_t* word) {
    const std::lock_guard lock(mutex_);
    free_.push_back(word);
  }
  static StatusWords& all() {
    static auto& words = *new StatusWords;
    return words;
  }

 private:
  std::mutex mutex_;
  std::vector<std::int32_t*> free_;
};

struct ThreadWord {
  std::int32_t* word = nullptr;
  ~ThreadWord() {
    if (word != nullptr) StatusWords::all().give_back(word);
  }
};

thread_local ThreadWord own;

}  // namespace

std::string cuda_failure(int result, const char* call) {
  const auto code = static_cast<cudaError_t>(result);
  if (code == cudaSuccess) return {};
  return kernels::failure(
      "NeuralMemory", "E0713",
      std::string("CUDA call failed: ") + call + ": " + cudaGetErrorName(code) + " (" + cudaGetErrorString(code) + ")",
      "check the GPU and its driver with nvidia-smi");
}

DeviceScope::DeviceScope(int ordinal) {
  int current = 0;
  check_cuda(cudaGetDevice(&current), "cudaGetDevice");
  if (current == ordinal) return;
  check_cuda(cudaSetDevice(ordinal), "cudaSetDevice");
  before_ = current;
}

DeviceScope::~DeviceScope() {
  if (before_ >= 0) cudaSetDevice(before_);
}

Scratch::Scratch(int ordinal, std::size_t bytes, CUstream_st* stream) : stream_(stream) {
  if (bytes == 0) return;
  check_cuda(cudaMallocFromPoolAsync(&data_, bytes, pool_of(ordinal), stream), "cudaMallocFromPoolAsync");
}

Scratch::~Scratch() {
  if (data_ != nullptr) cudaFreeAsync(data_, stream_);
}

std::int32_t* thread_status() {
  if (own.word == nullptr) own.word = StatusWords::all().take();
  return own.word;
}

std::int32_t take_thread_status() {
  return own.word == nullptr ? 0 : __atomic_exchange_n(own.word, 0, __ATOMIC_ACQ_REL);
}

}  // namespace titans::plugins
