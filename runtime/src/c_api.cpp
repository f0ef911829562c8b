// The C interface: checks pointers, turns exceptions into statuses, and nothing else.
#include "titans/titans.h"

#include <cstddef>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "generator.h"
#include "session.h"
#include "stream.h"

namespace core = titans::core;

struct titans_session {
  std::shared_ptr<core::Session> session;
};

struct titans_stream {
  std::unique_ptr<core::Stream> stream;
};

struct titans_generator {
  core::Generator generator;
};

namespace {

thread_local std::string last_error;

titans_status fail(titans_status status, const char* message) noexcept {
  try {
    last_error = core::one_line(message);
  } catch (...) {
    last_error.clear();  // no memory for the text; the status still tells
  }
  return status;
}

template <typename Body>
titans_status guard(Body&& body) noexcept {
  try {
    body();
    return TITANS_OK;
  } catch (const core::Error& error) {
    return fail(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return fail(TITANS_FAILED, "[titans] expected memory but got none; do free some, or open fewer streams");
  } catch (const std::exception& error) {
    return fail(TITANS_FAILED, error.what());
  } catch (...) {
    return fail(TITANS_FAILED, "[titans] expected no such failure but got one of unknown kind; do report it");
  }
}

void require(const void* pointer, std::string_view name) {
  if (pointer == nullptr) {
    throw core::Error(TITANS_INVALID_ARGUMENT, "titans", core::text("a pointer for ", name), "NULL", "pass one");
  }
}

// A null pointer is right for an empty array.
void require_array(const void* pointer, std::size_t count, std::string_view name) {
  if (count > 0) require(pointer, name);
}

// Where a struct of the first version ends. Smaller ones have never been; of larger ones what is not known is not read.
// A field that a later version adds is read only where struct_size covers it, and has its default elsewhere.
constexpr std::size_t kFirstSessionOptions = offsetof(titans_session_options, threads) + sizeof(std::int32_t);
constexpr std::size_t kMemoryKernelEnd = offsetof(titans_session_options, memory_kernel) + sizeof(const char*);
constexpr std::size_t kEngineEnd = offsetof(titans_session_options, engine) + sizeof(const char*);
constexpr std::size_t kLibrariesEnd = offsetof(titans_session_options, libraries) + sizeof(const char*);
constexpr std::size_t kFirstSampling = offsetof(titans_sampling, stop_count) + sizeof(std::size_t);

void require_size(std::size_t got, std::size_t least, std::string_view name) {
  if (got < least) {
    throw core::Error(TITANS_INVALID_ARGUMENT, "titans", core::text(name, ".struct_size of at least ", least),
                      core::text(got), "set it to sizeof");
  }
}

void require_choice(titans_logits which) {
  if (which == TITANS_LOGITS_NONE || which == TITANS_LOGITS_LAST || which == TITANS_LOGITS_ALL) return;
  throw core::Error(TITANS_INVALID_ARGUMENT, "stream", "which logits as a titans_logits",
                    core::text(static_cast<int>(which)), "pass a value of that enumeration");
}

void require_memory(const titans_stream* stream, std::size_t index) {
  const std::size_t count = stream->stream->session().memories().size();
  if (index >= count) {
    throw core::Error(TITANS_INVALID_ARGUMENT, "stream", core::text("a memory index below ", count), core::text(index),
                      "ask titans_stream_memory_count");
  }
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
  return out;
}

}  // namespace

const char* titans_version(void) { return TITANS_VERSION; }

const char* titans_last_error(void) { return last_error.c_str(); }

titans_status titans_session_open(const char* path, const titans_session_options* options, titans_session** session) {
  return guard([&] {
    require(session, "session");
    *session = nullptr;
    require(path, "path");
    *session = new titans_session{core::Session::open(path, read_options(options))};
  });
}

void titans_session_close(titans_session* session) { delete session; }

const char* titans_session_info(const titans_session* session) {
  return session == nullptr ? "" : session->session->info().c_str();
}

int32_t titans_session_vocab_size(const titans_session* session) {
  if (session == nullptr || session->session->manifest().input_kind != core::InputKind::kTokens) return 0;
  return static_cast<std::int32_t>(session->session->manifest().input_size);  // the manifest's fit
}

const char* titans_session_input_kind(const titans_session* session) {
  // A literal, which ends with NUL.
  return session == nullptr ? "" : core::input_kind_name(session->session->manifest().input_kind).data();
}

size_t titans_session_input_size(const titans_session* session) {
  return session == nullptr ? 0 : session->session->input_size();
}

size_t titans_session_output_size(const titans_session* session) {
  return session == nullptr ? 0 : session->session->output_size();
}

titans_status titans_stream_create(titans_session* session, titans_stream** stream) {
  return guard([&] {
    require(stream, "stream");
    *stream = nullptr;
    require(session, "session");
    *stream = new titans_stream{std::make_unique<core::Stream>(session->session)};
  });
}

void titans_stream_destroy(titans_stream* stream) { delete stream; }

titans_status titans_stream_fork(const titans_stream* stream, titans_stream** fork) {
  return guard([&] {
    require(fork, "fork");
    *fork = nullptr;
    require(stream, "stream");
    *fork = new titans_stream{stream->stream->fork()};
  });
}

titans_status titans_stream_reset(titans_stream* stream) {
  return guard([&] {
    require(stream, "stream");
    stream->stream->reset();
  });
}

titans_status titans_stream_feed(titans_stream* stream, const int32_t* tokens, size_t count, titans_logits which,
                                 float* logits, size_t capacity) {
  return guard([&] {
    require(stream, "stream");
    require_array(tokens, count, "tokens");
    require_choice(which);
    stream->stream->feed(tokens, count, which, logits, capacity);
  });
}

titans_status titans_stream_feed_vectors(titans_stream* stream, const float* vectors, size_t count, titans_logits which,
                                         float* outputs, size_t capacity) {
  return guard([&] {
    require(stream, "stream");
    require_array(vectors, count, "vectors");
    require_choice(which);
    stream->stream->feed_vectors(vectors, count, which, outputs, capacity);
  });
}

titans_status titans_stream_step(titans_stream* stream, int32_t token, float* logits) {
  return guard([&] {
    require(stream, "stream");
    stream->stream->feed(&token, 1, logits == nullptr ? TITANS_LOGITS_NONE : TITANS_LOGITS_LAST, logits,
                         stream->stream->session().output_size());
  });
}

titans_status titans_stream_score(titans_stream* stream, const int32_t* tokens, size_t count, float* logprobs) {
  return guard([&] {
    require(stream, "stream");
    require_array(tokens, count, "tokens");
    require_array(logprobs, count, "logprobs");
    stream->stream->score(tokens, count, logprobs);
  });
}

titans_status titans_stream_set_learning(titans_stream* stream, int learning) {
  return guard([&] {
    require(stream, "stream");
    stream->stream->set_learning(learning != 0);
  });
}

int titans_stream_learning(const titans_stream* stream) {
  return stream != nullptr && stream->stream->learning() ? 1 : 0;
}

uint64_t titans_stream_position(const titans_stream* stream) {
  return stream == nullptr ? 0 : stream->stream->position();
}

uint64_t titans_stream_state_bytes(const titans_stream* stream) {
  return stream == nullptr ? 0 : stream->stream->state_bytes();
}

size_t titans_stream_memory_count(const titans_stream* stream) {
  return stream == nullptr ? 0 : stream->stream->session().memories().size();
}

titans_status titans_stream_memory_info(const titans_stream* stream, size_t index, titans_memory_info* info) {
  return guard([&] {
    require(stream, "stream");
    require(info, "info");
    require_memory(stream, index);
    const core::MemoryView& memory = stream->stream->session().memories()[index];
    *info = {memory.name.c_str(), memory.shape.data(), memory.shape.size(), memory.elements};
  });
}

titans_status titans_stream_memory_read(const titans_stream* stream, size_t index, float* values, size_t capacity) {
  return guard([&] {
    require(stream, "stream");
    require(values, "values");
    require_memory(stream, index);
    stream->stream->read_memory(index, values, capacity);
  });
}

void titans_sampling_init(titans_sampling* sampling) {
  if (sampling == nullptr) return;
  *sampling = {sizeof(titans_sampling), 1.0F, 0, 1.0F, 0.0F, 0, -1, nullptr, 0};
}

titans_status titans_generator_create(titans_stream* stream, const titans_sampling* sampling,
                                      titans_generator** generator) {
  return guard([&] {
    require(generator, "generator");
    *generator = nullptr;
    require(stream, "stream");
    require(sampling, "sampling");
    require_size(sampling->struct_size, kFirstSampling, "titans_sampling");
    require_array(sampling->stop_tokens, sampling->stop_count, "stop_tokens");
    std::vector<std::int32_t> stop(sampling->stop_tokens, sampling->stop_tokens + sampling->stop_count);
    const core::Sampling options{sampling->temperature, sampling->top_k, sampling->top_p, sampling->min_p,
                                 sampling->seed};
    *generator = new titans_generator{{*stream->stream, options, sampling->max_tokens, std::move(stop)}};
  });
}

titans_status titans_generator_next(titans_generator* generator, int32_t* token, int* done) {
  return guard([&] {
    require(generator, "generator");
    require(token, "token");
    require(done, "done");
    const std::optional<std::int32_t> next = generator->generator.next();
    *done = next ? 0 : 1;
    if (next) *token = *next;
  });
}

void titans_generator_destroy(titans_generator* generator) { delete generator; }
