#include <algorithm>
#include <boost/context/fiber.hpp>
#include <boost/context/stack_context.hpp>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "plugins/kernels/cuda_device.cuh"

namespace titans::kernels::cuda {
namespace {

namespace context = boost::context;

// A meeting point for a number of threads. The last to arrive opens it.
struct Barrier {
  int expected = 0, arrived = 0;
  std::uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  float values[kWarpSize], sum = 0.0F, most = 0.0F;
  const Fragments* lanes[kWarpSize];
};

struct Block {
  Barrier barrier;
  std::vector<std::byte> shared;
  std::vector<Warp> warps{static_cast<std::size_t>(kWarps)};
  bool any = false, result = false;
  std::byte* shared_data() {  // aligned like CUDA's
    const auto at = reinterpret_cast<std::uintptr_t>(shared.data());
    return shared.data() + ((at + 127) / 128 * 128 - at);
  }
};

struct Thread {
  context::fiber fiber;
  int block = 0, thread = 0;
  const Barrier* waits_for = nullptr;
  std::uint64_t generation = 0;
};

// Fiber stacks, reused by later launches. Their distance is not a round size; otherwise the tops of all stacks would
// share a few sets of the CPU's cache.
class Stacks {
 public:
  static context::stack_context allocate() {
    if (free().empty()) {
      auto* slab = static_cast<std::byte*>(::operator new(kStride * kSlab));
      for (std::size_t i = 0; i < kSlab; ++i) free().push_back(slab + i * kStride);
    }
    context::stack_context stack;
    stack.size = kBytes;
    stack.sp = free().back() + kBytes;
    free().pop_back();
    return stack;
  }
  static void deallocate(context::stack_context& stack) {
    free().push_back(static_cast<std::byte*>(stack.sp) - kBytes);
  }

 private:
  static constexpr std::size_t kBytes = 32 * 1024, kStride = kBytes + 5 * 64, kSlab = kThreads;
  static std::vector<std::byte*>& free() {
    static std::vector<std::byte*> list;
    return list;
  }
};

class Machine {
 public:
  Machine(const Launch& launch, void (*body)(const void*), const void* parameters)
      : launch_(launch), body_(body), parameters_(parameters), blocks_(static_cast<std::size_t>(launch.size)) {}

  void run() {
    for (group_ = 0; group_ < launch_.groups; ++group_) run_group();
  }

  Thread& current() { return *current_; }
  Block& block() { return blocks_[static_cast<std::size_t>(current_->block)]; }
  Block& block(int rank) { return blocks_[static_cast<std::size_t>(rank)]; }
  Warp& warp() { return block().warps[static_cast<std::size_t>(current_->thread / kWarpSize)]; }
  Barrier& group_barrier() { return group_barrier_; }
  const Launch& launch() const { return launch_; }
  int group() const { return group_; }

