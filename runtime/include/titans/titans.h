/* titans.h: the C interface. Runs Titans models, whose memory learns at inference, on a device.
 *
 * Handles are opaque. A function that can fail returns a titans_status; titans_last_error() has the text of the last
 * failure on the calling thread. No function throws or aborts on bad input. A failed call leaves its stream unchanged.
 *
 * Threads: any number of threads may use a session. A stream and its generators belong to one thread at a time; a call
 * on a stream that is in use returns TITANS_INVALID_ARGUMENT.
 * Ownership: the creator destroys. A session lives until its last stream is destroyed, so the order of the two is free.
 * Destroy a generator before its stream. Destroying NULL does nothing.
 * Sizes: `capacity` counts elements, not bytes, unless the function says otherwise. Floats are float32.
 * docs/concepts.md defines the terms.
 */
#ifndef TITANS_TITANS_H_
#define TITANS_TITANS_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(TITANS_BUILDING_LIBRARY)
#define TITANS_API __declspec(dllexport)
#elif defined(_WIN32)
#define TITANS_API __declspec(dllimport)
#else
#define TITANS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum titans_status {
  TITANS_OK = 0,
  TITANS_FAILED = 1,           /* damaged bundle, input/output error, backend failure */
  TITANS_INVALID_ARGUMENT = 2, /* token out of range, NULL, wrong option */
  TITANS_UNSUPPORTED = 4,      /* not possible on this machine: no backend library, unknown device, other schema */
  TITANS_CANCELLED = 5         /* ended by titans_stream_cancel or a progress function */
} titans_status;

typedef struct titans_session titans_session;
typedef struct titans_stream titans_stream;
typedef struct titans_generator titans_generator;

/* The version of this header. */
#define TITANS_VERSION_MAJOR 0
#define TITANS_VERSION_MINOR 1
#define TITANS_VERSION_PATCH 0

/* The version of the library, such as "0.1.0". */
TITANS_API const char* titans_version(void);

/* Text of the last failure on this thread, "" if none: "[where] problem. Fix: what to do (TITANS-E0204)", one line.
 * Valid until the next failure on this thread. */
TITANS_API const char* titans_last_error(void);

/* Code of the last failure on this thread, such as "TITANS-E0204", "" if none. docs/errors.md lists the codes. Valid
 * until the next failure on this thread. */
TITANS_API const char* titans_last_error_code(void);

/* ---- log ---- */

typedef enum titans_log_level {
  TITANS_LOG_ERROR = 1,   /* a call that consumes tokens failed */
  TITANS_LOG_WARNING = 2, /* a guard rolled a chunk back; a stream could not be spilled */
  TITANS_LOG_INFO = 3,    /* a session was opened */
  TITANS_LOG_DEBUG = 4    /* a call was cancelled */
} titans_log_level;

/* Receives one message, a line "[where] ...", valid during the call. Called from any thread, one at a time. The
 * function may call this library except titans_set_log; messages caused by it are dropped. */
typedef void (*titans_log_function)(void* user, int32_t level, const char* message);

/* Sets the log function of the whole library for messages of `level` and more severe ones. NULL, the default: no log.
 * After the return the previous function is not called again. `user` is passed to the function; the caller owns it.
 * TITANS_INVALID_ARGUMENT: `level` is not a titans_log_level. */
TITANS_API titans_status titans_set_log(titans_log_function log, void* user, int32_t level);

/* Option structs may grow at their end. Set struct_size to sizeof the struct. Structs of every earlier version are
 * accepted: missing fields have their default. Fields of a later version are ignored. */

/* ---- sessions: a loaded bundle ---- */

