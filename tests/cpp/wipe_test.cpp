// Freed memory never contains what a stream has learned. The test inspects every deallocation of the program and of the
// libraries that it loads. It looks for one number, which fills the streams' states.
#include <malloc.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include <gtest/gtest.h>

#include "fake_executor.h"
#include "state/state_file.h"
#include "stream/sampler.h"
#include "stream/stream.h"
#include "test_bundle.h"

namespace {

constexpr std::uint32_t kSecret = 0x4B53C2E7;  // a float of about 13.9 million
std::atomic<bool> looking{false};
std::atomic<std::size_t> found{0};
std::atomic<std::size_t> aligned{0};  // deallocations with explicit alignment, as in backends

void look_at(void* data) {
  if (data == nullptr || !looking) return;
  const std::size_t words = ::malloc_usable_size(data) / sizeof(std::uint32_t);
  const auto* word = static_cast<const volatile std::uint32_t*>(data);
  for (std::size_t i = 0; i < words; ++i) {
    if (word[i] == kSecret) {
      ++found;
      return;
    }
  }
}

void give_back(void* data) noexcept {
  look_at(data);
  std::free(data);
}

void give_back_aligned(void* data) noexcept {
  if (looking) ++aligned;
  give_back(data);
}

void* get(std::size_t bytes) {
  void* data = std::malloc(bytes == 0 ? 1 : bytes);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

void* get(std::size_t bytes, std::align_val_t alignment) {
  void* data = nullptr;
  if (::posix_memalign(&data, static_cast<std::size_t>(alignment), bytes == 0 ? 1 : bytes) != 0) throw std::bad_alloc();
  return data;
}

}  // namespace

void* operator new(std::size_t bytes) { return get(bytes); }
void* operator new[](std::size_t bytes) { return get(bytes); }
void* operator new(std::size_t bytes, std::align_val_t alignment) { return get(bytes, alignment); }
void* operator new[](std::size_t bytes, std::align_val_t alignment) { return get(bytes, alignment); }
// A sanitizer's versions of these would not call the ones above.
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return std::malloc(bytes == 0 ? 1 : bytes); }
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept { return std::malloc(bytes == 0 ? 1 : bytes); }
void operator delete(void* data, const std::nothrow_t&) noexcept { give_back(data); }
void operator delete[](void* data, const std::nothrow_t&) noexcept { give_back(data); }
void operator delete(void* data) noexcept { give_back(data); }
void operator delete[](void* data) noexcept { give_back(data); }
void operator delete(void* data, std::size_t) noexcept { give_back(data); }
void operator delete[](void* data, std::size_t) noexcept { give_back(data); }
void operator delete(void* data, std::align_val_t) noexcept { give_back_aligned(data); }
void operator delete[](void* data, std::align_val_t) noexcept { give_back_aligned(data); }
void operator delete(void* data, std::size_t, std::align_val_t) noexcept { give_back_aligned(data); }
void operator delete[](void* data, std::size_t, std::align_val_t) noexcept { give_back_aligned(data); }

namespace titans::test {
namespace {

using core::Stream;

// Counts the deallocations with the secret while an object lives.
class Look {
 public:
  Look() {
    found = aligned = 0;
    looking = true;
  }
  ~Look() { looking = false; }
  static std::size_t times() { return found; }
};

template <typename Numbers>
void fill(Numbers& numbers) {
  for (std::size_t at = 0; at + sizeof(kSecret) <= numbers.size() * sizeof(numbers[0]); at += sizeof(kSecret)) {
    std::memcpy(reinterpret_cast<std::byte*>(numbers.data()) + at, &kSecret, sizeof(kSecret));
  }
}

core::StreamState secret_state(const core::Session& session) {
  core::StreamState state;
  state.position = 1;
  state.last_output.resize(session.output_size());
  fill(state.last_output);
  for (const core::StateTensor& tensor : session.manifest().state) fill(state.tensors.emplace_back(tensor.bytes));
  return state;
}

TEST(Wipe, TheLookFindsWhatIsNotWiped) {
  const Look look;
  {
    std::vector<float> plain(8);
    fill(plain);
  }
  EXPECT_EQ(Look::times(), 1U);
}

TEST(Wipe, WhatTheCoreKeepsAndCopies) {
  TemporaryFolder bundle, spill;
  write_bundle(bundle.path());
  FakeControl control;
  control.in_place = {true, false};
  core::SessionOptions options;
  options.memory_budget = 400;
  options.spill_dir = spill.path();
  const auto session = open_fake_session(bundle.path(), control, options);
  const Look look;
  {
    Stream stream(session, secret_state(*session));
    std::vector<std::unique_ptr<Stream>> others;
    const auto push_out = [&] {
      others.clear();
      for (int i = 0; i < 6; ++i) others.push_back(std::make_unique<Stream>(session));
    };
    push_out();
    {
      const Stream::Use use(stream);
      stream.mark();
      std::vector<float> values(2);
      stream.read_memory(0, values.data(), values.size());
      std::memset(values.data(), 0, values.size() * sizeof(float));
    }
    push_out();
    {
      const Stream::Use use(stream);
      const auto twin = stream.fork();
      stream.rewind(1);
      stream.unmark(1);
    }
    push_out();
    {
      const Stream::Use use(stream);
      const std::filesystem::path file = spill.path() / "one.tstate";
      const core::StateKey key{1, 2, 3};
      for (const core::StateKey* one : {static_cast<const core::StateKey*>(nullptr), &key}) {
        if (one != nullptr && !core::has_crypto()) continue;
        save_state(file, session->state_schema(), stream.state(), one);
        stream.set_state(load_state(file, session->state_schema(), one));
        core::read_state(file, one);
      }
      stream.reset();
      stream.set_state(secret_state(*session));
    }
    EXPECT_GT(session->metrics().spilled.value(), 10U);
  }
  EXPECT_EQ(Look::times(), 0U);
}

TEST(Wipe, WhatTheSamplerWeighs) {
  std::vector<float> logits(64);
  fill(logits);
  core::Sampling sampling;
  sampling.top_k = 8;
  sampling.top_p = 0.9;
  const Look look;
  core::Sampler(sampling).sample(logits, 0);
  EXPECT_EQ(Look::times(), 0U);
}

#ifdef ONNXRUNTIME_BACKEND
TEST(Wipe, WhatTheOnnxRuntimeBackendKeeps) {
  const char* bundle = std::getenv("TITANS_TEST_BUNDLE");
  if (bundle == nullptr) GTEST_SKIP() << "TITANS_TEST_BUNDLE names no bundle";
  core::SessionOptions options;
  options.plugin_dir = std::filesystem::path(ONNXRUNTIME_BACKEND).parent_path();
  options.threads = 1;
  std::shared_ptr<core::Session> session;
  try {
    session = core::Session::open(bundle, options);
  } catch (const core::Error& error) {
    if (error.status() == TITANS_UNSUPPORTED) GTEST_SKIP() << error.what();
    throw;
  }
  const Look look;
  {
    Stream stream(session, secret_state(*session));
    const auto twin = stream.fork();
    stream.mark();
    stream.reset();
  }
  EXPECT_EQ(Look::times(), 0U);
  EXPECT_GT(aligned, 0U) << "the backend's deallocations are not looked at";
}
#endif

}  // namespace
}  // namespace titans::test