  // The last to arrive runs `last` before any thread continues.
  template <class Last>
  void meet(Barrier& barrier, const Last& last) {
    if (++barrier.arrived == barrier.expected) {
      last();
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    current_->waits_for = &barrier;
    current_->generation = barrier.generation;
    scheduler_ = std::move(scheduler_).resume();
  }

  static Machine* running;

 private:
  void run_group() {
    const auto threads = static_cast<std::size_t>(launch_.size * kThreads);
    group_barrier_ = {static_cast<int>(threads)};
    for (Block& block : blocks_) {
      block.barrier = {kThreads};
      block.shared.assign(launch_.shared_bytes + 128, std::byte{0xFF});  // NaN: exposes reads of unwritten memory
      for (Warp& warp : block.warps) warp.barrier = {kWarpSize};
    }
    std::vector<Thread> all(threads);
    for (std::size_t i = 0; i < threads; ++i) {
      all[i].block = static_cast<int>(i) / kThreads;
      all[i].thread = static_cast<int>(i) % kThreads;
      all[i].fiber = context::fiber(std::allocator_arg, Stacks(), [this](context::fiber&& scheduler) {
        scheduler_ = std::move(scheduler);
        try {
          body_(parameters_);
        } catch (...) {
          failure_ = std::current_exception();
        }
        return std::move(scheduler_);
      });
    }
    const std::vector<std::size_t> order = make_order(threads);
    std::vector<bool> asleep(threads / kWarpSize);
    if (random_) put_to_sleep(asleep);
    for (std::size_t alive = threads; alive > 0;) {
      const bool progress = run_once(all, order, asleep, alive);
      if (progress) continue;
      // The threads that are awake cannot pass the next barrier. All threads run for a moment, then others are put to
      // sleep.
      const bool slept = std::find(asleep.begin(), asleep.end(), true) != asleep.end();
      if (!slept) {
        throw std::runtime_error("[emulation] threads wait forever. Fix: check the barriers");
      }
      std::fill(asleep.begin(), asleep.end(), false);
      run_once(all, order, asleep, alive);
      put_to_sleep(asleep);
    }
  }

  // Lets each awake thread run to its next barrier. Returns whether any could.
  bool run_once(std::vector<Thread>& all, const std::vector<std::size_t>& order, const std::vector<bool>& asleep,
                std::size_t& alive) {
    bool progress = false;
    for (const std::size_t i : order) {
      Thread& thread = all[i];
      if (!thread.fiber || asleep[i / kWarpSize]) continue;
      if (thread.waits_for != nullptr && thread.waits_for->generation == thread.generation) continue;
      thread.waits_for = nullptr;
      current_ = &thread;
      progress = true;
      thread.fiber = std::move(thread.fiber).resume();
      if (!thread.fiber) --alive;
      if (failure_) abandon(all);
    }
    return progress;
  }

  // Destroying a waiting fiber unwinds it. The unwinding must not reach the failure again.
  void abandon(std::vector<Thread>& all) {
    all.clear();
    std::rethrow_exception(failure_);
  }

  std::vector<std::size_t> make_order(std::size_t threads) {
    std::vector<std::size_t> order(threads);
    std::iota(order.begin(), order.end(), 0);
    const char* named = std::getenv("TITANS_EMULATED_ORDER");
    const std::string name = named == nullptr ? "forward" : named;
    if (name == "reverse") {
      std::reverse(order.begin(), order.end());
    } else if (name != "forward") {
      random_ = true;
      engine_.seed(static_cast<unsigned>(std::stoul(name)));
      std::shuffle(order.begin(), order.end(), engine_);
    }
    return order;
  }

  // In a random order, some warps or whole blocks fall as far behind as the barriers allow.
  void put_to_sleep(std::vector<bool>& asleep) {
    const bool blocks = launch_.size > 1 && engine_() % 2 == 0;
    for (std::size_t warp = 0; warp < asleep.size(); ++warp) {
      asleep[warp] = blocks && warp % kWarps != 0 ? asleep[warp - 1] : engine_() % 2 == 0;
    }
  }

  Launch launch_;
  void (*body_)(const void*);
  const void* parameters_;
  std::vector<Block> blocks_;
  Barrier group_barrier_;
  Thread* current_ = nullptr;
  context::fiber scheduler_;
  std::exception_ptr failure_;
  int group_ = 0;
  bool random_ = false;
  std::mt19937 engine_;
};

Machine* Machine::running = nullptr;

Machine& machine() { return *Machine::running; }

// To nearest with 11 bits, ties away from zero.
float round_tf32(float x) {
  if (!std::isfinite(x)) return x;
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits = (bits + 0x1000U) & ~0x1FFFU;
  std::memcpy(&x, &bits, sizeof(bits));
  return x;
}

// To float32, towards zero.
float truncate(double x) {
  const float nearest = static_cast<float>(x);
  return std::abs(static_cast<double>(nearest)) > std::abs(x) ? std::nextafterf(nearest, 0.0F) : nearest;
}

}  // namespace

int thread_index() { return machine().current().thread; }
int block_index() { return machine().group() * machine().launch().size + machine().current().block; }
int block_count() { return machine().launch().groups * machine().launch().size; }

void sync_block() {
  machine().meet(machine().block().barrier, [] {});
}

bool any_in_block(bool yes) {
  Block& block = machine().block();
  block.any = block.any || yes;
  machine().meet(block.barrier, [&] {
    block.result = block.any;
    block.any = false;
  });
  const bool result = block.result;
  machine().meet(block.barrier, [] {});
  return result;
}

float sum_over_warp(float value) {
  Warp& warp = machine().warp();
  warp.values[lane_index()] = value;
  machine().meet(warp.barrier, [&] {
    // Adds in pairs, pairs of pairs and so on, the order of the hardware's shuffles.
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
      for (int lane = 0; lane < lanes; ++lane) warp.values[lane] += warp.values[lane + lanes];
    }
    warp.sum = warp.values[0];
  });
  const float sum = warp.sum;
  machine().meet(warp.barrier, [] {});
  return sum;
}

float max_over_warp(float value) {
  Warp& warp = machine().warp();
  warp.values[lane_index()] = value;
  machine().meet(warp.barrier, [&] { warp.most = *std::max_element(warp.values, warp.values + kWarpSize); });
  const float most = warp.most;
  machine().meet(warp.barrier, [] {});
  return most;
}

std::byte* shared_memory() { return machine().block().shared_data(); }

void sync_group(Group& group) {
  group.size == 1 ? sync_block() : machine().meet(machine().group_barrier(), [] {});
}

const float* in_rank(const float* own, int rank) {
  if (!machine().launch().cluster) throw std::runtime_error("[emulation] no cluster. Fix: exchange in global memory");
  const std::byte* at = reinterpret_cast<const std::byte*>(own);
  return reinterpret_cast<const float*>(machine().block(rank).shared_data() + (at - machine().block().shared_data()));
}

void copy_16(float* shared, const float* global) {
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0 || reinterpret_cast<std::uintptr_t>(global) % 16 != 0) {
    throw std::runtime_error("[emulation] copy of 16 bytes at an unaligned address. Fix: align it");
  }
  std::memcpy(shared, global, 16);
}

