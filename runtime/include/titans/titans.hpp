// titans.hpp: the C interface (titans.h) with ownership, exceptions and containers. Header only, C++17.
//
//   titans::Session session("model.titans");
//   titans::Stream stream = session.stream();
//   std::vector<float> logits = stream.feed_last(prompt);
//   for (auto generator = stream.generate(); auto token = generator.next();) use(*token);
//
// Every call that fails throws titans::Error and leaves its stream as it was. Threads and lifetimes: see titans.h. An
// object that was moved from can only be destroyed or assigned to.
#ifndef TITANS_TITANS_HPP_
#define TITANS_TITANS_HPP_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "titans/titans.h"

namespace titans {

using Token = std::int32_t;
using Tokens = std::vector<Token>;

class Error : public std::runtime_error {
 public:
  Error(titans_status status, const char* message) : std::runtime_error(message), status_(status) {}
  titans_status status() const noexcept { return status_; }

 private:
  titans_status status_;
};

namespace detail {

inline void check(titans_status status) {
  if (status != TITANS_OK) throw Error(status, titans_last_error());
}

struct Destroy {
  void operator()(titans_session* session) const noexcept { titans_session_close(session); }
  void operator()(titans_stream* stream) const noexcept { titans_stream_destroy(stream); }
  void operator()(titans_generator* generator) const noexcept { titans_generator_destroy(generator); }
};

template <typename Object>
using Handle = std::unique_ptr<Object, Destroy>;

inline const char* or_null(const std::string& value) { return value.empty() ? nullptr : value.c_str(); }

}  // namespace detail

inline std::string version() { return titans_version(); }

// How to draw tokens; the filters apply in the order top_k, top_p, min_p.
struct Sampling {
  float temperature = 1.0F;  // 0: always the most likely token
  std::int32_t top_k = 0;    // 0: off
  float top_p = 1.0F;        // 1: off
  float min_p = 0.0F;        // 0: off
  std::uint64_t seed = 0;
  std::int64_t max_tokens = -1;  // < 0: no limit
  Tokens stop;                   // generation ends before one of these is consumed
};

// A field of the memory: a copy.
struct Memory {
  std::string name;
  std::vector<std::int64_t> shape;
  std::vector<float> values;
};

// Made by Stream::generate; destroyed before that stream.
class Generator {
 public:
  // A token that the stream has consumed; nothing at the end.
  std::optional<Token> next() {
    Token token = 0;
    int done = 0;
    detail::check(titans_generator_next(handle_.get(), &token, &done));
    return done != 0 ? std::nullopt : std::optional<Token>(token);
  }

 private:
  friend class Stream;
  explicit Generator(titans_generator* handle) : handle_(handle) {}
  detail::Handle<titans_generator> handle_;
};

// One sequence and what its memory has learned. Made by Session::stream.
class Stream {
 public:
  // Consumes the tokens. Logits after each of them, row by row.
  std::vector<float> feed(const Tokens& tokens) {
    std::vector<float> logits(tokens.size() * output_size_);
    feed(tokens.data(), tokens.size(), TITANS_LOGITS_ALL, logits.data(), logits.size());
    return logits;
  }

  // Consumes the tokens. Logits after the last.
  std::vector<float> feed_last(const Tokens& tokens) {
    std::vector<float> logits(output_size_);
    feed(tokens.data(), tokens.size(), TITANS_LOGITS_LAST, logits.data(), logits.size());
    return logits;
  }

  // Consumes the tokens. No logits.
  void feed_none(const Tokens& tokens) { feed(tokens.data(), tokens.size(), TITANS_LOGITS_NONE, nullptr, 0); }

  // The same into a buffer of the caller's.
  void feed(const Token* tokens, std::size_t count, titans_logits which, float* logits, std::size_t capacity) {
    detail::check(titans_stream_feed(handle_.get(), tokens, count, which, logits, capacity));
  }

  // Of a bundle that takes vectors: consumes them, one after the other in `vectors`, Session::input_size() floats each.
  // Outputs after each of them, row by row.
  std::vector<float> feed_vectors(const std::vector<float>& vectors) {
    const std::size_t count = count_vectors(vectors);
    std::vector<float> outputs(count * output_size_);
    feed_vectors(vectors.data(), count, TITANS_LOGITS_ALL, outputs.data(), outputs.size());
    return outputs;
  }

  // The output after the last.
  std::vector<float> feed_vectors_last(const std::vector<float>& vectors) {
    std::vector<float> output(output_size_);
    feed_vectors(vectors.data(), count_vectors(vectors), TITANS_LOGITS_LAST, output.data(), output.size());
    return output;
  }

  // No output.
  void feed_vectors_none(const std::vector<float>& vectors) {
    feed_vectors(vectors.data(), count_vectors(vectors), TITANS_LOGITS_NONE, nullptr, 0);
  }

  // The same into a buffer of the caller's.
  void feed_vectors(const float* vectors, std::size_t count, titans_logits which, float* outputs,
                    std::size_t capacity) {
    detail::check(titans_stream_feed_vectors(handle_.get(), vectors, count, which, outputs, capacity));
  }

