// What ONNX Runtime looks for in a library of custom operators.
#include <onnxruntime_c_api.h>

#include <exception>
#include <map>
#include <mutex>
#include <string>

#include "plugins/kernels/neural_memory_cpu.h"
#include "plugins/onnxruntime/neural_memory_op.h"

#define TITANS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Sessions refer to the domain for as long as they live, so it is never released. All sessions of one ONNX Runtime
// share it; a process may hold two.
OrtStatus* add_domain(const OrtApi& api, OrtSessionOptions& options) {
  static std::mutex mutex;
  static auto& domains = *new std::map<const OrtApi*, OrtCustomOpDomain*>;
  const std::lock_guard lock(mutex);
  OrtCustomOpDomain*& domain = domains[&api];
  if (domain == nullptr) {
    OrtCustomOpDomain* made = nullptr;
    if (OrtStatus* status = api.CreateCustomOpDomain(titans::plugins::kDomain, &made)) return status;
    if (OrtStatus* status = api.CustomOpDomain_Add(made, &titans::plugins::neural_memory_op())) {
      api.ReleaseCustomOpDomain(made);
      return status;
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
