// Gives the pages of mapped weights back while ONNX Runtime opens sessions.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

#include "bundle/bundle.h"

namespace titans::core {

// ONNX Runtime copies most weights into the layout of its kernels. Without this class the mapped weights would stay in
// memory beside the copies until all sessions are open, which doubles the peak.
class PageReleaser {
 public:
  // `bundle` must outlive this object.
  explicit PageReleaser(const Bundle& bundle);
  ~PageReleaser();
  PageReleaser(const PageReleaser&) = delete;
  PageReleaser& operator=(const PageReleaser&) = delete;

 private:
  void run();

  const Bundle& bundle_;
  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopped_ = false;
  std::thread thread_;
};

}  // namespace titans::core