  // Consumes one token. Logits after it.
  std::vector<float> step(Token token) {
    std::vector<float> logits(output_size_);
    step(token, logits.data());
    return logits;
  }

  // The same into `logits`, as many as the vocabulary has tokens, or NULL.
  void step(Token token, float* logits) { detail::check(titans_stream_step(handle_.get(), token, logits)); }

  // Consumes the tokens. ln p of each given all before it.
  std::vector<float> score(const Tokens& tokens) {
    std::vector<float> logprobs(tokens.size());
    detail::check(titans_stream_score(handle_.get(), tokens.data(), tokens.size(), logprobs.data()));
    return logprobs;
  }

  Generator generate(const Sampling& sampling = {}) {
    titans_sampling options;
    titans_sampling_init(&options);
    options.temperature = sampling.temperature;
    options.top_k = sampling.top_k;
    options.top_p = sampling.top_p;
    options.min_p = sampling.min_p;
    options.seed = sampling.seed;
    options.max_tokens = sampling.max_tokens;
    options.stop_tokens = sampling.stop.data();
    options.stop_count = sampling.stop.size();
    titans_generator* generator = nullptr;
    detail::check(titans_generator_create(handle_.get(), &options, &generator));
    return Generator(generator);
  }

  // Back to a fresh memory at position 0. Whether it learns is kept.
  void reset() { detail::check(titans_stream_reset(handle_.get())); }

  // A second stream with the same state, independent from here on.
  Stream fork() const {
    titans_stream* twin = nullptr;
    detail::check(titans_stream_fork(handle_.get(), &twin));
    return Stream(twin, input_size_, output_size_);
  }

  void freeze() { detail::check(titans_stream_set_learning(handle_.get(), 0)); }
  void resume() { detail::check(titans_stream_set_learning(handle_.get(), 1)); }
  bool learning() const { return titans_stream_learning(handle_.get()) != 0; }
  std::uint64_t position() const { return titans_stream_position(handle_.get()); }
  std::uint64_t state_bytes() const { return titans_stream_state_bytes(handle_.get()); }

  std::vector<Memory> memory() const {
    std::vector<Memory> fields(titans_stream_memory_count(handle_.get()));
    for (std::size_t index = 0; index < fields.size(); ++index) {
      titans_memory_info info;
      detail::check(titans_stream_memory_info(handle_.get(), index, &info));
      Memory& field = fields[index];
      field.name = info.name;
      field.shape.assign(info.shape, info.shape + info.rank);
      field.values.resize(info.elements);
      detail::check(titans_stream_memory_read(handle_.get(), index, field.values.data(), field.values.size()));
    }
    return fields;
  }

 private:
  friend class Session;
  Stream(titans_stream* handle, std::size_t input_size, std::size_t output_size)
      : handle_(handle), input_size_(input_size), output_size_(output_size) {}

  std::size_t count_vectors(const std::vector<float>& vectors) const {
    if (vectors.size() % input_size_ == 0) return vectors.size() / input_size_;
    const std::string message = "[stream] expected vectors of " + std::to_string(input_size_) +
                                " floats each but got " + std::to_string(vectors.size()) +
                                " floats; do pass whole vectors";
    throw Error(TITANS_INVALID_ARGUMENT, message.c_str());
  }

  detail::Handle<titans_stream> handle_;
  std::size_t input_size_;
  std::size_t output_size_;
};

// Empty strings: the default, as described in titans.h.
struct SessionOptions {
  std::string device = "cpu";
  std::string backend;
  std::string backend_library;
  std::string plugin_dir;
  std::int32_t threads = 0;
  std::string memory_kernel;
  std::string engine;
  std::string libraries;
};

// A loaded bundle. Any number of threads may use it.
class Session {
 public:
  explicit Session(const std::string& path, const SessionOptions& options = {}) {
    const titans_session_options raw{sizeof(titans_session_options),         detail::or_null(options.device),
                                     detail::or_null(options.backend),       detail::or_null(options.backend_library),
                                     detail::or_null(options.plugin_dir),    options.threads,
                                     detail::or_null(options.memory_kernel), detail::or_null(options.engine),
                                     detail::or_null(options.libraries)};
    titans_session* session = nullptr;
    detail::check(titans_session_open(path.c_str(), &raw, &session));
    handle_.reset(session);
  }

  // A stream with a fresh memory. It may outlive the session.
  Stream stream() {
    titans_stream* stream = nullptr;
    detail::check(titans_stream_create(handle_.get(), &stream));
    return Stream(stream, input_size(), output_size());
  }

  // Facts about the session as a JSON object.
  std::string info() const { return titans_session_info(handle_.get()); }
  // "tokens" or "vectors".
  std::string input_kind() const { return titans_session_input_kind(handle_.get()); }
  // Floats of one vector that goes in, and of one that comes out; with tokens both are the vocabulary.
  std::size_t input_size() const { return titans_session_input_size(handle_.get()); }
  std::size_t output_size() const { return titans_session_output_size(handle_.get()); }
  // 0 where the bundle takes vectors.
  std::int32_t vocab_size() const { return titans_session_vocab_size(handle_.get()); }

 private:
  detail::Handle<titans_session> handle_;
};

}  // namespace titans

#endif  // TITANS_TITANS_HPP_
