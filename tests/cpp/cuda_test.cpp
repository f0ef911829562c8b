// A backend's memory on a CUDA device, with the fake driver.
#include <cstdlib>
#include <cstring>
#include <numeric>

#include <dlfcn.h>
#include <gtest/gtest.h>

#include "cuda/objects.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

namespace cuda = core::cuda;

class Cuda : public testing::Test {
 protected:
  Cuda() { ::setenv("TITANS_CUDA_DRIVER", FAKE_CUDA, 1); }
  ~Cuda() override {
    for (const char* name : {"TITANS_CUDA_DRIVER", "TITANS_FAKE_CUDA_BROKEN", "TITANS_FAKE_DEVICES"}) ::unsetenv(name);
  }
  static std::vector<unsigned char> download(const cuda::Stream& stream, const cuda::DeviceMemory& memory) {
    std::vector<unsigned char> bytes(memory.size());
    cuda::copy_to_host(stream, bytes.data(), memory.address(), bytes.size());
    stream.synchronize();
    return bytes;
  }
};

TEST_F(Cuda, AStripeIsCopiedInEachRow) {
  const cuda::Context context(cuda::Driver::require(), 0);
  const cuda::Stream stream(context);
  std::vector<unsigned char> numbers(60);
  std::iota(numbers.begin(), numbers.end(), static_cast<unsigned char>(1));
  for (const core::Stripe& stripe : {core::Stripe{2, 3, 12, 5}, core::Stripe{0, 12, 12, 5}, core::Stripe{9, 3, 12, 5},
                                     core::Stripe{4, 20, 60, 1}, core::Stripe{4, 0, 12, 5}}) {
    const cuda::DeviceMemory from(stream, numbers.size());
    const cuda::DeviceMemory to(stream, numbers.size());
    cuda::copy_to_device(stream, from.address(), numbers.data(), numbers.size());
    cuda::copy_stripe(stream, to.address(), from.address(), stripe);
    std::vector<unsigned char> expected(numbers.size(), 0);
    for (std::size_t row = 0; row < stripe.rows; ++row) {
      for (std::size_t i = 0; i < stripe.bytes; ++i) {
        const std::size_t at = row * stripe.pitch + stripe.offset + i;
        expected[at] = numbers[at];
      }
    }
    EXPECT_EQ(download(stream, to), expected) << stripe.offset << " " << stripe.bytes;
  }
}

// Includes memory that is freed while its last copy is pending.
TEST_F(Cuda, MemoryIsWipedBeforeItGoesBack) {
  void* library = ::dlopen(FAKE_CUDA, RTLD_NOW);
  ASSERT_NE(library, nullptr);
  const auto unwiped = reinterpret_cast<std::size_t (*)()>(::dlsym(library, "fake_cuda_unwiped"));
  const std::size_t before = unwiped();
  const cuda::Context context(cuda::Driver::require(), 0);
  const cuda::Stream stream(context);
  {
    const cuda::DeviceMemory memory(stream, 7);
    cuda::copy_to_device(stream, memory.address(), "secret", 7);
    const cuda::PinnedMemory pinned(context, 7);
    std::memcpy(pinned.data(), "secret", 7);
    cuda::copy_to_host(stream, pinned.data(), memory.address(), 7);
    stream.synchronize();
    EXPECT_STREQ(reinterpret_cast<const char*>(pinned.data()), "secret");
    cuda::copy_to_device(stream, memory.address(), "again", 6);
  }
  EXPECT_EQ(unwiped(), before);
  ::dlclose(library);
}

TEST_F(Cuda, AStreamWaitsForAnEventOfAnother) {
  const cuda::Context context(cuda::Driver::require(), 0);
  const cuda::Stream first(context);
  const cuda::Stream second(context);
  const cuda::Event written(context);
  const cuda::DeviceMemory memory(first, 4);
  const cuda::DeviceMemory copy(first, 4);
  cuda::copy_to_device(first, memory.address(), "abc", 4);
  written.record(first);
  second.wait_for(written);
  cuda::copy_on_device(second, copy.address(), memory.address(), 4);
  EXPECT_STREQ(reinterpret_cast<const char*>(download(second, copy).data()), "abc");
}

