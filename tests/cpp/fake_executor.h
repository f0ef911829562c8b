// A host-memory backend for the bundle of test_bundle.h. For each token x at position p, it computes
//   logits[v] = W0[0] + v * last + p
//   W0[0] = W0[0] / 2 + x  if learning
//   last = x
// All numbers are exact in float, so tests compare without a tolerance. In a bundle that takes vectors, a vector x
// counts as the token x[0] + 2 x[1].
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

// The engine's configuration by a test, and the calls that the engine records.
struct FakeControl {
  std::vector<bool> in_place{false, false};
  int fail_at = -1;                    // index of the call that fails after overwriting its outputs, from 0
  std::optional<float> spoil;          // replaces every logit from now on
  std::optional<std::int32_t> poison;  // a call with this token fails like that of fail_at
  std::size_t most_streams = 1;        // of one call
  int slots = 1000;                    // free slots in the pools, if calls take several streams
  std::function<void()> before_call;
  std::mutex mutex;  // guards the members below, which calls on several threads write
  std::vector<std::size_t> calls;
  std::vector<std::pair<std::size_t, std::size_t>> together;  // graph and streams of each call
  int workspaces = 0;
  FakeTraffic traffic;
};

std::unique_ptr<core::Executor> make_fake_executor(const core::Bundle& bundle, FakeControl& control);

// A session on the bundle in `folder`. `folder` and `control` must outlive it.
std::shared_ptr<core::Session> open_fake_session(const std::filesystem::path& folder, FakeControl& control,
                                                 const core::SessionOptions& options = {});

// The model's logits, computed without the runtime.
std::vector<float> expected_logits(const std::vector<std::int32_t>& tokens, bool learning = true);
// The same for a sequence of vectors of kFakeInputs floats.
std::vector<float> expected_outputs(const std::vector<float>& vectors, bool learning = true);

}  // namespace titans::test
