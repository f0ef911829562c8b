#include "packed_executor.h"

#include <array>
#include <cmath>
#include <utility>

#include "test_bundle.h"

namespace titans::test {
namespace {

using nlohmann::json;

constexpr auto kChunk = static_cast<std::size_t>(kPackedChunk);

// The offsets of a row's fields.
constexpr std::size_t kW = 0;
constexpr std::size_t kS = 2;
constexpr std::size_t kLeft = 4;
constexpr std::size_t kRight = 8;
constexpr std::size_t kE = kPackedCoefficients;
constexpr std::size_t kA = 16;
constexpr std::size_t kM = 20;
constexpr std::size_t kF = 21;
constexpr std::size_t kBeta = 22;

void start_chunk(float* row) {
  for (std::size_t s = 0; s < kChunk; ++s) row[kE + s] = row[kA + s] = 0.0F;
  row[kM] = row[kBeta] = 1.0F;
  row[kF] = 0.0F;
}

void append(float* row, std::size_t fill, float left, float right, bool learn) {
  row[kLeft + fill] = learn ? left : 0.0F;  // NaN times 0 would be NaN
  row[kRight + fill] = learn ? right : 0.0F;
  row[kE + fill] = row[kA + fill] = 0.0F;
  if (!learn) return;
  for (std::size_t s = 0; s <= fill; ++s) {
    row[kE + s] = row[kE + s] / 2 + (s == fill ? left + 1 : 0.0F);
    row[kA + s] = row[kA + s] / 2 + row[kE + s];
  }
  row[kM] /= 2;
  row[kF] = row[kF] / 2 + row[kM];
  row[kBeta] /= 2;
}

// W after the token at `fill`.
float current(const float* row, std::size_t element, std::size_t fill) {
  float w = row[kBeta] * row[kW + element] + row[kF] * row[kS + element];
  for (std::size_t s = 0; s <= fill; ++s) w -= row[kA + s] * row[kLeft + s] * row[kRight + s];
  return w;
}

void update_chunk(float* row) {
  for (std::size_t element = 0; element < 2; ++element) {
    row[kW + element] = current(row, element, kChunk - 1);
    float s = row[kM] * row[kS + element];
    for (std::size_t i = 0; i < kChunk; ++i) s -= row[kE + i] * row[kLeft + i] * row[kRight + i];
    row[kS + element] = s;
  }
  start_chunk(row);
}

// Overwrites everything that a call of `tokens` tokens at `fill` may write.
void spoil(float* row, std::size_t fill, std::size_t tokens) {
  const bool completes = fill + tokens >= kChunk;
  for (std::size_t i = completes ? 0 : kPackedCoefficients; i < kPackedRow; ++i) row[i] = std::nanf("");
  for (std::size_t s = fill; s < std::min(fill + tokens, kChunk); ++s) row[kLeft + s] = row[kRight + s] = std::nanf("");
}

class PackedExecutor final : public core::Executor {
 public:
  PackedExecutor(const core::Bundle& bundle, PackedControl& control)
      : manifest_(bundle.manifest()), control_(control) {}

  std::string version() const override { return "packed"; }
  std::string memory_kernel() const override { return "fake-kernel"; }
  bool in_place(std::size_t state) const override { return control_.in_place[state]; }
  std::unique_ptr<core::Buffer> allocate(std::size_t state) override {
    return std::make_unique<FakeBuffer>(manifest_.state[state].bytes, control_.traffic);
  }
  std::vector<std::unique_ptr<core::Buffer>> allocate_current(std::size_t) override {
    return fake_buffers(manifest_, control_.traffic, control_.most_streams > 1);
  }
  std::unique_ptr<core::Workspace> make_workspace() override { return std::make_unique<FakeWorkspace>(); }
  std::size_t most_streams() const override { return control_.most_streams; }
  void run_together(const core::Call* calls, std::size_t count, core::Workspace& workspace) override {
    EXPECT_LE(count, control_.most_streams);
    run_all(calls, count, workspace, [&](const core::Call& call) { run(call, workspace); });
  }

