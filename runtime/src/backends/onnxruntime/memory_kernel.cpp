#include "backends/onnxruntime/memory_kernel.h"

#include <dlfcn.h>

#include <cstdlib>
#include <system_error>

#include "error.h"
#include "shared_library.h"

namespace titans::core {
namespace {

constexpr const char* kFileName = "libtitans_onnxruntime_ops.so";
constexpr const char* kTargetSymbol = "titans_onnxruntime_ops_target";
constexpr std::string_view kAdvice = R"(install runtime and kernels of the same version, or pass memory_kernel="off")";

// Only for its address.
void here() {}

const std::filesystem::path kThisLibrary = library_that_holds(reinterpret_cast<const void*>(&here));

// The instruction set that the kernel has chosen.
std::string load_target(const std::filesystem::path& path) {
  const auto expected = text("the memory kernel's library ", path.string());
  // Never closed, as ONNX Runtime's own is not: sessions may outlive whoever opened them.
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw Error(TITANS_UNSUPPORTED, "onnxruntime", expected, ::dlerror(), kAdvice);
  const auto ask_target = reinterpret_cast<const char* (*)()>(::dlsym(library, kTargetSymbol));
  if (ask_target == nullptr) {
    throw Error(TITANS_UNSUPPORTED, "onnxruntime", expected, text("one without ", kTargetSymbol), kAdvice);
  }
  const char* target = ask_target();
  if (target == nullptr) {
    const char* wanted = std::getenv("TITANS_CPU_TARGET");
    throw Error(TITANS_UNSUPPORTED, "onnxruntime", "TITANS_CPU_TARGET to name an instruction set of this machine",
                wanted == nullptr ? "none" : wanted, R"(unset it, or pass memory_kernel="off")");
  }
  return target;
}

}  // namespace

MemoryKernel::MemoryKernel(KernelChoice choice) {
  if (choice == KernelChoice::kOff) return;
  const std::filesystem::path path = kThisLibrary.parent_path() / kFileName;
  std::error_code ignored;  // what cannot be looked at is not there
  if (std::filesystem::exists(path, ignored)) {
    name_ = text("cpu-", load_target(path));
    library_ = path;
  } else if (choice == KernelChoice::kRequire) {
    throw Error(TITANS_UNSUPPORTED, "onnxruntime", text("the memory kernel's library ", path.string()), "no such file",
                R"(install the runtime with its kernels, or pass memory_kernel="auto")");
  }
}

void MemoryKernel::register_in(OrtSessionOptions& options, const OrtLibrary& library) const {
  if (!used()) return;
  library.check(library.api().RegisterCustomOpsLibrary_V2(&options, library_.c_str()),
                text("the memory kernel's library ", library_.string()), kAdvice, TITANS_UNSUPPORTED);
}

}  // namespace titans::core
