// Threads that wait for work of many equal parts.
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
  // `threads` >= 1 with the one that calls run. Where the system gives fewer, these.
  explicit ThreadPool(std::size_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls part(0) to part(count - 1), each once, here and on idle threads, in that order as far as there is one, and
  // returns when all have returned. `part` throws nothing. From several threads at once, of which each works too.
  void run(std::size_t count, const std::function<void(std::size_t)>& part);

  std::size_t threads() const { return workers_.size() + 1; }

 private:
  struct Job {
    const std::function<void(std::size_t)>& part;
    std::size_t count;
    std::size_t next = 0;      // the first that nobody has begun
    std::size_t finished = 0;  // how many have returned
  };

  void work();
  // Runs one part of the job, whose next is below its count, with the lock given back meanwhile.
  void run_one(Job& job, std::unique_lock<std::mutex>& lock);

  std::mutex mutex_;  // guards what follows
  std::condition_variable work_to_do_;
  std::condition_variable part_finished_;
  std::deque<Job*> jobs_;  // with parts that nobody has begun; they live on the stacks of their callers
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace titans::core
