// The C interface: checks pointers and converts exceptions to statuses.
#include "titans/titans.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/forks.h"
#include "base/log.h"
#include "session/session.h"
#include "state/state_file.h"
#include "stream/batch.h"
#include "stream/generator.h"
#include "stream/stream.h"

namespace core = titans::core;

struct titans_session {
  std::shared_ptr<core::Session> session;
  std::uint32_t made_by = core::fork_count();
};

struct titans_stream {
  std::unique_ptr<core::Stream> stream;
  std::uint32_t made_by = core::fork_count();
};

struct titans_generator {
  core::Generator generator;
  std::uint32_t made_by = core::fork_count();
};

namespace {

// In the child of a fork nothing is freed: the threads that would have to end first are not there.
template <typename Handle>
void destroy(Handle* handle) {
  if (handle != nullptr && handle->made_by == core::fork_count()) delete handle;
}

thread_local core::Failure last_failure;

template <typename Body>
titans_status guard(Body&& body) noexcept {
  try {
    body();
    return TITANS_OK;
  } catch (...) {
    last_failure = core::current_failure();
    return last_failure.status;
  }
}

void require(const void* pointer, std::string_view name) {
  if (pointer == nullptr) {
    throw core::Error(TITANS_INVALID_ARGUMENT, "E0501", "titans", core::text(name, " is NULL"), "pass a pointer");
  }
}

// A handle of this process.
template <typename Handle>
void require_handle(const Handle* handle, std::string_view name) {
  require(handle, name);
  core::require_own_process(handle->made_by, name);
}

// An empty array may be a null pointer.
void require_array(const void* pointer, std::size_t count, std::string_view name) {
  if (count > 0) require(pointer, name);
}

// The ends of struct versions. Smaller sizes are rejected; unknown later fields are ignored. A field of a later version
// is read only if struct_size covers it and has its default otherwise.
constexpr std::size_t kFirstSessionOptions = offsetof(titans_session_options, threads) + sizeof(std::int32_t);
constexpr std::size_t kMemoryKernelEnd = offsetof(titans_session_options, memory_kernel) + sizeof(const char*);
constexpr std::size_t kEngineEnd = offsetof(titans_session_options, engine) + sizeof(const char*);
constexpr std::size_t kLibrariesEnd = offsetof(titans_session_options, libraries) + sizeof(const char*);
constexpr std::size_t kFirstStateOptions = offsetof(titans_state_options, key_bytes) + sizeof(std::size_t);
constexpr std::size_t kFirstMetrics = offsetof(titans_metrics, feed) + sizeof(titans_durations);
constexpr std::size_t kFirstGuard = offsetof(titans_guard, max_surprise) + sizeof(float);
constexpr std::size_t kFirstGuardReport = offsetof(titans_guard_report, peak_surprise) + sizeof(float);
constexpr std::size_t kBatchThreadsEnd = offsetof(titans_session_options, batch_threads) + sizeof(std::int32_t);
constexpr std::size_t kMemoryBudgetEnd = offsetof(titans_session_options, memory_budget) + sizeof(std::uint64_t);
constexpr std::size_t kSpillDirEnd = offsetof(titans_session_options, spill_dir) + sizeof(const char*);
constexpr std::size_t kSessionGuardEnd = offsetof(titans_session_options, guard) + sizeof(const char*);
constexpr std::size_t kBatchEnd = offsetof(titans_session_options, batch) + sizeof(const char*);
constexpr std::size_t kExpectSha256End = offsetof(titans_session_options, expect_sha256) + sizeof(const char*);
constexpr std::size_t kOperatorsEnd = offsetof(titans_session_options, operators) + sizeof(const char*);
constexpr std::size_t kGuardEnd = offsetof(titans_guard, bundle_limits) + sizeof(std::int32_t);
constexpr std::size_t kFirstHealth = offsetof(titans_health, checks) + sizeof(std::uint64_t);
constexpr std::size_t kFirstFeed = offsetof(titans_feed, capacity) + sizeof(std::size_t);
constexpr std::size_t kFirstSampling = offsetof(titans_sampling, stop_count) + sizeof(std::size_t);

void require_size(std::size_t got, std::size_t least, std::string_view name) {
  if (got < least) {
    throw core::Error(TITANS_INVALID_ARGUMENT, "E0501", "titans",
                      core::text("expected ", name, ".struct_size of at least ", least, ", got ", got),
                      core::text("set it to sizeof(", name, ")"));
  }
}

void require_choice(titans_output which) {
  if (which == TITANS_OUTPUT_NONE || which == TITANS_OUTPUT_LAST || which == TITANS_OUTPUT_ALL) return;
  throw core::Error(TITANS_INVALID_ARGUMENT, "E0501", "stream",
                    core::text("unknown choice of outputs: ", static_cast<int>(which)), "pass a titans_output");
}

void require_memory(const titans_stream* stream, std::size_t index) {
  const std::size_t count = stream->stream->session().memories().size();
  if (index >= count) {
    throw core::Error(TITANS_INVALID_ARGUMENT, "E0501", "stream",
                      core::text("expected a memory index below ", count, ", got ", index),
                      "call titans_stream_memory_count first");
  }
}

void require_room(std::size_t needed, std::size_t capacity, std::string_view what) {
  if (capacity >= needed) return;
  throw core::Error(TITANS_INVALID_ARGUMENT, "E0507", "state",
                    core::text("expected room for ", needed, " ", what, ", got ", capacity), "pass a larger buffer");
}

// A copy of the application's key for the duration of the call.
class StateOptions {
 public:
  StateOptions() = default;
  explicit StateOptions(const std::uint8_t* key) { std::copy_n(key, key_.emplace().size(), key_->begin()); }
  ~StateOptions() {
    if (key_) core::wipe(key_->data(), key_->size());
  }
  StateOptions(const StateOptions&) = delete;
  StateOptions& operator=(const StateOptions&) = delete;
  const core::StateKey* get() const { return key_ ? &*key_ : nullptr; }

