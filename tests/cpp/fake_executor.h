// A backend without a device, for the bundle of test_bundle.h. It computes, for each token x at position p,
//   logits[v] = W0[0] + v * last + p
//   W0[0] = W0[0] / 2 + x  if learning
//   last = x
// in numbers that float holds exactly, so tests compare without a tolerance. Of a vector x, where the bundle takes
// these, it takes x[0] + 2 x[1] for the token.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "backends/backend.h"
#include "fake_buffer.h"
#include "session/session.h"

namespace titans::test {

// What a test wants of the engine and learns about it.
struct FakeControl {
  std::vector<bool> in_place{false, false};
  int fail_at = -1;            // the call that fails after it has spoilt its outputs, counted from 0
  std::optional<float> spoil;  // every logit, from here on
  std::function<void()> before_call;
  std::mutex mutex;  // guards what follows, of which calls on several threads tell
  std::vector<std::size_t> calls;
  int workspaces = 0;
  FakeTraffic traffic;
};

std::unique_ptr<core::Executor> make_fake_executor(const core::Bundle& bundle, FakeControl& control);

// A session on a bundle in `folder`. Both outlive it, as does `control`.
std::shared_ptr<core::Session> open_fake_session(const std::filesystem::path& folder, FakeControl& control,
                                                 const core::SessionOptions& options = {});

// What the model answers, computed without any of the runtime.
std::vector<float> expected_logits(const std::vector<std::int32_t>& tokens, bool learning = true);
// The same for vectors of kFakeInputs floats, one after the other.
std::vector<float> expected_outputs(const std::vector<float>& vectors, bool learning = true);

}  // namespace titans::test
