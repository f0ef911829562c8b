// titans.hpp: the C interface (titans.h) with ownership, exceptions and containers. Header-only, C++17.
//
//   titans::Session session("model.titans");
//   titans::Stream stream = session.stream();
//   std::vector<float> logits = stream.feed_last(prompt);
//   for (auto generator = stream.generate(); auto token = generator.next();) use(*token);
//
// A call that fails throws titans::Error and leaves its stream unchanged. titans.h describes threads and lifetimes. An
// object that was moved from may only be destroyed or assigned to.
#ifndef TITANS_TITANS_HPP_
#define TITANS_TITANS_HPP_

#if __cplusplus < 201703L && (!defined(_MSVC_LANG) || _MSVC_LANG < 201703L)
#error "titans.hpp needs C++17 or newer, such as -std=c++17"
#else

#include <cstddef>
#include <cstdint>
#include <limits>
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

// what() is "[where] problem. Fix: what to do (TITANS-E0204)"; docs/errors.md lists the codes.
class Error : public std::runtime_error {
 public:
  Error(titans_status status, const char* message, const char* code)
      : std::runtime_error(message), status_(status), code_(code) {}
  titans_status status() const noexcept { return status_; }
  const std::string& code() const noexcept { return code_; }  // "TITANS-E0204"

 private:
  titans_status status_;
  std::string code_;
};

namespace detail {

inline void check(titans_status status) {
  if (status != TITANS_OK) throw Error(status, titans_last_error(), titans_last_error_code());
}

struct Destroy {
  void operator()(titans_session* session) const noexcept { titans_session_close(session); }
  void operator()(titans_stream* stream) const noexcept { titans_stream_destroy(stream); }
  void operator()(titans_generator* generator) const noexcept { titans_generator_destroy(generator); }
};

template <typename Object>
using Handle = std::unique_ptr<Object, Destroy>;

inline const char* or_null(const std::string& value) { return value.empty() ? nullptr : value.c_str(); }

inline titans_state_options state_options(const std::vector<std::uint8_t>& key) {
  return {sizeof(titans_state_options), key.empty() ? nullptr : key.data(), key.size()};
}

}  // namespace detail

// AES-256-GCM key: 32 bytes.
using Key = std::vector<std::uint8_t>;

// The state file at `path`, verified and decrypted, as a safetensors file.
inline std::vector<std::uint8_t> read_state(const std::string& path, const Key& key = {}) {
  const titans_state_options options = detail::state_options(key);
  std::size_t size = 0;
  detail::check(titans_state_read(path.c_str(), &options, nullptr, 0, &size));
  std::vector<std::uint8_t> bytes(size);
  detail::check(titans_state_read(path.c_str(), &options, bytes.data(), bytes.size(), &size));
  bytes.resize(size);  // the file may have been replaced meanwhile
  return bytes;
}

inline std::string version() { return titans_version(); }

// Sampling options. The filters apply in the order top_k, top_p, min_p.
struct Sampling {
  float temperature = 1.0F;  // 0: always the top-1 token
  std::int32_t top_k = 0;    // 0: off
  float top_p = 1.0F;        // 1: off
  float min_p = 0.0F;        // 0: off
  std::uint64_t seed = 0;
  std::int64_t max_tokens = 64;  // < 0: no limit
  Tokens stop;                   // generation ends before one of these is consumed
};

// Limits on chunk updates, docs/guard.md.
struct Guard {
  titans_guard_policy policy = TITANS_GUARD_RAISE;
  float max_update_norm = std::numeric_limits<float>::infinity();
  float max_surprise = std::numeric_limits<float>::infinity();
  bool bundle_limits = true;        // the limits of norms in the bundle count too
  std::uint64_t restart_every = 0;  // tokens; 0: never
};

// See titans_set_log. `log` must not throw.
inline void set_log(titans_log_function log, void* user = nullptr, titans_log_level level = TITANS_LOG_INFO) {
  detail::check(titans_set_log(log, user, level));
}

// A copy of a memory field, float32.
struct Memory {
  std::string name;
  std::vector<std::int64_t> shape;
  std::vector<float> values;
};