 private:
  std::optional<core::StateKey> key_;
};

StateOptions read_options(const titans_state_options* options) {
  if (options == nullptr) return {};
  require_size(options->struct_size, kFirstStateOptions, "titans_state_options");
  if (options->key == nullptr && options->key_bytes == 0) return {};
  require(options->key, "titans_state_options.key");
  if (options->key_bytes != core::kKeyBytes) {
    throw core::Error(TITANS_INVALID_ARGUMENT, "E0406", "state",
                      core::text("expected a key of ", core::kKeyBytes, " bytes, got ", options->key_bytes),
                      "derive a key of that length");
  }
  return StateOptions(options->key);
}

core::SessionOptions read_options(const titans_session_options* options) {
  core::SessionOptions out;
  if (options == nullptr) return out;
  require_size(options->struct_size, kFirstSessionOptions, "titans_session_options");
  if (options->device != nullptr) out.device = options->device;
  if (options->backend != nullptr) out.backend = options->backend;
  if (options->backend_library != nullptr) out.backend_library = options->backend_library;
  if (options->plugin_dir != nullptr) out.plugin_dir = options->plugin_dir;
  out.threads = options->threads;
  const auto has = [&](std::size_t end) { return options->struct_size >= end; };
  if (has(kMemoryKernelEnd) && options->memory_kernel != nullptr) out.memory_kernel = options->memory_kernel;
  if (has(kEngineEnd) && options->engine != nullptr) out.engine = options->engine;
  if (has(kLibrariesEnd) && options->libraries != nullptr) out.libraries = options->libraries;
  if (has(kBatchThreadsEnd)) out.batch_threads = options->batch_threads;
  if (has(kMemoryBudgetEnd)) out.memory_budget = options->memory_budget;
  if (has(kSpillDirEnd) && options->spill_dir != nullptr) out.spill_dir = options->spill_dir;
  if (has(kSessionGuardEnd) && options->guard != nullptr) out.guard = options->guard;
  if (has(kBatchEnd) && options->batch != nullptr) out.batch = options->batch;
  if (has(kExpectSha256End) && options->expect_sha256 != nullptr) out.expect_sha256 = options->expect_sha256;
  if (has(kOperatorsEnd) && options->operators != nullptr) out.operators = options->operators;
  return out;
}

core::Stream* stream_of(const titans_stream* stream, std::size_t index) {
  require_handle(stream, core::text("stream ", index));
  return stream->stream.get();
}

std::vector<core::BatchItem> read_items(const titans_feed* items, std::size_t count) {
  require_array(items, count, "items");
  std::vector<core::BatchItem> out;
  out.reserve(count);
  const std::size_t distance = count == 0 ? 0 : items->struct_size;
  for (std::size_t index = 0; index < count; ++index) {
    const auto* item = reinterpret_cast<const titans_feed*>(reinterpret_cast<const char*>(items) + index * distance);
    require_size(item->struct_size, kFirstFeed, "titans_feed");
    if (item->struct_size != distance || distance % alignof(titans_feed) != 0) {
      throw core::Error(
          TITANS_INVALID_ARGUMENT, "E0501", "batch",
          core::text("expected titans_feed.struct_size of ", distance, " in all items, got ", item->struct_size),
          "set it to sizeof(titans_feed)");
    }
    require_choice(item->which);
    if (item->tokens != nullptr && item->vectors != nullptr) {
      throw core::Error(TITANS_INVALID_ARGUMENT, "E0514", "batch",
                        core::text("item ", index, " has both tokens and vectors"), "leave one NULL");
    }
    if (item->vectors == nullptr) require_array(item->tokens, item->count, core::text("tokens of item ", index));
    out.push_back({stream_of(item->stream, index), item->tokens, item->vectors, item->count, item->which, item->outputs,
                   item->capacity});
  }
  return out;
}

// Runs the items that `read` returns and always sets all statuses.
template <typename Read>
titans_status run_batch(titans_session* session, std::size_t count, titans_status* statuses, Read&& read) noexcept {
  bool told = false;
  const titans_status status = guard([&] {
    require_handle(session, "session");
    const std::vector<core::Failure> outcomes = core::run_batch(*session->session, read());
    for (std::size_t index = 0; statuses != nullptr && index < count; ++index) statuses[index] = outcomes[index].status;
    told = true;
    core::require_success(outcomes);
  });
  if (!told && statuses != nullptr) std::fill_n(statuses, count, status);
  return status;
}

}  // namespace

