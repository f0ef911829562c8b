// Which calls are captured, and which captures are kept.
#include "backends/tensorrt/captures.h"

#include <cstdlib>

#include <gtest/gtest.h>

namespace titans::test {
namespace {

namespace cuda = core::cuda;
using core::Captures;

constexpr std::size_t kMost = 64;

class CapturesTest : public testing::Test {
 protected:
  CapturesTest() : set_(::setenv("TITANS_CUDA_DRIVER", FAKE_CUDA, 1)), context_(cuda::Driver::require(), 0) {}
  ~CapturesTest() override { ::unsetenv("TITANS_CUDA_DRIVER"); }

  // Makes a call with the addresses `key`. Returns whether it had been captured before.
  bool call(CUdeviceptr key) {
    bool wanted = false;
    if (captures_.find({key, 1}, wanted) != nullptr) return true;
    std::string why_not;
    if (wanted) {
      captures_.add({key, 1}, cuda::GraphExec::capture(stream_, why_not, [] {}));
      ++made_;
    }
    return false;
  }

  int set_;
  cuda::Context context_;
  cuda::Stream stream_{context_};
  Captures captures_;
  std::size_t made_ = 0;
};

TEST_F(CapturesTest, TheSecondCallIsRecorded) {
  EXPECT_FALSE(call(7));
  EXPECT_EQ(captures_.size(), 0U);
  EXPECT_FALSE(call(7));
  EXPECT_EQ(captures_.size(), 1U);
  EXPECT_TRUE(call(7));
  EXPECT_FALSE(call(8));
}

// More sets of addresses than captures fit, in rotation: some stay captured, and none is captured repeatedly.
TEST_F(CapturesTest, AFullStoreIsLeftAlone) {
  for (int round = 0; round < 5; ++round) {
    for (CUdeviceptr key = 0; key < 100; ++key) call(key);
  }
  EXPECT_EQ(captures_.size(), kMost);
  EXPECT_EQ(made_, kMost);
  std::size_t recorded = 0;
  for (CUdeviceptr key = 0; key < 100; ++key) recorded += call(key) ? 1 : 0;
  EXPECT_EQ(recorded, kMost);
}

TEST_F(CapturesTest, WhatIsLongUnusedMakesRoom) {
  for (int round = 0; round < 2; ++round) {
    for (CUdeviceptr key = 0; key < kMost; ++key) call(key);
  }
  ASSERT_EQ(captures_.size(), kMost);
  for (int i = 0; i < 2000; ++i) call(1);
  for (int i = 0; i < 2; ++i) call(1000);
  EXPECT_TRUE(call(1000));
  EXPECT_TRUE(call(1));
  EXPECT_EQ(captures_.size(), kMost);
}

}  // namespace
}  // namespace titans::test