void multiply_add_warp(const Fragments& lane, Products products) {
  const int values = products == Products::kBFloat16 ? 2 : 1;
  Warp& warp = machine().warp();
  warp.lanes[lane_index()] = &lane;
  machine().meet(warp.barrier, [&] {
    const int depth = 8 * values;
    float a[16][16], b[16][8];
    for (int l = 0; l < kWarpSize; ++l) {
      const int g = l / 4, t = l % 4;
      for (int part = 0; part < 4; ++part) {
        for (int n = 0; n < values; ++n) {
          a[part % 2 * 8 + g][(part / 2 * 4 + t) * values + n] = warp.lanes[l]->a[part][n];
          if (part < 2) b[(part * 4 + t) * values + n][g] = warp.lanes[l]->b[part][n];
        }
      }
    }
    for (int l = 0; l < kWarpSize; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int row = i / 2 * 8 + l / 4, column = l % 4 * 2 + i % 2;
        float& d = warp.lanes[l]->d[i];
        double small = 0.0, cross = 0.0, large = 0.0;
        for (int k = 0; k < depth; ++k) {
          if (products == Products::kBFloat16) {
            large += static_cast<double>(a[row][k]) * b[k][column];
            continue;
          }
          const float high_a = round_tf32(a[row][k]), low_a = round_tf32(a[row][k] - high_a);
          const float high_b = round_tf32(b[k][column]), low_b = round_tf32(b[k][column] - high_b);
          large += static_cast<double>(high_a) * high_b;
          small += static_cast<double>(low_a) * high_b;
          cross += static_cast<double>(high_a) * low_b;
        }
        if (products == Products::kTf32InParts) {
          d += truncate(truncate(truncate(small) + cross) + large);
        } else {
          d = truncate(d + large);
        }
      }
    }
  });
}

std::string query_device(CudaDevice& device, const void*) {
  const char* named = std::getenv("TITANS_EMULATED_GPU");
  unsigned long bytes = 0;
  if (std::sscanf(named == nullptr ? "90:132:232448" : named, "%d:%d:%lu:%d", &device.sm, &device.multiprocessors,
                  &bytes, &device.most_cluster) < 3) {
    return std::string("[emulation] invalid GPU: expected sm:multiprocessors:bytes, got ") + named +
           ". Fix: set TITANS_EMULATED_GPU";
  }
  device.shared_bytes = bytes;
  return {};
}

std::string run_launch(const Launch& launch, void (*body)(const void*), const void* context) {
  Machine machine(launch, body, context);
  Machine::running = &machine;
  machine.run();
  Machine::running = nullptr;
  return {};
}

std::string copy(void* to, const void* from, std::size_t bytes, CUstream_st*) {
  std::memcpy(to, from, bytes);
  return {};
}

std::string clear(void* data, std::size_t bytes, CUstream_st*) {
  std::memset(data, 0, bytes);
  return {};
}

}  // namespace titans::kernels::cuda