const char* titans_version(void) { return TITANS_VERSION; }

const char* titans_last_error(void) { return last_failure.text.c_str(); }

const char* titans_last_error_code(void) { return last_failure.code.c_str(); }

titans_status titans_set_log(titans_log_function log, void* user, int32_t level) {
  return guard([&] { core::set_log(log, user, level); });
}

titans_status titans_session_open(const char* path, const titans_session_options* options, titans_session** session) {
  return guard([&] {
    require(session, "session");
    *session = nullptr;
    require(path, "path");
    *session = new titans_session{core::Session::open(path, read_options(options))};
  });
}

void titans_session_close(titans_session* session) { destroy(session); }

const char* titans_session_info(const titans_session* session) {
  return session == nullptr ? "" : session->session->info().c_str();
}

int32_t titans_session_vocab_size(const titans_session* session) {
  if (session == nullptr || session->session->manifest().input_kind != core::InputKind::kTokens) return 0;
  return static_cast<std::int32_t>(session->session->manifest().input_size);  // manifest sizes fit in int32
}

const char* titans_session_input_kind(const titans_session* session) {
  // A string literal, so it ends with NUL.
  return session == nullptr ? "" : core::input_kind_name(session->session->manifest().input_kind).data();
}

size_t titans_session_input_size(const titans_session* session) {
  return session == nullptr ? 0 : session->session->input_size();
}

size_t titans_session_output_size(const titans_session* session) {
  return session == nullptr ? 0 : session->session->output_size();
}

titans_status titans_session_metrics(const titans_session* session, titans_metrics* metrics) {
  return guard([&] {
    require_handle(session, "session");
    require(metrics, "metrics");
    require_size(metrics->struct_size, kFirstMetrics, "titans_metrics");
    session->session->metrics().read(metrics);
  });
}