typedef struct titans_session_options {
  size_t struct_size;          /* sizeof(titans_session_options) */
  const char* device;          /* "cpu", "cuda" or "cuda:N"; NULL: "cpu" */
  const char* backend;         /* "onnxruntime", "tensorrt" or "tensorrt_rtx"; NULL: chosen by engine and device */
  const char* backend_library; /* path of the vendor library, such as libonnxruntime.so.1; NULL: see docs/runtime.md */
  const char* plugin_dir;      /* folder of our backend libraries; NULL: the folder of this library */
  int32_t threads;             /* threads inside one call; 0: the backend's default */
  const char* memory_kernel;   /* "auto": our kernel if its library is installed; "require": our kernel or failure;
                                  "off": the standard operators of the graphs; NULL: "auto" */
  const char* engine;          /* name of an engine in the bundle, or "none" for the plain graphs; NULL: the best engine
                                  that fits the device, see docs/runtime.md */
  const char* libraries;       /* lines MODULE=PATH, such as "tensorrt_rtx=/path/libtensorrt_rtx.so.1", for vendor
                                  libraries without backend_library or environment variable; may be NULL */
  int32_t batch_threads;       /* threads of titans_session_step_batch and titans_session_feed_batch, the calling one
                                  included; 0: one per processor. Each uses `threads` of its own, see docs/streams.md */
  uint64_t memory_budget;      /* bytes of memory for the state of all streams; other streams are spilled to spill_dir.
                                  0: no limit */
  const char* spill_dir;       /* existing folder for spilled streams; required with memory_budget, else may be NULL */
  const char* guard;           /* the guard of new and restored streams: "bundle", the bundle's limits and policy, if it
                                  has any; "off"; or a policy with the bundle's limits: "raise", "freeze", "skip",
                                  "rewind", "decay", "restart"; NULL: "bundle" */
  const char* batch;           /* "exact": a stream's results in a batch are those of a call of its own, bit for bit;
                                  "fast": streams share graph calls if bundle and backend allow it, and results differ by
                                  rounding; NULL: "exact"; see docs/streams.md */
  const char* expect_sha256;   /* SHA-256 of the bundle, 64 hexadecimal digits, as titans-export inspect prints it; with
                                  another one the session does not open. All files are read. NULL: any bundle */
  const char* operators;       /* "known": graphs may have only the operators that titans-export writes; "any": other
                                  operators too, which ONNX Runtime may run without checking their inputs, so only for
                                  bundles of your own; NULL: "known" */
} titans_session_options;

/* Opens the bundle at `path`, a folder. `options` may be NULL. Close the session with titans_session_close. */
TITANS_API titans_status titans_session_open(const char* path, const titans_session_options* options,
                                             titans_session** session);
TITANS_API void titans_session_close(titans_session* session);

/* Properties of the session as one JSON object: bundle, model, device, device_name, engine (name, or null for the plain
 * graphs), engine_reason, engines_not_chosen (name, reason), backend, backend_version, memory_kernel (our kernel, such
 * as "cpu-avx512", or "standard-operators"), input and output (kind, name, dtype, size), vocab_size (null without
 * tokens), graphs (name, tokens, stride, offsets), state (name, role, dtype, shape, in_place, fields: name to kind),
 * tokenizer, batch (mode, streams_per_call), guard (policy, restart_every: of new streams), details (of the backend).
 * Valid as long as the session. */
TITANS_API const char* titans_session_info(const titans_session* session);

/* "tokens" (the outputs are logits) or "vectors" (the outputs are vectors). */
TITANS_API const char* titans_session_input_kind(const titans_session* session);
/* Floats of one input vector and of one output row. With tokens both are the vocabulary size. */
TITANS_API size_t titans_session_input_size(const titans_session* session);
TITANS_API size_t titans_session_output_size(const titans_session* session);
/* Vocabulary size; 0 for a bundle that takes vectors. */
TITANS_API int32_t titans_session_vocab_size(const titans_session* session);

/* ---- metrics: docs/guard.md ---- */

/* Durations of successful calls. Quantiles have a relative error of at most 1/16. */
typedef struct titans_durations {
  uint64_t count;
  double sum_seconds;
  double p50_seconds;
  double p90_seconds;
  double p99_seconds;
  double max_seconds;
} titans_durations;

typedef struct titans_metrics {
  size_t struct_size;      /* sizeof(titans_metrics); at most this much is written */
  uint64_t streams;        /* open streams */
  uint64_t tokens;         /* tokens or vectors consumed by successful calls */
  uint64_t calls;          /* feeds, steps, scores and draws that started to run */
  uint64_t chunk_updates;  /* completed chunks, counted per memory */
  uint64_t rollbacks;      /* chunks that a guard rolled back */
  uint64_t cancelled;      /* cancelled calls */
  uint64_t failed;         /* failed calls */
  uint64_t spilled;        /* streams written to spill files */
  uint64_t restored;       /* streams read back from spill files */
  uint64_t state_bytes;    /* state of all open streams */
  uint64_t resident_bytes; /* the part of state_bytes in memory */
  titans_durations step;   /* calls of one token */
  titans_durations feed;   /* calls of several tokens */
  uint64_t diverging;      /* open streams whose memory diverges now */
  uint64_t divergences;    /* times that a stream's memory began to diverge */
  uint64_t repairs;        /* times that a guard set a memory back */
} titans_metrics;

