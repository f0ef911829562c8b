// The engine of echo_engine.h as a backend's library, for the target that goes through the C interface.
#include "backends/backend.h"
#include "echo_engine.h"

namespace {

std::unique_ptr<titans::core::Engine> open_engine(const titans::core::Bundle& bundle,
                                                  const titans::core::EngineOptions& options) {
  return titans::fuzz::make_echo_engine(bundle, static_cast<std::uint32_t>(options.threads));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const titans::core::BackendEntry* titans_backend_entry() {
  static const titans::core::BackendEntry entry{titans::core::kBackendAbi, &open_engine};
  return &entry;
}