titans_status titans_session_metrics_text(const titans_session* session, char* text, size_t capacity, size_t* size) {
  return guard([&] {
    require_handle(session, "session");
    require(size, "size");
    require_array(text, capacity, "text");
    const std::string all = session->session->metrics_text();
    *size = all.size() + 1;
    if (capacity == 0) return;
    if (capacity < *size) {
      throw core::Error(TITANS_INVALID_ARGUMENT, "E0507", "metrics",
                        core::text("expected room for ", *size, " bytes, got ", capacity), "pass a larger buffer");
    }
    std::memcpy(text, all.c_str(), *size);
  });
}

titans_status titans_stream_create(titans_session* session, titans_stream** stream) {
  return guard([&] {
    require(stream, "stream");
    *stream = nullptr;
    require_handle(session, "session");
    *stream = new titans_stream{std::make_unique<core::Stream>(session->session)};
  });
}

void titans_stream_destroy(titans_stream* stream) { destroy(stream); }

titans_status titans_stream_fork(const titans_stream* stream, titans_stream** fork) {
  return guard([&] {
    require(fork, "fork");
    *fork = nullptr;
    require_handle(stream, "stream");
    const core::Stream::Use use(*stream->stream);
    *fork = new titans_stream{stream->stream->fork()};
  });
}

titans_status titans_stream_save(const titans_stream* stream, const char* path, const titans_state_options* options) {
  return guard([&] {
    require_handle(stream, "stream");
    require(path, "path");
    const StateOptions read = read_options(options);
    const core::Stream::Use use(*stream->stream);
    std::vector<core::Bytes> copies;
    core::save_state(path, stream->stream->session().state_schema(), stream->stream->view(copies), read.get());
  });
}

titans_status titans_session_restore(titans_session* session, const char* path, const titans_state_options* options,
                                     titans_stream** stream) {
  return guard([&] {
    require(stream, "stream");
    *stream = nullptr;
    require_handle(session, "session");
    require(path, "path");
    const StateOptions read = read_options(options);
    const core::StreamState state = core::load_state(path, session->session->state_schema(), read.get());
    *stream = new titans_stream{std::make_unique<core::Stream>(session->session, state)};
  });
}

titans_status titans_state_read(const char* path, const titans_state_options* options, uint8_t* bytes, size_t capacity,
                                size_t* size) {
  return guard([&] {
    require(size, "size");
    require(path, "path");
    require_array(bytes, capacity, "bytes");
    const StateOptions read = read_options(options);
    const core::Bytes content = core::read_state(path, read.get());
    *size = content.size();
    if (capacity == 0) return;
    require_room(content.size(), capacity, "bytes");
    std::memcpy(bytes, content.data(), content.size());
  });
}

titans_status titans_stream_mark(titans_stream* stream, uint64_t* position) {
  return guard([&] {
    require_handle(stream, "stream");
    const core::Stream::Use use(*stream->stream);
    const std::uint64_t marked = stream->stream->mark();
    if (position != nullptr) *position = marked;
  });
}

titans_status titans_stream_rewind(titans_stream* stream, uint64_t position) {
  return guard([&] {
    require_handle(stream, "stream");
    const core::Stream::Use use(*stream->stream);
    stream->stream->rewind(position);
  });
}

titans_status titans_stream_unmark(titans_stream* stream, uint64_t position) {
  return guard([&] {
    require_handle(stream, "stream");
    const core::Stream::Use use(*stream->stream);
    stream->stream->unmark(position);
  });
}

titans_status titans_stream_marks(const titans_stream* stream, uint64_t* positions, size_t capacity, size_t* count) {
  return guard([&] {
    require_handle(stream, "stream");
    require(count, "count");
    require_array(positions, capacity, "positions");
    const core::Stream::ExclusiveUse exclusive(*stream->stream);
    const std::vector<std::uint64_t> marks = stream->stream->marks();
    *count = marks.size();
    if (capacity == 0) return;
    require_room(marks.size(), capacity, "positions");
    std::copy(marks.begin(), marks.end(), positions);
  });
}

titans_status titans_stream_reset(titans_stream* stream) {
  return guard([&] {
    require_handle(stream, "stream");
    const core::Stream::Use use(*stream->stream);
    stream->stream->reset();
  });
}

titans_status titans_stream_feed(titans_stream* stream, const int32_t* tokens, size_t count, titans_output which,
                                 float* outputs, size_t capacity) {
  return guard([&] {
    require_handle(stream, "stream");
    require_array(tokens, count, "tokens");
    require_choice(which);
    const core::Stream::Use use(*stream->stream);
    stream->stream->feed(tokens, count, which, outputs, capacity);
  });
}

