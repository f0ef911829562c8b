#include "backends/onnxruntime/memory_kernel.h"

#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <mutex>
#include <system_error>

#include "backends/onnxruntime/memory_nodes.h"
#include "base/error.h"
#include "base/shared_library.h"
#include "plugins/onnxruntime/session_entry.h"

namespace titans::core {
namespace {

constexpr const char* kFileName = "libtitans_onnxruntime_ops.so";
constexpr std::string_view kFix = R"(install runtime and kernels of the same version, or pass memory_kernel="off")";
constexpr std::size_t kTextBytes = 1024;

// Its address identifies this library.
void here() {}

const std::filesystem::path kThisLibrary = library_that_holds(reinterpret_cast<const void*>(&here));

std::string library_text(const std::filesystem::path& path) {
  return text("the memory kernel's library ", path.string());
}

void* open(const std::filesystem::path& path) {
  // Never closed, like ONNX Runtime's library: sessions may outlive their owner.
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Error(TITANS_UNSUPPORTED, "E0607", "onnxruntime", text("cannot open ", library_text(path), ": ", ::dlerror()),
                kFix);
  }
  return library;
}

template <typename Function>
Function find(void* library, const std::filesystem::path& path, const char* symbol) {
  const auto found = reinterpret_cast<Function>(::dlsym(library, symbol));
  if (found == nullptr) {
    throw Error(TITANS_UNSUPPORTED, "E0607", "onnxruntime", text(library_text(path), " has no ", symbol), kFix);
  }
  return found;
}

// The instruction set that the kernel selected.
std::string cpu_target(void* library, const std::filesystem::path& path) {
  const char* target = find<const char* (*)()>(library, path, "titans_onnxruntime_ops_target")();
  if (target == nullptr) {
    const char* wanted = std::getenv("TITANS_CPU_TARGET");
    throw Error(TITANS_UNSUPPORTED, "E0607", "onnxruntime",
                text("TITANS_CPU_TARGET names an instruction set that this machine lacks: ",
                     quoted(wanted == nullptr ? "" : wanted)),
                R"(unset it, or pass memory_kernel="off")");
  }
  return text("cpu-", target);
}

}  // namespace

MemoryKernel::MemoryKernel(KernelChoice choice, int cuda_ordinal) {
  if (choice == KernelChoice::kOff) return;
  const std::filesystem::path path = kThisLibrary.parent_path() / kFileName;
  std::error_code ignored;  // an inaccessible file counts as missing
  if (std::filesystem::exists(path, ignored)) {
    handle_ = open(path);
    library_ = path;
    if (cuda_ordinal < 0) {
      name_ = cpu_target(handle_, path);
    } else {
      load_gpu(cuda_ordinal);
    }
  } else if (choice == KernelChoice::kRequire) {
    throw Error(TITANS_UNSUPPORTED, "E0607", "onnxruntime", text("no such file: ", library_text(path)),
                R"(install the runtime with its kernels, or pass memory_kernel="auto")");
  }
}

void MemoryKernel::load_gpu(int ordinal) {
  count_made_ = find<decltype(count_made_)>(handle_, library_, "titans_onnxruntime_ops_made");
  gpu_error_ = find<decltype(gpu_error_)>(handle_, library_, "titans_onnxruntime_ops_cuda_error");
  const auto ask = find<int (*)(int, char*, std::size_t)>(handle_, library_, "titans_onnxruntime_ops_cuda_target");
  std::array<char, kTextBytes> said{};
  if (ask(ordinal, said.data(), said.size()) == 0) {
    throw Error(TITANS_UNSUPPORTED, "E0607", "onnxruntime",
                text(library_text(library_), " does not run on this GPU: ", said.data()),
                R"(install a runtime built with a CUDA compiler, or pass memory_kernel="off")");
  }
  name_ = said.data();
}

void MemoryKernel::register_in(OrtSessionOptions& options, const OrtLibrary& library) const {
  if (!used()) return;
  if (count_made_ != nullptr) {
    library.check(library.api().AddSessionConfigEntry(&options, plugins::kCudaEntry, "1"), "cannot set session options",
                  kFix);
  }
  library.check(library.api().RegisterCustomOpsLibrary_V2(&options, library_.c_str()),
                text("cannot register ", library_text(library_)), kFix, TITANS_UNSUPPORTED);
}

void MemoryKernel::open_on_gpu(const GraphNodes& graph, std::string_view file_name,
                               const std::function<void()>& open) const {
  if (count_made_ == nullptr) return open();
  // The library's counters are per process.
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  std::size_t cpu_before = 0, cpu = 0, gpu_before = 0, gpu = 0;
  count_made_(&cpu_before, &gpu_before);
  open();
  count_made_(&cpu, &gpu);
  const std::size_t wanted = count_memory_nodes(graph);
  if (cpu - cpu_before == 0 && gpu - gpu_before == wanted) return;
  throw Error(TITANS_FAILED, "E0607", file_name,
              text("expected ", wanted, " NeuralMemory nodes on the GPU, got ", gpu - gpu_before, " there and ",
                   cpu - cpu_before, " on the CPU"),
              R"(use an ONNX Runtime whose CUDA provider takes them, or pass memory_kernel="off")");
}

std::string MemoryKernel::take_gpu_error() const {
  if (gpu_error_ == nullptr) return {};
  std::array<char, kTextBytes> said{};
  return gpu_error_(said.data(), said.size()) == 0 ? std::string() : std::string(said.data());
}

}  // namespace titans::core
