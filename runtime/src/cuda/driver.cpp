#include "cuda/driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

#include "base/error.h"

namespace titans::core::cuda {
namespace {

#define TITANS_CUDA_TEXT_(name) #name
#define TITANS_CUDA_TEXT(name) TITANS_CUDA_TEXT_(name)

std::string driver_path() {
  const char* named = std::getenv("TITANS_CUDA_DRIVER");
  return named != nullptr && *named != '\0' ? named : "libcuda.so.1";
}

}  // namespace

const Driver* Driver::load(std::string& why_not) {
  static std::mutex mutex;
  // Never destroyed, because the order of destruction at process exit is unspecified.
  static auto& loaded = *new std::map<std::string, std::unique_ptr<const Driver>>;
  const std::lock_guard lock(mutex);
  const std::string path = driver_path();
  const auto known = loaded.find(path);
  if (known != loaded.end()) return known->second.get();
  std::unique_ptr<Driver> driver(new Driver);
  why_not = driver->open(path);
  if (!why_not.empty()) return nullptr;  // not cached, so the next call tries again
  return loaded.emplace(path, std::move(driver)).first->second.get();
}

const Driver& Driver::require() {
  std::string why_not;
  const Driver* driver = load(why_not);
  if (driver == nullptr) {
    throw Error(TITANS_UNSUPPORTED, "E0612", "cuda", text("no usable NVIDIA driver and GPU: ", why_not),
                "install the driver, check it with nvidia-smi, or open the session on cpu");
  }
  return *driver;
}

std::string Driver::open(const std::string& path) {
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return text("no driver: ", ::dlerror());
#define TITANS_CUDA_FIND(function)                                                               \
  function = reinterpret_cast<decltype(function)>(::dlsym(library, TITANS_CUDA_TEXT(function))); \
  if (function == nullptr) return text(path, " without ", TITANS_CUDA_TEXT(function), ", so older than CUDA 12");
  TITANS_CUDA_FUNCTIONS(TITANS_CUDA_FIND)
#undef TITANS_CUDA_FIND
  const CUresult started = cuInit(0);
  if (started != CUDA_SUCCESS) return text("cuInit: ", describe(started));
  int count = 0;
  const CUresult counted = cuDeviceGetCount(&count);
  if (counted != CUDA_SUCCESS) return text("cuDeviceGetCount: ", describe(counted));
  return count > 0 ? std::string() : "a driver without a device";
}

int Driver::version() const {
  int version = 0;
  check(cuDriverGetVersion(&version), "cuDriverGetVersion");
  return version;
}

int Driver::device_count() const {
  int count = 0;
  check(cuDeviceGetCount(&count), "cuDeviceGetCount");
  return count;
}

std::string Driver::describe(CUresult result) const {
  const char* name = nullptr;
  const char* meaning = nullptr;
  // An older driver may not recognise the code; the text then has the number only.
  if (cuGetErrorName(result, &name) != CUDA_SUCCESS) name = nullptr;
  if (cuGetErrorString(result, &meaning) != CUDA_SUCCESS) meaning = nullptr;
  if (name == nullptr) return text("error ", static_cast<int>(result));
  return meaning == nullptr ? std::string(name) : text(name, " (", meaning, ")");
}

void Driver::check(CUresult result, std::string_view call, std::string_view fix) const {
  if (result == CUDA_SUCCESS) return;
  throw Error(TITANS_FAILED, "E0609", "cuda", text(call, " failed: ", describe(result)),
              result == CUDA_ERROR_OUT_OF_MEMORY ? "free device memory, or open fewer streams" : fix);
}

std::string cuda_version_text(int version) { return text(version / 1000, ".", version % 1000 / 10); }

}  // namespace titans::core::cuda
