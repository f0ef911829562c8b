#include "fake_executor.h"

#include <algorithm>

#include "base/error.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

constexpr float kInitialMemory = 0.5F;
constexpr float kInitialLast = 1.0F;

void append_row(std::vector<float>& logits, float memory, float last, float position, std::size_t size) {
  for (std::size_t v = 0; v < size; ++v) logits.push_back(memory + static_cast<float>(v) * last + position);
}

std::vector<float> expected(const std::vector<float>& inputs, bool learning, std::size_t size) {
  float memory = kInitialMemory;
  float last = kInitialLast;
  std::vector<float> rows;
  for (std::size_t t = 0; t < inputs.size(); ++t) {
    append_row(rows, memory, last, static_cast<float>(t), size);
    if (learning) memory = memory / 2 + inputs[t];
    last = inputs[t];
  }
  return rows;
}

class FakeExecutor final : public core::Executor {
 public:
  FakeExecutor(const core::Bundle& bundle, FakeControl& control) : manifest_(bundle.manifest()), control_(control) {}

  std::string version() const override { return "fake"; }
  std::string memory_kernel() const override { return "fake-kernel"; }
  bool in_place(std::size_t state) const override { return control_.in_place[state]; }
  std::unique_ptr<core::Buffer> allocate(std::size_t state) override {
    return std::make_unique<FakeBuffer>(manifest_.state[state].bytes, control_.traffic);
  }
  std::vector<std::unique_ptr<core::Buffer>> allocate_current(std::size_t) override {
    const std::lock_guard lock(control_.mutex);
    return fake_buffers(manifest_, control_.traffic, control_.most_streams > 1 && control_.slots-- > 0);
  }
  std::unique_ptr<core::Workspace> make_workspace() override {
    const std::lock_guard lock(control_.mutex);
    ++control_.workspaces;
    return std::make_unique<FakeWorkspace>(static_cast<std::size_t>(manifest_.output_size));
  }

  std::size_t most_streams() const override { return control_.most_streams; }

  void run_together(const core::Call* calls, std::size_t count, core::Workspace& workspace) override {
    EXPECT_LE(count, control_.most_streams);
    run_all(calls, count, workspace, [&](const core::Call& call) { run_one(call, workspace); });
    const std::lock_guard lock(control_.mutex);
    control_.together.emplace_back(calls[0].graph, count);
  }

  void run(const core::Call& call, core::Workspace& workspace) override {
    run_one(call, workspace);
    const std::lock_guard lock(control_.mutex);
    control_.together.emplace_back(call.graph, 1);
  }

 private:
  void run_one(const core::Call& call, core::Workspace& workspace) {
    if (control_.before_call) control_.before_call();
    for (std::size_t state = 0; state < 2; ++state) {
      EXPECT_EQ(call.state[state] == call.next_state[state], control_.in_place[state]);
    }
    std::vector<float> memory = static_cast<const FakeBuffer*>(call.state[0])->values;
    float last = static_cast<const FakeBuffer*>(call.state[1])->values[0];
    std::vector<float> logits;
    EXPECT_EQ(call.vectors != nullptr, manifest_.input_kind == core::InputKind::kVectors);
    EXPECT_EQ(call.tokens == nullptr, call.vectors != nullptr);
    const core::Graph& graph = manifest_.graphs[call.graph];
    EXPECT_TRUE(std::count(graph.offsets.begin(), graph.offsets.end(), call.position % graph.stride)) << graph.name;
    for (std::int64_t t = 0; t < graph.tokens; ++t) {
      append_row(logits, memory[0], last, static_cast<float>(call.position + t),
                 static_cast<std::size_t>(manifest_.output_size));
      const float* vector = call.vectors == nullptr ? nullptr : call.vectors + t * manifest_.input_size;
      const float token = vector == nullptr ? static_cast<float>(call.tokens[t]) : vector[0] + 2 * vector[1];
      if (call.learn) memory[0] = memory[0] / 2 + token;
      last = token;
    }
    bool fails = note(call);
    for (std::int64_t t = 0; call.tokens != nullptr && t < graph.tokens; ++t) {
      fails = fails || call.tokens[t] == control_.poison;
    }
    static_cast<FakeBuffer*>(call.next_state[0])->values = fails ? std::vector<float>(4, -1.0F) : memory;
    static_cast<FakeBuffer*>(call.next_state[1])->values[0] = fails ? -1.0F : last;
    if (fails) throw core::Error(TITANS_FAILED, "E0609", "fake", "the call failed", "go on");
    if (control_.spoil) std::fill(logits.begin(), logits.end(), *control_.spoil);
    static_cast<FakeWorkspace&>(workspace).values = logits;
  }

  // Records the call. Returns whether it is the one that fails.
  bool note(const core::Call& call) {
    const std::lock_guard lock(control_.mutex);
    control_.calls.push_back(call.graph);
    return static_cast<int>(control_.calls.size()) - 1 == control_.fail_at;
  }

  const core::Manifest& manifest_;
  FakeControl& control_;
};

}  // namespace

std::unique_ptr<core::Executor> make_fake_executor(const core::Bundle& bundle, FakeControl& control) {
  return std::make_unique<FakeExecutor>(bundle, control);
}

std::shared_ptr<core::Session> open_fake_session(const std::filesystem::path& folder, FakeControl& control,
                                                 const core::SessionOptions& options) {
  auto bundle = std::make_unique<const core::Bundle>(folder);
  auto executor = make_fake_executor(*bundle, control);
  return std::make_shared<core::Session>(std::move(bundle), std::move(executor), options);
}

std::vector<float> expected_logits(const std::vector<std::int32_t>& tokens, bool learning) {
  return expected(std::vector<float>(tokens.begin(), tokens.end()), learning, kFakeVocab);
}

std::vector<float> expected_outputs(const std::vector<float>& vectors, bool learning) {
  std::vector<float> inputs;
  for (std::size_t at = 0; at < vectors.size(); at += kFakeInputs) inputs.push_back(vectors[at] + 2 * vectors[at + 1]);
  return expected(inputs, learning, kFakeOutputs);
}

}  // namespace titans::test
