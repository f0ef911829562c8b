// Pools of state: slots come and go without moving others, and a returned slot leaves neither data nor memory behind.
#include "backends/onnxruntime/state_pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>

#include <gtest/gtest.h>

namespace titans::test {
namespace {

using core::StatePool;

constexpr std::size_t kSmall = 20, kLarge = 3 * 65536 + 64;  // bytes of a slot; the large one spans pages

bool filled(const std::byte* data, std::size_t bytes, int value) {
  return std::all_of(data, data + bytes, [&](std::byte byte) { return byte == static_cast<std::byte>(value); });
}

void fill(const StatePool& pool, std::size_t slot, int value) {
  std::memset(pool.data(0, slot), value, kSmall);
  std::memset(pool.data(1, slot), value, kLarge);
}

// The pages of slots [0, slots) of an array that are in memory.
std::size_t resident_pages(const StatePool& pool, std::size_t array, std::size_t bytes) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> pages((bytes + page - 1) / page);
  EXPECT_EQ(::mincore(pool.data(array, 0), pages.size() * page, pages.data()), 0);
  return static_cast<std::size_t>(
      std::count_if(pages.begin(), pages.end(), [](unsigned char p) { return (p & 1) != 0; }));
}

TEST(StatePool, SlotsComeBackEmptyAndInOrder) {
  StatePool pool({kSmall, kLarge});
  ASSERT_GE(pool.capacity(), 8U);
  std::vector<std::shared_ptr<StatePool::Slot>> slots;
  for (std::size_t i = 0; i < 5; ++i) {
    slots.push_back(pool.take());
    ASSERT_EQ(slots[i]->index(), i);
    EXPECT_TRUE(filled(pool.data(0, i), kSmall, 0));
    EXPECT_TRUE(filled(pool.data(1, i), kLarge, 0));
    fill(pool, i, static_cast<int>(i) + 1);
  }
  for (const std::size_t gone : {3U, 1U}) slots[gone].reset();
  for (const std::size_t kept : {0U, 2U, 4U}) {
    EXPECT_TRUE(filled(pool.data(0, kept), kSmall, static_cast<int>(kept) + 1));
    EXPECT_TRUE(filled(pool.data(1, kept), kLarge, static_cast<int>(kept) + 1));
  }
  for (const std::size_t again : {1U, 3U, 5U}) {  // the lowest free slot first
    const auto slot = slots.emplace_back(pool.take());
    EXPECT_EQ(slot->index(), again);
    EXPECT_TRUE(filled(pool.data(0, again), kSmall, 0));
    EXPECT_TRUE(filled(pool.data(1, again), kLarge, 0));
  }
}

TEST(StatePool, AReturnedSlotKeepsNoMemory) {
  StatePool pool({kSmall, kLarge});
  std::vector<std::shared_ptr<StatePool::Slot>> slots;
  for (std::size_t i = 0; i < 8; ++i) {
    slots.push_back(pool.take());
    fill(pool, i, 7);
  }
  const std::size_t all = resident_pages(pool, 1, 8 * kLarge);
  slots.erase(slots.begin() + 2, slots.end());
  const std::size_t two = resident_pages(pool, 1, 8 * kLarge);
  EXPECT_LT(two, all / 3);
  EXPECT_EQ(resident_pages(pool, 0, 8 * kSmall), 1U);
  slots.clear();
  EXPECT_EQ(resident_pages(pool, 1, 8 * kLarge), 0U);
  EXPECT_EQ(resident_pages(pool, 0, 8 * kSmall), 0U) << "no slot of the page is taken";
}

TEST(StatePool, ThreadsTakeAndReturn) {
  StatePool pool({kSmall, kLarge});
  const auto work = [&](unsigned seed) {
    std::mt19937 random(seed);
    std::vector<std::shared_ptr<StatePool::Slot>> mine;
    for (int i = 0; i < 60; ++i) {
      if (random() % 3 != 0) {
        const auto slot = mine.emplace_back(pool.take());
        ASSERT_TRUE(filled(pool.data(0, slot->index()), kSmall, 0));
        ASSERT_TRUE(filled(pool.data(1, slot->index()), kLarge, 0));
        fill(pool, slot->index(), static_cast<int>(seed));
      } else if (!mine.empty()) {
        mine.erase(mine.begin() + static_cast<std::ptrdiff_t>(random() % mine.size()));
      }
      for (const auto& slot : mine) {
        ASSERT_TRUE(filled(pool.data(0, slot->index()), kSmall, static_cast<int>(seed)));
      }
    }
  };
  std::vector<std::thread> threads;
  for (unsigned seed = 1; seed <= 3; ++seed) threads.emplace_back(work, seed);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace titans::test
