#include "base/thread_pool.h"

#include <algorithm>
#include <system_error>

#include "base/forks.h"

namespace titans::core {

ThreadPool::ThreadPool(std::size_t threads) {
  workers_.reserve(threads - 1);
  try {
    while (workers_.size() + 1 < threads) workers_.emplace_back([this] { work(); });
  } catch (const std::system_error&) {  // the process has reached its thread limit; the caller's thread always works
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_to_do_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(std::size_t count, const std::function<void(std::size_t)>& part) {
  if (count == 0) return;
  Job job{part, count};
  const std::uint32_t process = fork_count();
  std::unique_lock lock(mutex_);
  if (count > 1 && !workers_.empty()) {
    jobs_.push_back(&job);
    for (std::size_t woken = 0; woken < std::min(count - 1, workers_.size()); ++woken) work_to_do_.notify_one();
  }
  while (job.next < job.count) {
    run_one(job, lock);
    require_own_process(process, "batch");  // a callback may have forked, and the other threads' parts never end
  }
  part_finished_.wait(lock, [&] { return job.finished == job.count; });
}

void ThreadPool::run_one(Job& job, std::unique_lock<std::mutex>& lock) {
  const std::size_t index = job.next++;
  if (job.next == job.count) {
    // The job is removed because its caller may return and destroy it.
    const auto at = std::find(jobs_.begin(), jobs_.end(), &job);
    if (at != jobs_.end()) jobs_.erase(at);
  }
  lock.unlock();
  job.part(index);
  lock.lock();
  if (++job.finished == job.count) part_finished_.notify_all();
}

void ThreadPool::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    work_to_do_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
    if (stop_) return;
    run_one(*jobs_.front(), lock);
  }
}

}  // namespace titans::core
