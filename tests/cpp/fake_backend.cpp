// The engine of fake_engine.h as a backend's library, for tests that go through the C interface.
#include "backends/backend.h"
#include "fake_engine.h"

namespace {

std::unique_ptr<titans::core::Engine> open_engine(const titans::core::Bundle& bundle,
                                                  const titans::core::EngineOptions&) {
  static titans::test::FakeControl control;
  return titans::test::make_fake_engine(bundle, control);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const titans::core::BackendEntry* titans_backend_entry() {
  static const titans::core::BackendEntry entry{titans::core::kBackendAbi, &open_engine};
  return &entry;
}
