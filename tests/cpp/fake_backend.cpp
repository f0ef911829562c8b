// The engine of fake_executor.h as a backend library, for tests through the C interface.
#include "backends/backend.h"
#include "fake_executor.h"

namespace {

std::unique_ptr<titans::core::Executor> open_executor(const titans::core::Bundle& bundle,
                                                      const titans::core::ExecutorOptions&) {
  static titans::test::FakeControl control;
  return titans::test::make_fake_executor(bundle, control);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const titans::core::BackendEntry* titans_backend_entry() {
  static const titans::core::BackendEntry entry{titans::core::kBackendAbi, &open_executor};
  return &entry;
}