/* Writes the session's counters to *metrics. Any thread may call it; counters that change meanwhile may disagree.
 * TITANS_INVALID_ARGUMENT: NULL, or metrics->struct_size too small. */
TITANS_API titans_status titans_session_metrics(const titans_session* session, titans_metrics* metrics);
/* Writes the counters to `text` in Prometheus' text format, NUL-terminated; each sample has the label bundle, the name
 * of the folder. *size gets the bytes needed, NUL included; with capacity 0 (`text` may be NULL) nothing else is
 * written. The text grows with the counters, so allocate more than *size. TITANS_INVALID_ARGUMENT: `capacity` is too
 * small; only *size is written. */
TITANS_API titans_status titans_session_metrics_text(const titans_session* session, char* text, size_t capacity,
                                                     size_t* size);

/* ---- streams: one sequence and the memory it has learned ---- */

/* The outputs that a feed writes: logits, or vectors of a bundle that takes vectors. */
typedef enum titans_output {
  TITANS_OUTPUT_NONE = 0, /* nothing */
  TITANS_OUTPUT_LAST = 1, /* after the last token, (output_size) */
  TITANS_OUTPUT_ALL = 2   /* after each token, (count, output_size) */
} titans_output;

/* Creates a stream at position 0 with a fresh memory. Destroy it with titans_stream_destroy. */
TITANS_API titans_status titans_stream_create(titans_session* session, titans_stream** stream);
TITANS_API void titans_stream_destroy(titans_stream* stream);

/* Creates a second, independent stream with the same state. */
TITANS_API titans_status titans_stream_fork(const titans_stream* stream, titans_stream** fork);

/* ---- state files and marks: docs/state.md ---- */

typedef struct titans_state_options {
  size_t struct_size; /* sizeof(titans_state_options) */
  const uint8_t* key; /* AES-256-GCM key that encrypts or decrypts; read during the call; NULL: no encryption */
  size_t key_bytes;   /* 32; 0 without a key */
} titans_state_options;

/* Writes the stream to the file `path`, NAME.tstate. The new file is flushed to disk and renamed into place atomically;
 * after a failure or a crash the previous file is intact. `options` may be NULL. The stream does not change.
 * TITANS_FAILED: the file cannot be written. TITANS_UNSUPPORTED: a key, but no libcrypto on this machine.
 * TITANS_INVALID_ARGUMENT: NULL, an empty path, a key of another length. */
TITANS_API titans_status titans_stream_save(const titans_stream* stream, const char* path,
                                            const titans_state_options* options);

/* Creates a stream that continues where the saved one was, with its position, learning flag and memory. The caller
 * destroys it. TITANS_FAILED: missing, truncated or altered file, state of another model, wrong key, or a key for a
 * file without encryption. TITANS_UNSUPPORTED: another schema, or an encrypted file without libcrypto.
 * TITANS_INVALID_ARGUMENT: NULL, or no key for an encrypted file. */
TITANS_API titans_status titans_session_restore(titans_session* session, const char* path,
                                                const titans_state_options* options, titans_stream** stream);

/* Writes the state file at `path`, verified and decrypted, to `bytes` as a safetensors file. Needs no session. *size
 * gets the bytes needed; with capacity 0 (`bytes` may be NULL) nothing else is written. Errors as for
 * titans_session_restore except those of the model. TITANS_INVALID_ARGUMENT: `capacity` is too small; only *size is
 * written. */
TITANS_API titans_status titans_state_read(const char* path, const titans_state_options* options, uint8_t* bytes,
                                           size_t capacity, size_t* size);

/* Keeps a copy of the stream's state in host memory as a mark at the current position; it counts in
 * titans_stream_state_bytes. Replaces an earlier mark at the same position. `position` may be NULL. Forks and files
 * contain no marks. */
TITANS_API titans_status titans_stream_mark(titans_stream* stream, uint64_t* position);
/* Restores the state of the mark at `position` exactly, the learning flag included. Later marks are removed.
 * TITANS_INVALID_ARGUMENT: no mark at `position`. */
TITANS_API titans_status titans_stream_rewind(titans_stream* stream, uint64_t position);
/* Wipes and frees the mark at `position`. TITANS_INVALID_ARGUMENT: no mark at `position`. */
TITANS_API titans_status titans_stream_unmark(titans_stream* stream, uint64_t position);
/* Writes the positions of all marks to `positions`, ascending. *count gets their number; with capacity 0 (`positions`
 * may be NULL) nothing else is written. TITANS_INVALID_ARGUMENT: `capacity` is too small; only *count is written. */
