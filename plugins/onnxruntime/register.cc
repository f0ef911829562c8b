// The entry point of the library of custom operators, and functions for the titans runtime.
#include <onnxruntime_c_api.h>

#include <cstdio>
#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "plugins/kernels/cpu_kernel.h"
#include "plugins/onnxruntime/memory_op.h"
#include "plugins/onnxruntime/node_op.h"
#include "plugins/onnxruntime/session_entry.h"

#define TITANS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::vector<const OrtCustomOp*> all_ops(bool on_cuda) {
  using namespace titans::plugins;
  std::vector<const OrtCustomOp*> ops = cpu_ops();
  const auto add = [&](const std::vector<const OrtCustomOp*>& more) {
    ops.insert(ops.end(), more.begin(), more.end());
  };
  // Without CUDA kernels, a session on a GPU computes these operators by their function bodies. ONNX Runtime would
  // otherwise copy their operands to the CPU.
  if (!on_cuda) add(cpu_node_ops());
#ifdef TITANS_WITH_CUDA
  add(cuda_ops());
  add(cuda_node_ops());
#endif
  return ops;
}

// The domain is never released, because sessions refer to it as long as they live. Sessions of one ONNX Runtime on one
// kind of device share a domain; a process may have two.
OrtStatus* add_domain(const OrtApi& api, OrtSessionOptions& options) {
  static std::mutex mutex;
  static auto& domains = *new std::map<std::pair<const OrtApi*, bool>, OrtCustomOpDomain*>;
  int on_cuda = 0;
  if (OrtStatus* status = api.HasSessionConfigEntry(&options, titans::plugins::kCudaEntry, &on_cuda)) return status;
  const std::lock_guard lock(mutex);
  OrtCustomOpDomain*& domain = domains[{&api, on_cuda != 0}];
  if (domain == nullptr) {
    OrtCustomOpDomain* made = nullptr;
    if (OrtStatus* status = api.CreateCustomOpDomain(titans::plugins::kDomain, &made)) return status;
    for (const OrtCustomOp* op : all_ops(on_cuda != 0)) {
      if (OrtStatus* status = api.CustomOpDomain_Add(made, op)) {
        api.ReleaseCustomOpDomain(made);
        return status;
      }
    }
    domain = made;
  }
  return api.AddCustomOpDomain(&options, domain);
}

}  // namespace

TITANS_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  try {
    const OrtApi* api = base->GetApi(ORT_API_VERSION);
    if (api != nullptr) return add_domain(*api, *options);
    // The first functions of OrtApi are the same in every version.
    const std::string text =
        titans::kernels::failure("NeuralMemory", "E0712",
                                 "not supported by this ONNX Runtime: expected 1." + std::to_string(ORT_API_VERSION) +
                                     " or newer, got " + base->GetVersionString(),
                                 "run pip install --upgrade onnxruntime, or build this library for the older one");
    return base->GetApi(1)->CreateStatus(ORT_FAIL, text.c_str());
  } catch (const std::exception& error) {
    return base->GetApi(1)->CreateStatus(ORT_FAIL, error.what());
  }
}

// The instruction set of new kernels, or NULL if this machine does not support $TITANS_CPU_TARGET.
TITANS_EXPORT const char* titans_onnxruntime_ops_target() {
  const std::string_view target = titans::kernels::chosen_cpu_target();
  return target.empty() ? nullptr : target.data();
}

// Writes the target of kernels on the CUDA device, such as "cuda-sm90", and returns 1. On failure, writes an error and
// returns 0.
TITANS_EXPORT int titans_onnxruntime_ops_cuda_target([[maybe_unused]] int ordinal, char* text, std::size_t size) {
  std::string target;
  std::string error =
      titans::kernels::failure("NeuralMemory", "E0712", "not supported by this build: the library has no CUDA kernel",
                               "build it with a CUDA compiler");
#ifdef TITANS_WITH_CUDA
  target = titans::plugins::cuda_target(ordinal, error);
#endif
  std::snprintf(text, size, "%s", target.empty() ? error.c_str() : target.c_str());
  return target.empty() ? 0 : 1;
}

// The numbers of kernels that the process has made for CPU and CUDA.
TITANS_EXPORT void titans_onnxruntime_ops_made(std::size_t* cpu, std::size_t* cuda) {
  *cpu = titans::plugins::cpu_kernels_made();
  *cuda = 0;
#ifdef TITANS_WITH_CUDA
  *cuda = titans::plugins::cuda_kernels_made();
#endif
}

// Writes the error of this thread's finished calls and returns 1, or returns 0 if there is no error.
TITANS_EXPORT int titans_onnxruntime_ops_cuda_error([[maybe_unused]] char* text, [[maybe_unused]] std::size_t size) {
#ifdef TITANS_WITH_CUDA
  const std::string error = titans::plugins::take_cuda_error();
  if (!error.empty()) {
    std::snprintf(text, size, "%s", error.c_str());
    return 1;
  }
#endif
  return 0;
}
