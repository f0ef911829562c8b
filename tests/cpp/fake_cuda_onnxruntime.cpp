// A fake ONNX Runtime with a CUDA provider. It wraps the real library $TITANS_REAL_ONNXRUNTIME: the CPU provider stands
// in for the GPU's, and the host memory of tests/cpp/fake_cuda.cpp for device memory. The backend's own work is real:
// the placement of buffers, the copies and their timing, and the assignment of nodes.
//
// Environment variables: TITANS_FAKE_PROVIDER_BROKEN, the error of appending the provider; TITANS_FAKE_NO_PROVIDER, the
// provider is missing.
#include <onnxruntime_c_api.h>

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <string>

namespace {

const OrtApiBase& real_base() {
  static const OrtApiBase* base = [] {
    void* library = ::dlopen(std::getenv("TITANS_REAL_ONNXRUNTIME"), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) std::abort();
    return reinterpret_cast<const OrtApiBase* (*)()>(::dlsym(library, "OrtGetApiBase"))();
  }();
  return *base;
}

const OrtApi& real() { return *real_base().GetApi(ORT_API_VERSION); }

OrtStatus* fail(const char* text) { return real().CreateStatus(ORT_FAIL, text); }

char cuda_name[] = "CUDAExecutionProvider";
char cpu_name[] = "CPUExecutionProvider";
char* with_cuda[] = {cuda_name, cpu_name};
char* without_cuda[] = {cpu_name};
// The one options object, because all sessions of a test have the same options.
int options_object;
std::string device_id, use_tf32;

OrtStatus* ORT_API_CALL providers(char*** names, int* count) noexcept {
  const bool none = std::getenv("TITANS_FAKE_NO_PROVIDER") != nullptr;
  *names = none ? without_cuda : with_cuda;
  *count = none ? 1 : 2;
  return nullptr;
}

OrtStatus* ORT_API_CALL release_providers(char**, int) noexcept { return nullptr; }

OrtStatus* ORT_API_CALL create_options(OrtCUDAProviderOptionsV2** out) noexcept {
  device_id.clear();
  use_tf32.clear();
  *out = reinterpret_cast<OrtCUDAProviderOptionsV2*>(&options_object);
  return nullptr;
}

OrtStatus* ORT_API_CALL update_options(OrtCUDAProviderOptionsV2*, const char* const* keys, const char* const* values,
                                       size_t count) noexcept {
  for (size_t i = 0; i < count; ++i) {
    const std::string key = keys[i];
    if (key != "device_id" && key != "use_tf32") return fail("an option that the fake provider does not know");
    (key == "device_id" ? device_id : use_tf32) = values[i];
  }
  return nullptr;
}

void ORT_API_CALL release_options(OrtCUDAProviderOptionsV2*) noexcept {}

OrtStatus* ORT_API_CALL append_provider(OrtSessionOptions*, const OrtCUDAProviderOptionsV2*) noexcept {
  if (const char* said = std::getenv("TITANS_FAKE_PROVIDER_BROKEN")) return fail(said);
  const char* wanted = std::getenv("TITANS_FAKE_ORDINAL");
  if (use_tf32 != "0" || device_id != (wanted == nullptr ? "0" : wanted)) return fail("wrong options of the provider");
  return nullptr;
}

OrtStatus* ORT_API_CALL create_memory_info(const char* name, OrtAllocatorType kind, int id, OrtMemType type,
                                           OrtMemoryInfo** out) noexcept {
  if (std::strcmp(name, "Cuda") == 0) return real().CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, out);
  return real().CreateMemoryInfo(name, kind, id, type, out);
}

const OrtApi* ORT_API_CALL get_api(uint32_t version) noexcept {
  if (version != ORT_API_VERSION) return real_base().GetApi(version);
  static OrtApi* api = [] {
    // Only members that this version of the API has are copied.
    auto* copy = static_cast<OrtApi*>(std::malloc(sizeof(OrtApi)));
    std::memcpy(static_cast<void*>(copy), &real(), sizeof(OrtApi));
    copy->GetAvailableProviders = providers;
    copy->ReleaseAvailableProviders = release_providers;
    copy->CreateCUDAProviderOptions = create_options;
    copy->UpdateCUDAProviderOptions = update_options;
    copy->ReleaseCUDAProviderOptions = release_options;
    copy->SessionOptionsAppendExecutionProvider_CUDA_V2 = append_provider;
    copy->CreateMemoryInfo = create_memory_info;
    return copy;
  }();
  return api;
}

const char* ORT_API_CALL version() noexcept { return real_base().GetVersionString(); }

}  // namespace

extern "C" __attribute__((visibility("default"))) const OrtApiBase* ORT_API_CALL OrtGetApiBase() noexcept {
  static const OrtApiBase base{get_api, version};
  return &base;
}