TITANS_API titans_status titans_stream_marks(const titans_stream* stream, uint64_t* positions, size_t capacity,
                                             size_t* count);

/* Resets the stream to position 0 with a fresh memory. The learning flag stays; marks are removed. */
TITANS_API titans_status titans_stream_reset(titans_stream* stream);

/* Consumes `count` >= 0 tokens in [0, vocab_size). Writes the logits selected by `which` to `outputs`, which has room
 * for `capacity` floats. TITANS_OUTPUT_LAST with count = 0 needs an earlier token. All tokens are checked before the
 * first is consumed. If the backend fails, the stream is restored to its state before the call. */
TITANS_API titans_status titans_stream_feed(titans_stream* stream, const int32_t* tokens, size_t count,
                                            titans_output which, float* outputs, size_t capacity);

/* titans_stream_feed for a bundle that takes vectors: `vectors` is (count, input_size). TITANS_INVALID_ARGUMENT: NaN or
 * infinity, checked before the first vector is consumed. On such a bundle titans_stream_feed, _step, _score and
 * generators return TITANS_INVALID_ARGUMENT, as this function does on other bundles. */
TITANS_API titans_status titans_stream_feed_vectors(titans_stream* stream, const float* vectors, size_t count,
                                                    titans_output which, float* outputs, size_t capacity);

/* Consumes one token and writes the logits after it, (vocab_size), to `outputs`, which may be NULL. */
TITANS_API titans_status titans_stream_step(titans_stream* stream, int32_t token, float* outputs);

/* Consumes `count` tokens and writes ln p(token i | all tokens before it) to logprobs[i], (count). At position 0 the
 * first token is scored as uniform, -ln(vocab_size). TITANS_FAILED: logits with NaN or without a finite maximum; the
 * stream is unchanged. */
TITANS_API titans_status titans_stream_score(titans_stream* stream, const int32_t* tokens, size_t count,
                                             float* logprobs);

/* 1, the default: the memory learns. 0: the memory is frozen; W and S do not change. Effective with the next token. */
TITANS_API titans_status titans_stream_set_learning(titans_stream* stream, int learning);
TITANS_API int titans_stream_learning(const titans_stream* stream);

/* Tokens or vectors consumed. */
TITANS_API uint64_t titans_stream_position(const titans_stream* stream);

/* ---- guard: limits on chunk updates, docs/guard.md ---- */

typedef enum titans_guard_policy {
  TITANS_GUARD_OFF = 0,    /* no checks; the default of a bundle without a policy */
  TITANS_GUARD_RAISE = 1,  /* the call fails with TITANS_FAILED; the stream is unchanged */
  TITANS_GUARD_FREEZE = 2, /* the chunk is consumed with a frozen memory; learning is switched off */
  TITANS_GUARD_SKIP = 3,   /* the chunk is consumed with a frozen memory; learning continues after it */
  TITANS_GUARD_REWIND = 4, /* as SKIP; then every memory returns to the last healthy mark */
  TITANS_GUARD_DECAY = 5,  /* as SKIP; then every memory goes half of the way back to the initial memory */
  TITANS_GUARD_RESTART = 6 /* as SKIP; then every memory is reset */
} titans_guard_policy;

typedef struct titans_guard {
  size_t struct_size;     /* sizeof(titans_guard) */
  int32_t policy;         /* a titans_guard_policy */
  float max_update_norm;  /* above 0: limit of ||W' - W|| / ||W|| per chunk, layer and head; infinity: no limit */
  float max_surprise;     /* above 0: limit of ||S|| per chunk, layer and head; infinity: no limit */
  uint64_t restart_every; /* every memory is reset after each so many tokens of the stream; 0: never */
  int32_t bundle_limits;  /* 1: the limits of norms in the bundle count too; 0: they do not */
} titans_guard;

/* Fills in the defaults: RAISE on NaN and infinity, the limits in the bundle and no others, no restarts. */
TITANS_API void titans_guard_init(titans_guard* guard);

/* Sets the guard from the next call on and clears the report. The stream keeps the memory of one more state, also after
 * the guard is switched off. Forks inherit the guard. TITANS_INVALID_ARGUMENT: unknown policy, limit not above 0. */
TITANS_API titans_status titans_stream_set_guard(titans_stream* stream, const titans_guard* guard);