TEST_F(Cuda, WhatIsRecordedRunsWhenItIsLaunched) {
  const cuda::Context context(cuda::Driver::require(), 0);
  const cuda::Stream stream(context);
  const cuda::PinnedMemory source(context, 4);
  const cuda::DeviceMemory memory(stream, 4);
  std::string why_not;
  const auto recorded = cuda::GraphExec::capture(
      stream, why_not, [&] { cuda::copy_to_device(stream, memory.address(), source.data(), 4); });
  ASSERT_NE(recorded, nullptr) << why_not;
  std::memcpy(source.data(), "xyz", 4);
  EXPECT_EQ(download(stream, memory)[0], 0);
  recorded->launch(stream);
  EXPECT_EQ(download(stream, memory)[0], 'x');
}

// A stream that is left in capture mode would reject further work.
TEST_F(Cuda, ARecordingThatFailsEnds) {
  const cuda::Context context(cuda::Driver::require(), 0);
  const cuda::Stream stream(context);
  std::string why_not;
  const auto recorded =
      cuda::GraphExec::capture(stream, why_not, [] { throw std::runtime_error("cannot be recorded"); });
  EXPECT_EQ(recorded, nullptr);
  EXPECT_EQ(why_not, "cannot be recorded");
  stream.synchronize();
}

TEST_F(Cuda, ErrorsNameTheCall) {
  const cuda::Context context(cuda::Driver::require(), 0);
  const cuda::Stream stream(context);
  expect_error(TITANS_FAILED, {"cuda", "cuMemcpyDtoDAsync", "CUDA_ERROR_FAKE", "nvidia-smi"},
               [&] { cuda::copy_on_device(stream, 1, 2, 3); });
}

TEST_F(Cuda, DevicesByName) {
  const cuda::Driver& driver = cuda::Driver::require();
  EXPECT_EQ(cuda::find_device(driver, "cuda").ordinal, 0);
  ::setenv("TITANS_FAKE_DEVICES", "3", 1);
  EXPECT_EQ(cuda::find_device(driver, "cuda:2").ordinal, 2);
  for (const char* name : {"cuda:", "cuda:x", "cuda:-1", "cuda0", "cuda:1 ", "cuda:99999999999"}) {
    expect_error(TITANS_INVALID_ARGUMENT, {"cuda:N", name}, [&] { cuda::find_device(driver, name); });
  }
  expect_error(TITANS_UNSUPPORTED, {"cuda:3"}, [&] { cuda::find_device(driver, "cuda:3"); });
}

// Each driver has its own file name, because a loaded driver stays loaded.
TEST_F(Cuda, DriversThatDoNot) {
  const TemporaryFolder folder;
  const std::string library = folder.path() / "libcuda.so.1";
  std::string why_not;
  ::setenv("TITANS_CUDA_DRIVER", library.c_str(), 1);
  EXPECT_EQ(cuda::Driver::load(why_not), nullptr);
  EXPECT_NE(why_not.find("no driver"), std::string::npos) << why_not;
  ::setenv("TITANS_CUDA_DRIVER", "libm.so.6", 1);
  EXPECT_EQ(cuda::Driver::load(why_not), nullptr);
  EXPECT_NE(why_not.find("without cuInit"), std::string::npos) << why_not;
  const std::string broken = folder.path() / "broken.so";
  std::filesystem::copy(FAKE_CUDA, broken);
  ::setenv("TITANS_CUDA_DRIVER", broken.c_str(), 1);
  ::setenv("TITANS_FAKE_CUDA_BROKEN", "100", 1);
  EXPECT_EQ(cuda::Driver::load(why_not), nullptr);
  EXPECT_NE(why_not.find("CUDA_ERROR_NO_DEVICE"), std::string::npos) << why_not;
  ::setenv("TITANS_FAKE_CUDA_BROKEN", "0", 1);
  ::setenv("TITANS_FAKE_DEVICES", "0", 1);
  EXPECT_EQ(cuda::Driver::load(why_not), nullptr);
  EXPECT_NE(why_not.find("without a device"), std::string::npos) << why_not;
  ::setenv("TITANS_FAKE_DEVICES", "1", 1);
  EXPECT_NE(cuda::Driver::load(why_not), nullptr);  // searched again
}

}  // namespace
}  // namespace titans::test
