#include "backends/onnxruntime/page_releaser.h"

#include <chrono>
#include <system_error>

namespace titans::core {
namespace {

// Packing touches some gigabytes in a second, so this bounds what is mapped to some ten megabytes.
constexpr std::chrono::milliseconds kInterval{5};

}  // namespace

PageReleaser::PageReleaser(const Bundle& bundle) : bundle_(bundle) {
  try {
    thread_ = std::thread([this] { run(); });
  } catch (const std::system_error&) {  // without a thread the sessions open with a higher peak
  }
}

PageReleaser::~PageReleaser() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
  }
  stop_.notify_one();
  if (thread_.joinable()) thread_.join();
  bundle_.release_pages();
}

void PageReleaser::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_.wait_for(lock, kInterval, [this] { return stopped_; })) bundle_.release_pages();
}

}  // namespace titans::core