typedef enum titans_guard_reason {
  TITANS_GUARD_GOOD = 0,        /* no violation */
  TITANS_GUARD_NOT_FINITE = 1,  /* NaN or infinity in W or S */
  TITANS_GUARD_UPDATE_NORM = 2, /* above max_update_norm */
  TITANS_GUARD_SURPRISE = 3,    /* above max_surprise */
  TITANS_GUARD_OUTPUT = 4,      /* logits with NaN or without a finite maximum; vectors that are not finite */
  TITANS_GUARD_CALL = 5,        /* a graph failed while the memory learned (not with RAISE) */
  TITANS_GUARD_NORM = 6         /* the norm of a field is above its limit in the bundle */
} titans_guard_reason;

/* Results of the guard since it was set, failed calls included. */
typedef struct titans_guard_report {
  size_t struct_size;     /* sizeof(titans_guard_report); at most this much is written */
  uint64_t rollbacks;     /* chunks with a violation */
  uint64_t position;      /* position after the last such chunk */
  int32_t reason;         /* of the last violation: a titans_guard_reason */
  int32_t layer;          /* of the last violation: index of the memory in the manifest's order; -1: none */
  int32_t head;           /* of the last violation; -1: none */
  float update_norm;      /* of the last such chunk: the largest of its layers and heads; may be NaN */
  float surprise;         /* of the last such chunk: the largest of its layers and heads; may be NaN */
  uint64_t chunks;        /* checked chunks, counted per memory */
  float peak_update_norm; /* the largest of all chunks that were checked alone without a violation */
  float peak_surprise;    /* the largest of all chunks that were checked alone without a violation */
  const char* field;      /* NORM: the field, such as "layers.0.memory.W0", valid as long as the session; else NULL */
  float value;            /* NORM: its norm; else 0 */
  float limit;            /* NORM: its limit; else 0 */
  uint64_t repairs;       /* times that the memory was set back: by REWIND, DECAY, RESTART and restart_every */
} titans_guard_report;

/* Writes the report to *report. report->struct_size must be set. */
TITANS_API titans_status titans_stream_guard_report(const titans_stream* stream, titans_guard_report* report);

/* ---- health: whether the memory diverges, docs/guard.md ---- */

typedef enum titans_health_state {
  TITANS_HEALTHY = 0,
  TITANS_DIVERGING = 1 /* a norm of the memory is far above those that calibration saw, or not finite */
} titans_health_state;

typedef struct titans_health {
  size_t struct_size;   /* sizeof(titans_health); at most this much is written */
  int32_t state;        /* at the last check: a titans_health_state */
  uint64_t divergences; /* times that the memory began to diverge; those that a guard prevented do not count */
  uint64_t position;    /* of the check that found the last divergence; 0 without one */
  const char* field; /* of the last divergence: such as "layers.0.memory.W0", valid as long as the session, or NULL */
  int32_t layer;     /* of the last divergence: index of the memory in the manifest's order; -1: none */
  int32_t head;      /* of the last divergence; -1: none */
  float value;       /* of the last divergence: the field's norm when it was found */
  float limit;       /* of the last divergence: the norm above which the memory counts as diverging */
  uint64_t checks;   /* checks so far */
} titans_health;

/* Writes the stream's health to *health. health->struct_size must be set. Streams are checked without a guard too. */
TITANS_API titans_status titans_stream_health(const titans_stream* stream, titans_health* health);

/* Writes the largest norm that checks have seen to norms[i], (titans_stream_memory_count): of field i of
 * titans_stream_memory_info, over all its elements, the largest of all heads. -1 for fields other than W and S. */
TITANS_API titans_status titans_stream_peak_norms(const titans_stream* stream, float* norms, size_t capacity);

/* ---- progress and cancellation ---- */

/* Called after each graph, with the tokens consumed so far and in total, on the thread of the call or a batch thread.
 * A result other than 0 ends the call with TITANS_CANCELLED; the stream is unchanged. The function must not use the
 * stream. */
typedef int (*titans_progress_function)(void* user, uint64_t done, uint64_t total);

/* Sets the progress function of all later calls on this stream; NULL, the default: none. Forks have none. `user` is
 * passed to the function; the caller owns it. */
TITANS_API titans_status titans_stream_set_progress(titans_stream* stream, titans_progress_function progress,
                                                    void* user);

/* Ends the running call before its next graph with TITANS_CANCELLED; the stream is unchanged. Any thread may call it
 * while the stream lives. A call without further graphs succeeds. Without a running call nothing happens. */