  void run(const core::Call& call, core::Workspace& workspace) override {
    if (control_.before_call) control_.before_call();
    for (std::size_t state = 0; state < 3; ++state) {
      EXPECT_EQ(call.state[state] == call.next_state[state], control_.in_place[state]);
      auto& next = *static_cast<FakeBuffer*>(call.next_state[state]);
      if (!control_.in_place[state] && state < 2)
        next.values = static_cast<const FakeBuffer*>(call.state[state])->values;
    }
    std::vector<float>& memory = static_cast<FakeBuffer*>(call.next_state[0])->values;
    std::vector<float>& other = static_cast<FakeBuffer*>(call.next_state[1])->values;
    float& next_last = static_cast<FakeBuffer*>(call.next_state[2])->values[0];
    float last = static_cast<const FakeBuffer*>(call.state[2])->values[0];
    const auto count = static_cast<std::size_t>(manifest_.graphs[call.graph].tokens);
    const auto fill = static_cast<std::size_t>(call.position % kPackedChunk);

    const bool fails = static_cast<int>(control_.calls.size()) == control_.fail_at;
    control_.calls.push_back(call.graph);
    if (fails) {
      for (std::size_t head = 0; head < kPackedHeads; ++head) spoil(memory.data() + head * kPackedRow, fill, count);
      std::fill(other.begin(), other.end(), std::nanf(""));
      next_last = std::nanf("");
      throw core::Error(TITANS_FAILED, "E0609", "packed", "the call failed", "go on");
    }
    std::vector<float>& logits = static_cast<FakeWorkspace&>(workspace).values;
    logits.clear();
    for (std::size_t t = 0; t < count; ++t) {
      const std::size_t at = (fill + t) % kChunk;
      const auto token = static_cast<float>(call.tokens[t]);
      float sum = other[0] + last;
      for (std::size_t head = 0; head < kPackedHeads; ++head) {
        float* row = memory.data() + head * kPackedRow;
        const auto surprising = control_.surprising.find(call.tokens[t]);
        const float left = surprising == control_.surprising.end() ? token : surprising->second;
        append(row, at, left + static_cast<float>(head), last, call.learn);
        sum += current(row, head, at);
        if (at + 1 == kChunk) update_chunk(row);
      }
      for (std::size_t v = 0; v < kFakeVocab; ++v) logits.push_back(sum + static_cast<float>(v) * token);
      if (call.learn) other[0] = other[0] / 2 + token;
      last = token;
    }
    next_last = last;
  }

 private:
  const core::Manifest& manifest_;
  PackedControl& control_;
};

json coefficient(const char* name, std::size_t offset, const json& shape, int at_start) {
  return {{"name", name},          {"offset", offset},   {"shape", shape},
          {"kind", "coefficient"}, {"written", "token"}, {"at_start", at_start}};
}

// The field names are not those of any operator, because the runtime must rely on the kinds only.
json packed_layout() {
  const json two{2}, chunk{kPackedChunk}, number = json::array();
  return json::array({
      {{"name", "kernel"}, {"offset", kW}, {"shape", two}, {"kind", "weights"}, {"written", "chunk"}},
      {{"name", "velocity"}, {"offset", kS}, {"shape", two}, {"kind", "surprise"}, {"written", "chunk"}},
      {{"name", "seen"}, {"offset", kLeft}, {"shape", chunk}, {"kind", "open_chunk"}, {"written", "row"}},
      {{"name", "wanted"}, {"offset", kRight}, {"shape", chunk}, {"kind", "open_chunk"}, {"written", "row"}},
      coefficient("late", kE, chunk, 0),
      coefficient("early", kA, chunk, 0),
      coefficient("inertia", kM, number, 1),
      coefficient("drift", kF, number, 0),
      coefficient("keep", kBeta, number, 1),
  });
}

}  // namespace

void write_packed_bundle(const std::filesystem::path& folder) {
  json manifest = manifest_json();
  json other = manifest["state"][0];
  manifest["state"][0].update(
      {{"shape", {1, kPackedHeads, kPackedRow}}, {"chunk", kPackedChunk}, {"layout", packed_layout()}});
  other.update({{"name", "layers.1.memory"}, {"input", "other"}, {"output", "other.next"}});
  manifest["state"].insert(manifest["state"].begin() + 1, other);
  manifest["graphs"] = json::array();
  const std::array<std::array<int, 2>, 4> graphs{{{8, 4}, {4, 4}, {2, 2}, {1, 1}}};
  for (const auto& [tokens, stride] : graphs) {
    const std::string name = "graph" + std::to_string(tokens);
    write_file(folder / (name + ".onnx"), name);
    manifest["graphs"].push_back(
        {{"name", name}, {"file", name + ".onnx"}, {"tokens", tokens}, {"stride", stride}, {"weights", json::array()}});
  }
  std::vector<float> row(kPackedRow, 0.0F);
  row[kW] = 0.5F;
  row[kW + 1] = 0.25F;
  start_chunk(row.data());
  const std::string data =
      float_bytes(row) + float_bytes(row) + float_bytes({0.5F, 0.25F, 0.0F, 3.0F}) + float_bytes({1.0F});
  write_file(folder / "state.safetensors",
             safetensors(R"({"layers.0.memory": {"dtype": "F32", "shape": [1, 2, 32], "data_offsets": [0, 256]},)"
                         R"( "layers.1.memory": {"dtype": "F32", "shape": [1, 1, 4], "data_offsets": [256, 272]},)"
                         R"( "layers.0.last": {"dtype": "F32", "shape": [1, 1], "data_offsets": [272, 276]}})",
                         data));
  write_file(
      folder / "weights.safetensors",
      safetensors(R"({"E": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})", float_bytes({1.0F, 2.0F})));
  write_manifest(folder, manifest);
}

std::shared_ptr<core::Session> open_packed_session(const std::filesystem::path& folder, PackedControl& control,
                                                   const core::SessionOptions& options) {
  auto bundle = std::make_unique<const core::Bundle>(folder);
  auto executor = std::make_unique<PackedExecutor>(*bundle, control);
  return std::make_shared<core::Session>(std::move(bundle), std::move(executor), options);
}

}  // namespace titans::test
