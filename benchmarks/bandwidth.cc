// How fast this machine reads and copies: every thread its own slice, the best of several tries.
//
//   bandwidth THREADS BYTES...     one JSON object; for each number of bytes, gigabytes a second
//
// "read" sums 64-bit words of BYTES bytes. "copy" copies one half of BYTES to the other; it counts what is read and
// what is written. Both repeat over the same bytes, so that a working set that fits a cache is read from it.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kTries = 25;
constexpr std::size_t kBytesPerTry = std::size_t{96} << 20;  // of all threads together, at least
constexpr std::size_t kAlignment = 4096;
constexpr std::size_t kLanes = 32;  // sums at a time: enough vectors to keep both loads of a cycle busy

std::uint64_t sum(const std::uint64_t* words, std::size_t count) {
  std::uint64_t lanes[kLanes] = {};
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += words[i + lane];
  }
  std::uint64_t total = 0;
  for (; i < count; ++i) total += words[i];
  for (const std::uint64_t lane : lanes) total += lane;
  return total;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Slice = std::unique_ptr<void, Free>;

// Gigabytes a second of `bytes` bytes that `threads` threads go over.
template <typename Work>
double measure(int threads, std::size_t bytes, const Work& work) {
  const std::size_t slice = std::max<std::size_t>(bytes / static_cast<std::size_t>(threads) / 512, 1) * 512;
  const std::size_t repeats = kBytesPerTry / (slice * static_cast<std::size_t>(threads)) + 1;
  std::vector<Clock::time_point> began(static_cast<std::size_t>(threads)), ended(began.size());
  std::atomic<int> arrived{0};
  double best = 0;
  const auto meet = [&](int times) {
    arrived.fetch_add(1);
    while (arrived.load() < times * threads) {
    }
  };
  std::vector<std::thread> workers;
  for (int thread = 0; thread < threads; ++thread) {
    workers.emplace_back([&, thread] {
      const auto own = static_cast<std::size_t>(thread);
      // Written here first: where memory belongs to a part of the machine, it is this thread's part.
      const std::size_t whole = (slice + kAlignment - 1) / kAlignment * kAlignment;
      const Slice memory(std::aligned_alloc(kAlignment, whole));
      std::memset(memory.get(), thread + 1, whole);
      int met = 0;
      for (int attempt = 0; attempt < kTries; ++attempt) {
        meet(++met);
        began[own] = Clock::now();
        for (std::size_t i = 0; i < repeats; ++i) work(memory.get(), slice);
        ended[own] = Clock::now();
        meet(++met);
        if (thread != 0) continue;
        const auto first = *std::min_element(began.begin(), began.end());
        const auto last = *std::max_element(ended.begin(), ended.end());
        const double seconds = std::chrono::duration<double>(last - first).count();
        const double moved = static_cast<double>(slice * repeats) * threads;
        best = std::max(best, moved / seconds / 1e9);
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 2 ? std::atoi(argv[1]) : 0;
  if (threads < 1) {
    std::fprintf(stderr, "[bandwidth] wrong arguments. Fix: give THREADS BYTES... as numbers\n");
    return 2;
  }
  std::printf("{");
  for (int i = 2; i < argc; ++i) {
    const std::size_t bytes = std::strtoull(argv[i], nullptr, 10);
    const double read = measure(threads, bytes, [](void* memory, std::size_t size) {
      const std::uint64_t total = sum(static_cast<const std::uint64_t*>(memory), size / sizeof(std::uint64_t));
      asm volatile("" : : "r"(total) : "memory");  // as if somebody used the sum and might have written the words
    });
    const double copy = measure(threads, bytes, [](void* memory, std::size_t size) {
      std::memcpy(static_cast<char*>(memory) + size / 2, memory, size / 2);
    });
    std::printf("%s\"%zu\": {\"read\": %.3f, \"copy\": %.3f}", i == 2 ? "" : ", ", bytes, read, copy);
  }
  std::printf("}\n");
  return 0;
}
