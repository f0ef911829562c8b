#include "base/forks.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <vector>

#include "base/error.h"
#include "base/log.h"

namespace titans::core {
namespace {

std::atomic<std::uint32_t> forks{0};

// The mutex is held for moments only and never while a callback runs, so fork() may wait for it.
struct Shared {
  std::mutex mutex;  // guards the members below
  std::vector<int> descriptors;
  std::size_t inside = 0;    // threads within a ForkSensitive part
  bool interrupted = false;  // a fork of this process or an ancestor came between such a part
};

// Never destroyed: threads may use it while the process exits.
Shared& shared() {
  static auto& all = *new Shared;
  return all;
}

void before_fork() { shared().mutex.lock(); }

void after_fork_in_parent() { shared().mutex.unlock(); }

void after_fork_in_child() {
  Shared& all = shared();
  for (const int descriptor : all.descriptors) ::close(descriptor);
  all.descriptors.clear();
  all.interrupted = all.interrupted || all.inside > 0;
  all.inside = 0;
  forks.fetch_add(1, std::memory_order_relaxed);
  reset_log_after_fork();
  all.mutex.unlock();
}

const int registered = (shared(), ::pthread_atfork(&before_fork, &after_fork_in_parent, &after_fork_in_child));

}  // namespace

std::uint32_t fork_count() noexcept { return forks.load(std::memory_order_relaxed); }

void require_own_process(std::uint32_t made_by, std::string_view where) {
  if (made_by == fork_count()) return;
  throw Error(TITANS_INVALID_ARGUMENT, "E0517", where,
              "the session belongs to the process from which this one was forked, and its threads run there only",
              "open the bundle in this process");
}

ForkSensitive::ForkSensitive(bool leaving) {
  Shared& all = shared();
  const std::lock_guard lock(all.mutex);
  if (all.interrupted && !leaving) {
    throw Error(TITANS_FAILED, "E0517", "session",
                "this process was forked while another thread opened or closed a session",
                "fork at another moment, or start a new program (exec, or the start method spawn)");
  }
  ++all.inside;
}

ForkSensitive::~ForkSensitive() {
  Shared& all = shared();
  const std::lock_guard lock(all.mutex);
  if (all.inside > 0) --all.inside;  // 0 if this process was forked within the part
}

int open_unshared(const std::function<int()>& open) {
  Shared& all = shared();
  const std::lock_guard lock(all.mutex);
  all.descriptors.reserve(all.descriptors.size() + 1);
  const int descriptor = open();
  if (descriptor >= 0) all.descriptors.push_back(descriptor);
  return descriptor;
}

int close_unshared(int descriptor) noexcept {
  Shared& all = shared();
  const std::lock_guard lock(all.mutex);
  const auto at = std::find(all.descriptors.begin(), all.descriptors.end(), descriptor);
  if (at == all.descriptors.end()) return 0;  // closed by the fork
  all.descriptors.erase(at);
  return ::close(descriptor);
}

}  // namespace titans::core