titans_status titans_stream_feed_vectors(titans_stream* stream, const float* vectors, size_t count, titans_output which,
                                         float* outputs, size_t capacity) {
  return guard([&] {
    require_handle(stream, "stream");
    require_array(vectors, count, "vectors");
    require_choice(which);
    const core::Stream::Use use(*stream->stream);
    stream->stream->feed_vectors(vectors, count, which, outputs, capacity);
  });
}

titans_status titans_stream_step(titans_stream* stream, int32_t token, float* outputs) {
  return guard([&] {
    require_handle(stream, "stream");
    const core::Stream::Use use(*stream->stream);
    stream->stream->feed(&token, 1, outputs == nullptr ? TITANS_OUTPUT_NONE : TITANS_OUTPUT_LAST, outputs,
                         stream->stream->session().output_size());
  });
}

titans_status titans_stream_score(titans_stream* stream, const int32_t* tokens, size_t count, float* logprobs) {
  return guard([&] {
    require_handle(stream, "stream");
    require_array(tokens, count, "tokens");
    require_array(logprobs, count, "logprobs");
    const core::Stream::Use use(*stream->stream);
    stream->stream->score(tokens, count, logprobs);
  });
}

titans_status titans_stream_set_learning(titans_stream* stream, int learning) {
  return guard([&] {
    require_handle(stream, "stream");
    const core::Stream::ExclusiveUse exclusive(*stream->stream);
    stream->stream->set_learning(learning != 0);
  });
}

int titans_stream_learning(const titans_stream* stream) {
  return stream != nullptr && stream->stream->learning() ? 1 : 0;
}

uint64_t titans_stream_position(const titans_stream* stream) {
  return stream == nullptr ? 0 : stream->stream->position();
}

void titans_guard_init(titans_guard* guard) {
  if (guard == nullptr) return;
  constexpr float kNone = std::numeric_limits<float>::infinity();
  *guard = {sizeof(titans_guard), TITANS_GUARD_RAISE, kNone, kNone, 0, 1};
}

titans_status titans_stream_set_guard(titans_stream* stream, const titans_guard* limits) {
  return guard([&] {
    require_handle(stream, "stream");
    require(limits, "guard");
    require_size(limits->struct_size, kFirstGuard, "titans_guard");
    const core::Stream::Use use(*stream->stream);
    titans_guard all;
    titans_guard_init(&all);
    all.policy = limits->policy;
    all.max_update_norm = limits->max_update_norm;
    all.max_surprise = limits->max_surprise;
    if (limits->struct_size >= kGuardEnd) {
      all.bundle_limits = limits->bundle_limits;
      all.restart_every = limits->restart_every;
    }
    stream->stream->set_guard(all);
  });
}

titans_status titans_stream_guard_report(const titans_stream* stream, titans_guard_report* report) {
  return guard([&] {
    require_handle(stream, "stream");
    require(report, "report");
    require_size(report->struct_size, kFirstGuardReport, "titans_guard_report");
    const core::Stream::ExclusiveUse exclusive(*stream->stream);
    titans_guard_report all = stream->stream->guard_report();
    all.struct_size = report->struct_size;
    std::memcpy(report, &all, std::min(report->struct_size, sizeof(all)));
  });
}

titans_status titans_stream_health(const titans_stream* stream, titans_health* health) {
  return guard([&] {
    require_handle(stream, "stream");
    require(health, "health");
    require_size(health->struct_size, kFirstHealth, "titans_health");
    const core::Stream::ExclusiveUse exclusive(*stream->stream);
    titans_health all = stream->stream->health();
    all.struct_size = health->struct_size;
    std::memcpy(health, &all, std::min(health->struct_size, sizeof(all)));
  });
}

titans_status titans_stream_peak_norms(const titans_stream* stream, float* norms, size_t capacity) {
  return guard([&] {
    require_handle(stream, "stream");
    const core::Stream::ExclusiveUse exclusive(*stream->stream);
    require_array(norms, capacity, "norms");
    stream->stream->peak_norms(norms, capacity);
  });
}