// Made by Stream::generate. Destroy it before its stream.
class Generator {
 public:
  // The next token, which the stream has consumed; nothing at the end.
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

// One sequence and the memory it has learned. Made by Session::stream.
class Stream {
 public:
  // Consumes the tokens. Returns the logits after each, (count, vocab_size).
  std::vector<float> feed(const Tokens& tokens) {
    std::vector<float> logits(tokens.size() * output_size_);
    feed(tokens.data(), tokens.size(), TITANS_OUTPUT_ALL, logits.data(), logits.size());
    return logits;
  }

  // Consumes the tokens. Returns the logits after the last, (vocab_size).
  std::vector<float> feed_last(const Tokens& tokens) {
    std::vector<float> logits(output_size_);
    feed(tokens.data(), tokens.size(), TITANS_OUTPUT_LAST, logits.data(), logits.size());
    return logits;
  }

  // Consumes the tokens.
  void feed_none(const Tokens& tokens) { feed(tokens.data(), tokens.size(), TITANS_OUTPUT_NONE, nullptr, 0); }

  // Writes the selected logits to `outputs`, which has room for `capacity` floats.
  void feed(const Token* tokens, std::size_t count, titans_output which, float* outputs, std::size_t capacity) {
    detail::check(titans_stream_feed(handle_.get(), tokens, count, which, outputs, capacity));
  }

  // For a bundle that takes vectors. Consumes `vectors`, (count, input_size). Returns the outputs after each,
  // (count, output_size).
  std::vector<float> feed_vectors(const std::vector<float>& vectors) {
    const std::size_t count = count_vectors(vectors);
    std::vector<float> outputs(count * output_size_);
    feed_vectors(vectors.data(), count, TITANS_OUTPUT_ALL, outputs.data(), outputs.size());
    return outputs;
  }

  // Returns the output after the last vector, (output_size).
  std::vector<float> feed_vectors_last(const std::vector<float>& vectors) {
    std::vector<float> output(output_size_);
    feed_vectors(vectors.data(), count_vectors(vectors), TITANS_OUTPUT_LAST, output.data(), output.size());
    return output;
  }

  // Consumes the vectors.
  void feed_vectors_none(const std::vector<float>& vectors) {
    feed_vectors(vectors.data(), count_vectors(vectors), TITANS_OUTPUT_NONE, nullptr, 0);
  }

  // Writes the selected outputs to `outputs`, which has room for `capacity` floats.
  void feed_vectors(const float* vectors, std::size_t count, titans_output which, float* outputs,
                    std::size_t capacity) {
    detail::check(titans_stream_feed_vectors(handle_.get(), vectors, count, which, outputs, capacity));
  }

  // Consumes one token. Returns the logits after it, (vocab_size).
  std::vector<float> step(Token token) {
    std::vector<float> logits(output_size_);
    step(token, logits.data());
    return logits;
  }

  // Writes the logits to `outputs`, (vocab_size) or NULL.
  void step(Token token, float* outputs) { detail::check(titans_stream_step(handle_.get(), token, outputs)); }

  // Consumes the tokens. Returns ln p of each given all tokens before it.
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

  // Resets to position 0 with a fresh memory. The learning flag stays; marks are removed.
  void reset() { detail::check(titans_stream_reset(handle_.get())); }

  // A second, independent stream with the same state.
  Stream fork() const {
    titans_stream* twin = nullptr;
    detail::check(titans_stream_fork(handle_.get(), &twin));
    return Stream(twin, input_size_, output_size_);
  }

  // Writes the stream to a file, NAME.tstate, for Session::restore. `key`, 32 bytes, encrypts it; empty: no encryption.
  void save(const std::string& path, const Key& key = {}) const {
    const titans_state_options options = detail::state_options(key);
    detail::check(titans_stream_save(handle_.get(), path.c_str(), &options));
  }

