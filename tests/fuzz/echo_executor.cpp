#include "echo_executor.h"

#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <utility>

#include "base/error.h"
#include "fuzz.h"

namespace titans::fuzz {
namespace {

struct EchoBuffer final : core::Buffer {
  EchoBuffer(std::size_t size, bool pooled) : bytes(size), pool(pooled) {}

  void upload(const std::byte* host) override { bytes.assign(host, host + bytes.size()); }
  void download(std::byte* host) const override { std::copy(bytes.begin(), bytes.end(), host); }
  void copy_from(const core::Buffer& other) override { bytes = static_cast<const EchoBuffer&>(other).bytes; }
  void copy_stripe_from(const core::Buffer& other, const core::Stripe& stripe) override {
    const std::vector<std::byte>& from = static_cast<const EchoBuffer&>(other).bytes;
    for (std::size_t row = 0; row < stripe.rows; ++row) {
      const std::size_t start = row * stripe.pitch + stripe.offset;
      check(start <= bytes.size() && stripe.bytes <= bytes.size() - start, "a stripe within its buffer");
      std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(start), stripe.bytes,
                  bytes.begin() + static_cast<std::ptrdiff_t>(start));
    }
  }

  bool in_pool() const override { return pool; }

  std::vector<std::byte> bytes;
  bool pool;
};

struct EchoWorkspace final : core::Workspace {
  explicit EchoWorkspace(std::size_t row_size) : row(row_size) {}
  const float* output(std::size_t first_row, std::size_t rows) override {
    check((first_row + rows) * row <= values.size(), "rows that the last call gave");
    return values.data() + first_row * row;
  }
  std::size_t row;
  std::vector<float> values;
};

class EchoExecutor final : public core::Executor {
 public:
  EchoExecutor(const core::Bundle& bundle, std::uint32_t in_place)
      : manifest_(bundle.manifest()), in_place_(in_place) {}

  std::string version() const override { return "echo"; }
  std::string memory_kernel() const override { return "echo"; }
  bool in_place(std::size_t state) const override { return (in_place_ >> (state % 32) & 1U) != 0; }
  std::unique_ptr<core::Buffer> allocate(std::size_t state) override {
    return std::make_unique<EchoBuffer>(manifest_.state[state].bytes, false);
  }
  std::vector<std::unique_ptr<core::Buffer>> allocate_current(std::size_t states) override {
    std::vector<std::unique_ptr<core::Buffer>> buffers;
    for (std::size_t state = 0; state < states; ++state) {
      buffers.push_back(std::make_unique<EchoBuffer>(manifest_.state[state].bytes, most_streams() > 1));
    }
    return buffers;
  }
  std::size_t most_streams() const override {
    for (std::size_t state = 0; state < manifest_.state.size(); ++state) {
      if (!in_place(state)) return 1;
    }
    return kEchoStreams;
  }
  std::unique_ptr<core::Workspace> make_workspace() override {
    return std::make_unique<EchoWorkspace>(static_cast<std::size_t>(manifest_.output_size));
  }

  void run_together(const core::Call* calls, std::size_t count, core::Workspace& workspace) override {
    check(count <= most_streams(), "at most as many streams as a call takes");
    std::vector<float>& values = static_cast<EchoWorkspace&>(workspace).values;
    std::vector<float> rows;
    std::exception_ptr failure;
    for (std::size_t at = 0; at < count; ++at) {
      check(calls[at].graph == calls[0].graph, "calls of one graph");
      check(calls[at].state[0]->in_pool(), "streams in the pools");
      try {
        run(calls[at], workspace);
        rows.insert(rows.end(), values.begin(), values.end());
      } catch (...) {
        failure = std::current_exception();
      }
    }
    if (failure != nullptr) std::rethrow_exception(failure);
    values = std::move(rows);
  }

  void run(const core::Call& call, core::Workspace& workspace) override {
    std::vector<std::vector<std::byte>> states;
    for (std::size_t state = 0; state < manifest_.state.size(); ++state) {
      check((call.state[state] == call.next_state[state]) == in_place(state),
            "one buffer where the engine asks for it");
      states.push_back(static_cast<const EchoBuffer*>(call.state[state])->bytes);
    }
    const core::Graph& graph = manifest_.graphs[call.graph];
    std::vector<float>& logits = static_cast<EchoWorkspace&>(workspace).values;
    logits.clear();
    bool fails = false;
    for (std::int64_t row = 0; row < graph.tokens; ++row) {
      append_logits(states, call.position + row, logits);
      const float token = token_at(call, row);
      fails = fails || token == static_cast<float>(kFailing);
      if (token == static_cast<float>(kSpoiling)) logits.back() = std::numeric_limits<float>::quiet_NaN();
      for (std::size_t state = 0; state < states.size(); ++state) {
        if (call.learn || manifest_.state[state].role != "memory") step(state, token, states[state]);
      }
    }
    for (std::size_t state = 0; state < states.size(); ++state) {
      if (fails) states[state].assign(states[state].size(), std::byte{0x7f});
      static_cast<EchoBuffer*>(call.next_state[state])->bytes = std::move(states[state]);
    }
    if (fails) throw core::Error(TITANS_FAILED, "E0609", "echo", "the token failed", "go on");
  }

 private:
  float token_at(const core::Call& call, std::int64_t row) const {
    if (call.tokens != nullptr) return echo_token(static_cast<float>(call.tokens[row]));
    return echo_token(call.vectors[row * manifest_.input_size]);
  }

  void append_logits(const std::vector<std::vector<std::byte>>& states, std::int64_t position,
                     std::vector<float>& logits) const {
    float sum = static_cast<float>(position % 256);
    for (std::size_t state = 0; state < states.size(); ++state) {
      if (manifest_.state[state].dtype != core::DType::kFloat32) continue;
      float first;
      std::memcpy(&first, states[state].data(), sizeof(first));
      sum += first;
    }
    for (std::int64_t v = 0; v < manifest_.output_size; ++v) logits.push_back(sum + static_cast<float>(v));
  }

  void step(std::size_t state, float token, std::vector<std::byte>& bytes) const {
    if (manifest_.state[state].dtype == core::DType::kFloat32) {
      for (std::size_t at = 0; at < bytes.size(); at += sizeof(float)) {
        float value;
        std::memcpy(&value, &bytes[at], sizeof(value));
        value = echo(value, token);
        std::memcpy(&bytes[at], &value, sizeof(value));
      }
    } else {
      for (std::byte& byte : bytes) {
        byte = static_cast<std::byte>((std::to_integer<unsigned>(byte) * 3 + static_cast<unsigned>(token) + 1) & 0xffU);
      }
    }
  }

  const core::Manifest& manifest_;
  std::uint32_t in_place_;
};

}  // namespace

float echo(float value, float token) { return std::fmod(3 * value + token + 1, 1024.0F); }

float echo_token(float element) { return std::fmod(std::floor(std::fabs(element)), 256.0F); }

std::unique_ptr<core::Executor> make_echo_executor(const core::Bundle& bundle, std::uint32_t in_place) {
  return std::make_unique<EchoExecutor>(bundle, in_place);
}

}  // namespace titans::fuzz