titans_status titans_stream_set_progress(titans_stream* stream, titans_progress_function progress, void* user) {
  return guard([&] {
    require_handle(stream, "stream");
    const core::Stream::ExclusiveUse exclusive(*stream->stream);
    stream->stream->set_progress(progress, user);
  });
}

titans_status titans_stream_cancel(titans_stream* stream) {
  return guard([&] {
    require_handle(stream, "stream");
    stream->stream->cancel();
  });
}

uint64_t titans_stream_state_bytes(const titans_stream* stream) {
  return stream == nullptr ? 0 : stream->stream->state_bytes();
}

size_t titans_stream_memory_count(const titans_stream* stream) {
  return stream == nullptr ? 0 : stream->stream->session().memories().size();
}

titans_status titans_stream_memory_info(const titans_stream* stream, size_t index, titans_memory_info* info) {
  return guard([&] {
    require_handle(stream, "stream");
    require(info, "info");
    require_memory(stream, index);
    const core::MemoryView& memory = stream->stream->session().memories()[index];
    *info = {memory.name.c_str(), memory.shape.data(), memory.shape.size(), memory.elements};
  });
}

titans_status titans_stream_memory_read(const titans_stream* stream, size_t index, float* values, size_t capacity) {
  return guard([&] {
    require_handle(stream, "stream");
    require(values, "values");
    require_memory(stream, index);
    const core::Stream::Use use(*stream->stream);
    stream->stream->read_memory(index, values, capacity);
  });
}

titans_status titans_session_feed_batch(titans_session* session, const titans_feed* items, size_t count,
                                        titans_status* statuses) {
  return run_batch(session, count, statuses, [&] { return read_items(items, count); });
}

titans_status titans_session_step_batch(titans_session* session, titans_stream* const* streams, const int32_t* tokens,
                                        size_t count, float* outputs, titans_status* statuses) {
  return run_batch(session, count, statuses, [&] {
    require_array(streams, count, "streams");
    require_array(tokens, count, "tokens");
    core::require_input(session->session->manifest(), core::InputKind::kTokens);
    const std::size_t vocab = session->session->output_size();
    std::vector<core::BatchItem> items;
    items.reserve(count);
    for (std::size_t index = 0; index < count; ++index) {
      float* row = outputs == nullptr ? nullptr : outputs + index * vocab;
      items.push_back({stream_of(streams[index], index), tokens + index, nullptr, 1,
                       row == nullptr ? TITANS_OUTPUT_NONE : TITANS_OUTPUT_LAST, row, vocab});
    }
    return items;
  });
}

void titans_sampling_init(titans_sampling* sampling) {
  if (sampling == nullptr) return;
  *sampling = {sizeof(titans_sampling), 1.0F, 0, 1.0F, 0.0F, 0, 64, nullptr, 0};
}

titans_status titans_generator_create(titans_stream* stream, const titans_sampling* sampling,
                                      titans_generator** generator) {
  return guard([&] {
    require(generator, "generator");
    *generator = nullptr;
    require_handle(stream, "stream");
    require(sampling, "sampling");
    require_size(sampling->struct_size, kFirstSampling, "titans_sampling");
    require_array(sampling->stop_tokens, sampling->stop_count, "stop_tokens");
    const core::Stream::ExclusiveUse exclusive(*stream->stream);
    std::vector<std::int32_t> stop(sampling->stop_tokens, sampling->stop_tokens + sampling->stop_count);
    const core::Sampling options{sampling->temperature, sampling->top_k, sampling->top_p, sampling->min_p,
                                 sampling->seed};
    *generator = new titans_generator{{*stream->stream, options, sampling->max_tokens, std::move(stop)}};
  });
}

titans_status titans_generator_next(titans_generator* generator, int32_t* token, int* done) {
  return guard([&] {
    require_handle(generator, "generator");
    require(token, "token");
    require(done, "done");
    const core::Stream::Use use(generator->generator.stream());
    const std::optional<std::int32_t> next = generator->generator.next();
    *done = next ? 0 : 1;
    if (next) *token = *next;
  });
}

void titans_generator_destroy(titans_generator* generator) { destroy(generator); }