  // Keeps a copy of the state as a mark; returns its position.
  std::uint64_t mark() {
    std::uint64_t position = 0;
    detail::check(titans_stream_mark(handle_.get(), &position));
    return position;
  }
  // Restores the mark at `position`, which stays. Later marks are removed.
  void rewind(std::uint64_t position) { detail::check(titans_stream_rewind(handle_.get(), position)); }
  void unmark(std::uint64_t position) { detail::check(titans_stream_unmark(handle_.get(), position)); }
  // The positions of all marks, ascending.
  std::vector<std::uint64_t> marks() const {
    std::size_t count = 0;
    detail::check(titans_stream_marks(handle_.get(), nullptr, 0, &count));
    std::vector<std::uint64_t> positions(count);
    detail::check(titans_stream_marks(handle_.get(), positions.data(), count, &count));
    return positions;
  }

  void set_guard(const Guard& guard = {}) {
    const titans_guard limits{sizeof(titans_guard), guard.policy,        guard.max_update_norm,
                              guard.max_surprise,   guard.restart_every, guard.bundle_limits};
    detail::check(titans_stream_set_guard(handle_.get(), &limits));
  }
  titans_guard_report guard_report() const {
    titans_guard_report report{};
    report.struct_size = sizeof(report);
    detail::check(titans_stream_guard_report(handle_.get(), &report));
    return report;
  }

  // Whether the memory diverges.
  titans_health health() const {
    titans_health health{};
    health.struct_size = sizeof(health);
    detail::check(titans_stream_health(handle_.get(), &health));
    return health;
  }
  // The largest norms that checks have seen, in the order of memory(); -1 for fields other than W and S.
  std::vector<float> peak_norms() const {
    std::vector<float> norms(titans_stream_memory_count(handle_.get()));
    detail::check(titans_stream_peak_norms(handle_.get(), norms.data(), norms.size()));
    return norms;
  }

  // Called after each graph. A result other than 0 ends the call with TITANS_CANCELLED. It must not throw.
  void set_progress(titans_progress_function progress, void* user = nullptr) {
    detail::check(titans_stream_set_progress(handle_.get(), progress, user));
  }
  // Ends the running call. Any thread may call it.
  void cancel() { detail::check(titans_stream_cancel(handle_.get())); }

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
    const std::string message = "[stream] expected vectors of " + std::to_string(input_size_) + " floats, got " +
                                std::to_string(vectors.size()) +
                                " floats in total. Fix: pass whole vectors (TITANS-E0505)";
    throw Error(TITANS_INVALID_ARGUMENT, message.c_str(), "TITANS-E0505");
  }

  detail::Handle<titans_stream> handle_;
  std::size_t input_size_;
  std::size_t output_size_;
};

// Streams of a batch failed; the others have continued. If the batch was refused, all have failed.
class BatchError : public Error {
 public:
  BatchError(titans_status status, std::vector<titans_status> statuses, std::vector<float> outputs)
      : Error(status, titans_last_error(), titans_last_error_code()),
        statuses_(std::move(statuses)),
        outputs_(std::move(outputs)) {}
  const std::vector<titans_status>& statuses() const noexcept { return statuses_; }
  // Rows of the streams that succeeded; the other rows are undefined.
  const std::vector<float>& outputs() const noexcept { return outputs_; }

 private:
  std::vector<titans_status> statuses_;
  std::vector<float> outputs_;
};

// titans.h describes the options. Empty strings: the default.
struct SessionOptions {
  std::string device = "cpu";
  std::string backend;
  std::string backend_library;
  std::string plugin_dir;
  std::int32_t threads = 0;
  std::string memory_kernel;
  std::string engine;
  std::string libraries;
  std::int32_t batch_threads = 0;
  std::uint64_t memory_budget = 0;  // requires spill_dir
  std::string spill_dir;
  std::string guard;
  std::string batch;
  std::optional<std::string> expect_sha256;
  std::string operators;
};

// A loaded bundle. Any number of threads may use it.
class Session {
 public:
  explicit Session(const std::string& path, const SessionOptions& options = {}) {
    const titans_session_options raw{sizeof(titans_session_options),
                                     detail::or_null(options.device),
                                     detail::or_null(options.backend),
                                     detail::or_null(options.backend_library),
                                     detail::or_null(options.plugin_dir),
                                     options.threads,
                                     detail::or_null(options.memory_kernel),
                                     detail::or_null(options.engine),
                                     detail::or_null(options.libraries),
                                     options.batch_threads,
                                     options.memory_budget,
                                     detail::or_null(options.spill_dir),
                                     detail::or_null(options.guard),
                                     detail::or_null(options.batch),
                                     options.expect_sha256 ? options.expect_sha256->c_str() : nullptr,
                                     detail::or_null(options.operators)};
    titans_session* session = nullptr;
    detail::check(titans_session_open(path.c_str(), &raw, &session));
    handle_.reset(session);
  }

