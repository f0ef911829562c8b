// The engine of echo_executor.h as a backend library, for the target of the C interface.
#include "backends/backend.h"
#include "echo_executor.h"

namespace {

std::unique_ptr<titans::core::Executor> open_executor(const titans::core::Bundle& bundle,
                                                      const titans::core::ExecutorOptions& options) {
  return titans::fuzz::make_echo_executor(bundle, static_cast<std::uint32_t>(options.threads));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const titans::core::BackendEntry* titans_backend_entry() {
  static const titans::core::BackendEntry entry{titans::core::kBackendAbi, &open_executor};
  return &entry;
}
