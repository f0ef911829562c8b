// Threads for work that consists of many equal parts.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace titans::core {

class ThreadPool {
 public:
  // `threads` >= 1 includes the calling thread. The pool is smaller if the system allows fewer.
  explicit ThreadPool(std::size_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls part(0) to part(count - 1) once each, on this and idle threads, and returns when all have returned. Parts
  // start in ascending order. `part` must not throw. Threads may call run concurrently; each caller works too.
  void run(std::size_t count, const std::function<void(std::size_t)>& part);

  std::size_t threads() const { return workers_.size() + 1; }

 private:
  struct Job {
    const std::function<void(std::size_t)>& part;
    std::size_t count;
    std::size_t next = 0;      // the first part not started
    std::size_t finished = 0;  // number of completed parts
  };

  void work();
  // Runs the job's next part, with the lock released meanwhile. Requires next < count.
  void run_one(Job& job, std::unique_lock<std::mutex>& lock);

  std::mutex mutex_;  // guards the members below
  std::condition_variable work_to_do_;
  std::condition_variable part_finished_;
  std::deque<Job*> jobs_;  // jobs with parts not started; each is on its caller's stack
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace titans::core