  // A stream at position 0 with a fresh memory. It may outlive the session.
  Stream stream() {
    titans_stream* stream = nullptr;
    detail::check(titans_stream_create(handle_.get(), &stream));
    return Stream(stream, input_size(), output_size());
  }

  // A stream that continues where the saved one was.
  Stream restore(const std::string& path, const Key& key = {}) {
    const titans_state_options options = detail::state_options(key);
    titans_stream* stream = nullptr;
    detail::check(titans_session_restore(handle_.get(), path.c_str(), &options, &stream));
    return Stream(stream, input_size(), output_size());
  }

  // Feeds tokens[i] to streams[i], all in one batch. Row i has the logits of streams[i] after it.
  std::vector<float> step_batch(const std::vector<Stream*>& streams, const Tokens& tokens) {
    std::vector<Tokens> sequences;
    for (const Token token : tokens) sequences.push_back({token});
    return feed_batch(streams, sequences);
  }

  // Feeds each stream its own sequence, all in one batch. Row i has the logits of streams[i] after its last token. A
  // sequence for a stream at position 0 must not be empty.
  std::vector<float> feed_batch(const std::vector<Stream*>& streams, const std::vector<Tokens>& sequences) {
    if (streams.size() != sequences.size()) {
      const std::string message = "[batch] expected " + std::to_string(streams.size()) + " sequences, got " +
                                  std::to_string(sequences.size()) +
                                  ". Fix: pass one sequence per stream (TITANS-E0514)";
      throw Error(TITANS_INVALID_ARGUMENT, message.c_str(), "TITANS-E0514");
    }
    std::vector<float> logits(streams.size() * output_size());
    std::vector<titans_feed> items;
    for (std::size_t i = 0; i < streams.size(); ++i) {
      items.push_back({sizeof(titans_feed), streams[i]->handle_.get(), sequences[i].data(), nullptr,
                       sequences[i].size(), TITANS_OUTPUT_LAST, logits.data() + i * output_size(), output_size()});
    }
    std::vector<titans_status> statuses(streams.size(), TITANS_OK);
    const titans_status status = titans_session_feed_batch(handle_.get(), items.data(), items.size(), statuses.data());
    if (status != TITANS_OK) throw BatchError(status, std::move(statuses), std::move(logits));
    return logits;
  }

  titans_metrics metrics() const {
    titans_metrics metrics{};
    metrics.struct_size = sizeof(metrics);
    detail::check(titans_session_metrics(handle_.get(), &metrics));
    return metrics;
  }
  // The counters in Prometheus' text format.
  std::string metrics_text() const {
    std::size_t size = 0;
    detail::check(titans_session_metrics_text(handle_.get(), nullptr, 0, &size));
    std::string text(size + 1024, '\0');  // counters may grow meanwhile
    detail::check(titans_session_metrics_text(handle_.get(), text.data(), text.size(), &size));
    text.resize(size - 1);
    return text;
  }

  // Properties of the session as a JSON object, see titans_session_info.
  std::string info() const { return titans_session_info(handle_.get()); }
  // "tokens" or "vectors".
  std::string input_kind() const { return titans_session_input_kind(handle_.get()); }
  // Floats of one input vector and of one output row. With tokens both are the vocabulary size.
  std::size_t input_size() const { return titans_session_input_size(handle_.get()); }
  std::size_t output_size() const { return titans_session_output_size(handle_.get()); }
  // Vocabulary size; 0 for a bundle that takes vectors.
  std::int32_t vocab_size() const { return titans_session_vocab_size(handle_.get()); }

 private:
  detail::Handle<titans_session> handle_;
};

}  // namespace titans

#endif  // __cplusplus
#endif  // TITANS_TITANS_HPP_