TITANS_API titans_status titans_stream_cancel(titans_stream* stream);

/* Bytes of state owned by the stream, all buffers and marks included. Independent of the number of tokens consumed. */
TITANS_API uint64_t titans_stream_state_bytes(const titans_stream* stream);

/* A field of a memory, such as "layers.0.memory.W0", as float32 of shape (1, heads, rows, columns), at the last
 * complete chunk. `name` and `shape` are valid as long as the session. */
typedef struct titans_memory_info {
  const char* name;
  const int64_t* shape;
  size_t rank;
  size_t elements;
} titans_memory_info;

TITANS_API size_t titans_stream_memory_count(const titans_stream* stream);
TITANS_API titans_status titans_stream_memory_info(const titans_stream* stream, size_t index, titans_memory_info* info);
TITANS_API titans_status titans_stream_memory_read(const titans_stream* stream, size_t index, float* values,
                                                   size_t capacity);

/* ---- batches: many streams in one call ---- */

/* The input of one stream of a batch. */
typedef struct titans_feed {
  size_t struct_size;    /* sizeof(titans_feed), the same for all items of a batch */
  titans_stream* stream; /* of the session, at most once per batch */
  const int32_t* tokens; /* as for titans_stream_feed; NULL with vectors */
  const float* vectors;  /* as for titans_stream_feed_vectors; NULL with tokens */
  size_t count;          /* tokens or vectors; may be 0 */
  titans_output which;
  float* outputs;  /* (output_size), (count, output_size) or NULL, as `which` selects */
  size_t capacity; /* floats at `outputs` */
} titans_feed;

/* Feeds `count` >= 0 streams, each with its own sequence and position, on batch_threads threads. With the session's
 * option batch "exact", each stream gets exactly the result of a call of its own. A stream that fails is unchanged, its
 * outputs are undefined, and the others continue. `statuses`, (count) or NULL, gets the status of each; the call
 * returns the first failure, with its text. TITANS_INVALID_ARGUMENT: NULL, a stream of another session, a stream twice,
 * a wrong size or choice; then no stream has run, and every status is this one. The caller owns the items and their
 * arrays. Several threads may call it with different streams. */
TITANS_API titans_status titans_session_feed_batch(titans_session* session, const titans_feed* items, size_t count,
                                                   titans_status* statuses);

/* Feeds tokens[i] to streams[i] and writes the logits after it to row i of `outputs`, (count, vocab_size) or NULL.
 * TITANS_INVALID_ARGUMENT also on a bundle that takes vectors. */
TITANS_API titans_status titans_session_step_batch(titans_session* session, titans_stream* const* streams,
                                                   const int32_t* tokens, size_t count, float* outputs,
                                                   titans_status* statuses);

/* ---- generation ---- */

typedef struct titans_sampling {
  size_t struct_size;         /* sizeof(titans_sampling) */
  float temperature;          /* 0: always the top-1 token */
  int32_t top_k;              /* 0: off */
  float top_p;                /* 1: off */
  float min_p;                /* 0: off; else keeps tokens with p >= min_p * max p */
  uint64_t seed;              /* the same seed and logits give the same tokens on every machine */
  int64_t max_tokens;         /* < 0: no limit */
  const int32_t* stop_tokens; /* generation ends before one of these is consumed; copied */
  size_t stop_count;
} titans_sampling;

/* Fills in the defaults: temperature 1, no filters, at most 64 tokens. */
TITANS_API void titans_sampling_init(titans_sampling* sampling);

/* Creates a generator. The filters apply in the order top_k, top_p, min_p to the distribution after temperature.
 * TITANS_INVALID_ARGUMENT: the stream has not consumed a token, or a sampling option is out of range. */
TITANS_API titans_status titans_generator_create(titans_stream* stream, const titans_sampling* sampling,
                                                 titans_generator** generator);
/* Draws a token from the stream's last logits, feeds it to the stream, and writes it to *token; *done = 0. At the end
 * *done = 1 without a token. The stream has then consumed exactly the returned tokens. TITANS_INVALID_ARGUMENT: the
 * stream was reset and has consumed nothing since. TITANS_FAILED: logits that titans_stream_score refuses. */
TITANS_API titans_status titans_generator_next(titans_generator* generator, int32_t* token, int* done);
TITANS_API void titans_generator_destroy(titans_generator* generator);

#ifdef __cplusplus
}
#endif
#endif /* TITANS_TITANS_H_ */
