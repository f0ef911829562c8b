// What ONNX Runtime looks for in a library of custom operators, and what the titans runtime asks it.
#include <onnxruntime_c_api.h>

#include <cstdio>
#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "plugins/kernels/neural_memory_cpu.h"
#include "plugins/onnxruntime/hyper_connection_op.h"
#include "plugins/onnxruntime/neural_memory_op.h"
#include "plugins/onnxruntime/session_entry.h"

#define TITANS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::vector<const OrtCustomOp*> all_ops(bool on_cuda) {
  std::vector<const OrtCustomOp*> ops = titans::plugins::cpu_ops();
  if (!on_cuda) ops.push_back(titans::plugins::hyper_connection_op());
#ifdef TITANS_WITH_CUDA
  for (const OrtCustomOp* op : titans::plugins::cuda_ops()) ops.push_back(op);
#endif
  return ops;
}

// Sessions refer to the domain for as long as they live, so it is never released. All sessions of one ONNX Runtime on
// one kind of device share it; a process may hold two.
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
    // The first functions of the interface are the same in every version.
    const std::string text = "[NeuralMemory] expected ONNX Runtime 1." + std::to_string(ORT_API_VERSION) +
                             " or newer but got " + base->GetVersionString() +
                             "; do run pip install --upgrade onnxruntime, or build this library for the older one";
    return base->GetApi(1)->CreateStatus(ORT_FAIL, text.c_str());
  } catch (const std::exception& error) {
    return base->GetApi(1)->CreateStatus(ORT_FAIL, error.what());
  }
}

// The instruction set that nodes made now run on, or NULL where $TITANS_CPU_TARGET names none of this machine's.
TITANS_EXPORT const char* titans_onnxruntime_ops_target() {
  const std::string_view target = titans::kernels::chosen_cpu_target();
  return target.empty() ? nullptr : target.data();
}

// Writes what nodes on that CUDA device run on, "cuda-sm90", and returns 1; or 0, and what is wrong.
TITANS_EXPORT int titans_onnxruntime_ops_cuda_target([[maybe_unused]] int ordinal, char* text, std::size_t size) {
  std::string target;
  std::string error = "a library that was built without a CUDA compiler";
#ifdef TITANS_WITH_CUDA
  target = titans::plugins::cuda_target(ordinal, error);
#endif
  std::snprintf(text, size, "%s", target.empty() ? error.c_str() : target.c_str());
  return target.empty() ? 0 : 1;
}

// How many nodes the process has made on each device.
TITANS_EXPORT void titans_onnxruntime_ops_made(std::size_t* cpu, std::size_t* cuda) {
  *cpu = titans::plugins::cpu_nodes_made();
  *cuda = 0;
#ifdef TITANS_WITH_CUDA
  *cuda = titans::plugins::cuda_nodes_made();
#endif
}

// Writes what the device found wrong in calls of this thread whose work is done, and returns 1; or 0 where all is well.
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
