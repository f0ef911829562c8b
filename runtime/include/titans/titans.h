/* titans.h: run Titans models on a device. C interface.
 *
 * Handles are opaque. Every function that can fail returns a titans_status; the text of the last failure on the calling
 * thread is titans_last_error(). No function throws or aborts on bad input. A failed call leaves its stream unchanged.
 *
 * Threads: a session may be used from any number of threads at once. A stream, generator or anything else made from a
 * stream belongs to one thread at a time; a call on a stream that another call is in is TITANS_INVALID_ARGUMENT.
 * Ownership: who creates destroys. A session stays alive inside until its last stream is destroyed, so the two may be
 * destroyed in any order. A generator must be destroyed before its stream. Destroying NULL does nothing.
 */
#ifndef TITANS_TITANS_H_
#define TITANS_TITANS_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define TITANS_API __declspec(dllexport)
#else
#define TITANS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum titans_status {
  TITANS_OK = 0,
  TITANS_FAILED = 1,           /* could not do it: damaged bundle, input/output error, backend failure */
  TITANS_INVALID_ARGUMENT = 2, /* the caller's argument is wrong: token out of range, NULL, bad option */
  TITANS_UNSUPPORTED = 4,      /* this machine cannot: backend library missing, unknown device, newer schema */
  TITANS_CANCELLED = 5         /* titans_stream_cancel or a progress function ended the call */
} titans_status;

typedef struct titans_session titans_session;
typedef struct titans_stream titans_stream;
typedef struct titans_generator titans_generator;

/* "0.1.0" */
TITANS_API const char* titans_version(void);

/* Text of the last failure on this thread, "" if none. Valid until the next failing call on this thread. */
TITANS_API const char* titans_last_error(void);

/* ---- log ---- */

typedef enum titans_log_level {
  TITANS_LOG_ERROR = 1,   /* a call that consumes tokens failed */
  TITANS_LOG_WARNING = 2, /* a guard took a chunk back; a stream could not be spilled */
  TITANS_LOG_INFO = 3,    /* sessions opened */
  TITANS_LOG_DEBUG = 4    /* calls cancelled */
} titans_log_level;

/* `message` is one line, "[where] ...", and lives as long as the call. Called from any thread, never from two at once.
 * It may call this library, but not titans_set_log; what it causes is not logged. */
typedef void (*titans_log_function)(void* user, int32_t level, const char* message);

/* Of the whole library: messages of `level` and more severe ones go to `log`; NULL: nowhere, as in the beginning. When
 * this returns, the function before it runs no more. `user` is passed on and remains the caller's.
 * TITANS_INVALID_ARGUMENT: a level that is not a titans_log_level. */
TITANS_API titans_status titans_set_log(titans_log_function log, void* user, int32_t level);

/* Option structs may grow at their end, and struct_size says up to where the caller's goes. A struct of any version
 * since the first is taken: what an older one lacks has its default, what a newer one adds is not read. */

/* ---- sessions: a loaded bundle ---- */

typedef struct titans_session_options {
  size_t struct_size;          /* sizeof(titans_session_options), see above */
  const char* device;          /* "cpu" (default when NULL), "cuda" or "cuda:N" */
  const char* backend;         /* NULL: choose by engine and device; "onnxruntime", "tensorrt" or "tensorrt_rtx" to
                                  insist */
  const char* backend_library; /* path of the vendor library, e.g. libonnxruntime.so.1; NULL: docs/runtime.md */
  const char* plugin_dir;      /* folder of our backend libraries; NULL: beside this library */
  int32_t threads;             /* intra-op threads; 0: the backend's default */
  const char* memory_kernel;   /* what computes the memory. NULL or "auto": our kernel where its library is installed;
                                  "require": fail without it; "off": the graphs' own standard operators */
  const char* engine;          /* name of one of the bundle's engines to insist on, "none" for the plain graphs; NULL:
                                  the best that fits the device, docs/runtime.md */
  const char* libraries;       /* lines MODULE=PATH, such as "tensorrt_rtx=/path/libtensorrt_rtx.so.1": where vendors'
                                  libraries lie that neither backend_library nor the environment names; may be NULL */
  int32_t batch_threads;  /* that titans_session_step_batch and _feed_batch run streams on, the calling one counted;
                             0: as many as there are processors. Each uses `threads` of its own: docs/streams.md */
  uint64_t memory_budget; /* bytes that the state of all streams may take in memory; streams beyond it wait in
                             spill_dir. 0: no limit */
  const char* spill_dir;  /* an existing folder for streams beyond memory_budget, which needs one; may be NULL */
} titans_session_options;

/* Opens the bundle at `path` (a folder). `options` may be NULL. */
TITANS_API titans_status titans_session_open(const char* path, const titans_session_options* options,
                                             titans_session** session);
TITANS_API void titans_session_close(titans_session* session);

/* Facts about a session as one JSON object: bundle, model, device, device_name, engine (its name, or null for the plain
 * graphs), engine_reason, engines_not_chosen (name, reason), backend, backend_version, memory_kernel (our kernel, such
 * as "cpu-avx512", or "standard-operators"), input and output (kind, name, dtype, size), vocab_size (null without
 * tokens), graphs (name, tokens, stride, offsets), state (name, role, dtype, shape, in_place), tokenizer, details (what
 * the backend has to say, texts). The string lives as long as the session handle. */
TITANS_API const char* titans_session_info(const titans_session* session);

/* What streams consume: "tokens", whose outputs are logits, or "vectors" of floats, whose outputs are vectors. */
TITANS_API const char* titans_session_input_kind(const titans_session* session);
/* Floats of one vector that goes in, and of one that comes out; with tokens both are the vocabulary. */
TITANS_API size_t titans_session_input_size(const titans_session* session);
TITANS_API size_t titans_session_output_size(const titans_session* session);
/* 0 for a bundle that takes vectors. */
TITANS_API int32_t titans_session_vocab_size(const titans_session* session);

/* ---- metrics: what a session counts, docs/guard.md ---- */

/* Calls that succeeded. The quantiles are right to 1/16. */
typedef struct titans_durations {
  uint64_t count;
  double sum_seconds;
  double p50_seconds;
  double p90_seconds;
  double p99_seconds;
  double max_seconds;
} titans_durations;

typedef struct titans_metrics {
  size_t struct_size;      /* sizeof(titans_metrics), see above; no more than that is written */
  uint64_t streams;        /* open now */
  uint64_t tokens;         /* tokens or vectors consumed by calls that succeeded */
  uint64_t calls;          /* feeds, steps, scores and draws that began to work */
  uint64_t chunk_updates;  /* chunks completed, of each memory */
  uint64_t rollbacks;      /* chunks that a guard took back */
  uint64_t cancelled;      /* of the calls */
  uint64_t failed;         /* of the calls */
  uint64_t spilled;        /* streams written to files to save memory */
  uint64_t restored;       /* streams read back from such files */
  uint64_t state_bytes;    /* of all open streams */
  uint64_t resident_bytes; /* of these, what is in memory */
  titans_durations step;   /* calls of one token */
  titans_durations feed;   /* calls of more */
} titans_metrics;

/* What the session has counted so far, from any thread; `metrics->struct_size` must be set. The caller owns *metrics.
 * Numbers that change meanwhile need not fit each other. TITANS_INVALID_ARGUMENT: NULL, or a struct_size too small. */
TITANS_API titans_status titans_session_metrics(const titans_session* session, titans_metrics* metrics);
/* The same in Prometheus' text format, each sample with the label bundle (the folder's name), NUL-terminated, into
 * `text`, which the caller owns. *size gets the bytes needed, NUL included; capacity 0 (text may be NULL) asks for that
 * alone. Counters grow, so ask with room to spare: TITANS_INVALID_ARGUMENT, and nothing but *size is written, where
 * `capacity` is too small. */
TITANS_API titans_status titans_session_metrics_text(const titans_session* session, char* text, size_t capacity,
                                                     size_t* size);

/* ---- streams: one sequence and what its memory has learned ---- */

typedef enum titans_output {
  TITANS_OUTPUT_NONE = 0, /* write nothing */
  TITANS_OUTPUT_LAST = 1, /* (vocab,) after the last token */
  TITANS_OUTPUT_ALL = 2   /* (count, vocab), row i after token i */
} titans_output;          /* of a bundle that gives vectors: the same of these */

TITANS_API titans_status titans_stream_create(titans_session* session, titans_stream** stream);
TITANS_API void titans_stream_destroy(titans_stream* stream);

/* A second stream with the same state, independent from here on. */
TITANS_API titans_status titans_stream_fork(const titans_stream* stream, titans_stream** fork);

/* ---- state files and marks: a stream kept, moved and gone back to, docs/state.md ---- */

typedef struct titans_state_options {
  size_t struct_size; /* sizeof(titans_state_options), see above */
  const uint8_t* key; /* of AES-256-GCM: encrypts, or opens what is encrypted; read during the call; NULL: plain */
  size_t key_bytes;   /* 32; 0 without a key */
} titans_state_options;

/* Writes the stream to the file `path`, NAME.tstate. The new file takes the place of an old one when it is whole and on
 * the disk, at once; where this fails, or the process or the machine stops before, the old one is there. `options` may
 * be NULL. The stream stays as it is. TITANS_FAILED: the file cannot be written; TITANS_UNSUPPORTED: a key, and no
 * libcrypto on this machine; TITANS_INVALID_ARGUMENT: NULL, an empty path, a key of another length. */
TITANS_API titans_status titans_stream_save(const titans_stream* stream, const char* path,
                                            const titans_state_options* options);

/* A stream of the session's that goes on where the saved one was: position, learning and memory. The caller destroys
 * it. TITANS_FAILED: no such file, a file cut short or altered, a state of another model, a wrong key, or a key for a
 * file without; TITANS_UNSUPPORTED: a newer version of the format, or an encrypted file and no libcrypto;
 * TITANS_INVALID_ARGUMENT: NULL, no key for an encrypted file. */
TITANS_API titans_status titans_session_restore(titans_session* session, const char* path,
                                                const titans_state_options* options, titans_stream** stream);

/* The safetensors file that the state file at `path` is or, encrypted, holds, whole and unaltered, into `bytes`, which
 * the caller owns. *size gets the bytes needed; capacity 0 (bytes may be NULL) asks for that alone. Needs no session.
 * Errors as of titans_session_restore, but for those of the model; TITANS_INVALID_ARGUMENT, and nothing but *size is
 * written, where `capacity` is too small. */
TITANS_API titans_status titans_state_read(const char* path, const titans_state_options* options, uint8_t* bytes,
                                           size_t capacity, size_t* size);

/* Keeps a copy of the stream's state in host memory, to go back to; it counts in titans_stream_state_bytes. Of an
 * earlier mark at the same position it takes the place. `position` may be NULL. Marks go with the stream, are in no
 * fork and in no file. */
TITANS_API titans_status titans_stream_mark(titans_stream* stream, uint64_t* position);
/* Back to the mark at `position`, bit by bit, learning included. The mark stays, later ones go.
 * TITANS_INVALID_ARGUMENT: there is none. */
TITANS_API titans_status titans_stream_rewind(titans_stream* stream, uint64_t position);
/* Gives the mark's memory back, wiped. TITANS_INVALID_ARGUMENT: there is none. */
TITANS_API titans_status titans_stream_unmark(titans_stream* stream, uint64_t position);
/* The positions of all marks, ascending, into `positions`, which the caller owns and has room for `capacity` of them.
 * *count gets their number; capacity 0 (positions may be NULL) asks for that alone. TITANS_INVALID_ARGUMENT, and
 * nothing but *count is written, where `capacity` is too small. */
TITANS_API titans_status titans_stream_marks(const titans_stream* stream, uint64_t* positions, size_t capacity,
                                             size_t* count);

/* Back to a fresh memory at position 0. Whether it learns is kept; marks are not. */
TITANS_API titans_status titans_stream_reset(titans_stream* stream);

/* Consumes `count` >= 0 tokens, each in [0, vocab). `logits` must hold what `which` asks for: `capacity` is its size in
 * floats. count = 0 with LAST is an error unless the stream has consumed something. All tokens are checked before the
 * first is consumed; if the backend fails midway the stream is put back to where it stood. */
TITANS_API titans_status titans_stream_feed(titans_stream* stream, const int32_t* tokens, size_t count,
                                            titans_output which, float* logits, size_t capacity);

/* The same of a bundle that takes vectors: `count` of them, one after the other, titans_session_input_size floats each;
 * an output is of titans_session_output_size floats. NaN and infinity are refused before anything is consumed. On such
 * a bundle titans_stream_feed, _step, _score and generators are TITANS_INVALID_ARGUMENT, and this is on all others. */
TITANS_API titans_status titans_stream_feed_vectors(titans_stream* stream, const float* vectors, size_t count,
                                                    titans_output which, float* outputs, size_t capacity);

/* Consumes one token; `logits` (vocab floats) may be NULL. */
TITANS_API titans_status titans_stream_step(titans_stream* stream, int32_t token, float* logits);

/* Consumes `count` tokens and writes ln p(token i | all before it) to logprobs[0..count). On a stream that has consumed
 * nothing the first token is scored as uniform, -ln(vocab): the model has no distribution yet. Logits with NaN or
 * without a finite maximum are no distribution: TITANS_FAILED, and the stream is unchanged. */
TITANS_API titans_status titans_stream_score(titans_stream* stream, const int32_t* tokens, size_t count,
                                             float* logprobs);

/* 0: freeze the memory (W and S stay as they are), 1: learn (default). Takes effect with the next token. */
TITANS_API titans_status titans_stream_set_learning(titans_stream* stream, int learning);
TITANS_API int titans_stream_learning(const titans_stream* stream);

TITANS_API uint64_t titans_stream_position(const titans_stream* stream);

/* ---- guard: limits on what a stream may do to its memory, docs/guard.md ---- */

typedef enum titans_guard_policy {
  TITANS_GUARD_OFF = 0,    /* nothing is looked at; how streams begin */
  TITANS_GUARD_RAISE = 1,  /* the call fails with TITANS_FAILED, and the stream is as it was before the call */
  TITANS_GUARD_FREEZE = 2, /* the chunk is consumed with the memory frozen, and learning is off from there on */
  TITANS_GUARD_SKIP = 3    /* the chunk is consumed with the memory frozen, and learning goes on after it */
} titans_guard_policy;

typedef struct titans_guard {
  size_t struct_size;    /* sizeof(titans_guard), see above */
  int32_t policy;        /* a titans_guard_policy */
  float max_update_norm; /* above 0: of any chunk, layer and head, ||W' - W|| / ||W||; infinity: no limit */
  float max_surprise;    /* above 0: of any chunk, layer and head, ||S||; infinity: no limit */
} titans_guard;

/* Fills in the defaults: RAISE on what is not finite, no limits. */
TITANS_API void titans_guard_init(titans_guard* guard);

/* From the next call on. The report begins anew. A guard takes the memory of one more state, which stays with the
 * stream also when the guard is off again. Forks have the guard of their stream. TITANS_INVALID_ARGUMENT: an unknown
 * policy, a limit that is not above 0. */
TITANS_API titans_status titans_stream_set_guard(titans_stream* stream, const titans_guard* guard);

typedef enum titans_guard_reason {
  TITANS_GUARD_GOOD = 0,        /* nothing so far */
  TITANS_GUARD_NOT_FINITE = 1,  /* NaN or infinity in W or S */
  TITANS_GUARD_UPDATE_NORM = 2, /* above max_update_norm */
  TITANS_GUARD_SURPRISE = 3,    /* above max_surprise */
  TITANS_GUARD_OUTPUT = 4,      /* logits without a finite maximum or with NaN; vectors that are not finite */
  TITANS_GUARD_CALL = 5         /* a call of a graph failed while the memory learned (freeze and skip alone) */
} titans_guard_reason;

/* What a guard has seen since it was set, failed calls included. */
typedef struct titans_guard_report {
  size_t struct_size;     /* sizeof(titans_guard_report), see above; no more than that is written */
  uint64_t rollbacks;     /* chunks that broke a limit */
  uint64_t position;      /* of the last of them: where the stream stood, or would have stood, after it */
  int32_t reason;         /* of the last: a titans_guard_reason */
  int32_t layer;          /* of the last: which memory, in the order of the manifest's state; -1: none of them */
  int32_t head;           /* of the last; -1: none */
  float update_norm;      /* of the last: the largest of its layers and heads, which may be NaN */
  float surprise;         /* the same */
  uint64_t chunks;        /* looked at, of each memory */
  float peak_update_norm; /* the largest of all chunks that were looked at one by one, and good */
  float peak_surprise;    /* the same */
} titans_guard_report;

/* The caller owns *report; its struct_size must be set. */
TITANS_API titans_status titans_stream_guard_report(const titans_stream* stream, titans_guard_report* report);

/* ---- progress and cancellation ---- */

/* Called on the thread of the call, or in a batch on one of its threads, after each call of a graph, with the tokens
 * consumed so far and in all. Anything but 0 ends the call with TITANS_CANCELLED, and the stream is as it was before.
 * It must not use the stream. */
typedef int (*titans_progress_function)(void* user, uint64_t done, uint64_t total);

/* For all later calls on this stream; NULL: none, as in the beginning and in forks. `user` is passed on and remains the
 * caller's. */
TITANS_API titans_status titans_stream_set_progress(titans_stream* stream, titans_progress_function progress,
                                                    void* user);

/* From any thread while the stream lives: the call that runs on it ends before its next call of a graph, with
 * TITANS_CANCELLED and the stream as it was before. A call that has no graph left to call succeeds, and where none runs
 * nothing happens. */
TITANS_API titans_status titans_stream_cancel(titans_stream* stream);

/* Bytes of state this stream owns now, all buffers and marks counted. Constant in the number of tokens consumed. */
TITANS_API uint64_t titans_stream_state_bytes(const titans_stream* stream);

/* The memory's fields, e.g. "layers.0.memory.W0" with shape (streams = 1, heads, rows, columns), float32, as of the
 * last complete chunk. `name` and `shape` live as long as the session. */
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

/* ---- many streams at once ---- */

/* What one stream of a batch consumes. */
typedef struct titans_feed {
  size_t struct_size;    /* sizeof(titans_feed), see above; the same in all of a batch, whose next starts there */
  titans_stream* stream; /* of the session, and once in a batch */
  const int32_t* tokens; /* as titans_stream_feed takes them; NULL with vectors */
  const float* vectors;  /* as titans_stream_feed_vectors takes them; NULL with tokens */
  size_t count;          /* of the tokens or vectors; may be 0 */
  titans_output which;
  float* logits;   /* (vocab,), (count, vocab) or NULL, as `which` says; outputs with vectors */
  size_t capacity; /* floats at `logits` */
} titans_feed;

/* Feeds `count` >= 0 streams at any positions, each its own sequence, side by side on batch_threads threads. Each
 * stream and its logits are bit by bit what its own call would have made of it. One that fails is as it was, what its
 * logits hold is not defined, and it stops no other: `statuses` (count of them, or NULL) has the status of each, and
 * the call returns the first that is not TITANS_OK with the text of that. TITANS_INVALID_ARGUMENT, and nothing has run,
 * on NULL, a stream of another session or one that is there twice, wrong sizes and choices; every status then says so.
 * The caller owns all that items point to. From any number of threads at once, each with streams of its own. */
TITANS_API titans_status titans_session_feed_batch(titans_session* session, const titans_feed* items, size_t count,
                                                   titans_status* statuses);

/* The same with one token for each stream: tokens[i] for streams[i], and row i of `logits` (count, vocab) after it.
 * `logits` may be NULL. TITANS_INVALID_ARGUMENT on a bundle that takes vectors. */
TITANS_API titans_status titans_session_step_batch(titans_session* session, titans_stream* const* streams,
                                                   const int32_t* tokens, size_t count, float* logits,
                                                   titans_status* statuses);

/* ---- generation ---- */

typedef struct titans_sampling {
  size_t struct_size;         /* sizeof(titans_sampling), see above */
  float temperature;          /* 0: always the most likely token */
  int32_t top_k;              /* 0: off */
  float top_p;                /* 1: off */
  float min_p;                /* 0: off; keeps tokens with p >= min_p * max p */
  uint64_t seed;              /* same seed, same tokens, on every machine that gives the same logits */
  int64_t max_tokens;         /* < 0: no limit */
  const int32_t* stop_tokens; /* generation ends before one of these is consumed; copied */
  size_t stop_count;
} titans_sampling;

/* Fills in the defaults: temperature 1, everything else off, no limit. */
TITANS_API void titans_sampling_init(titans_sampling* sampling);

/* Filters apply in the order top_k, top_p, min_p on the distribution after temperature. The stream must have consumed
 * at least one token. */
TITANS_API titans_status titans_generator_create(titans_stream* stream, const titans_sampling* sampling,
                                                 titans_generator** generator);
/* Samples a token from the stream's last logits, feeds it to the stream, and returns it; *done = 1 and no token at the
 * end. After each call the stream has consumed exactly the tokens returned. TITANS_INVALID_ARGUMENT where the stream
 * was reset and has consumed nothing since; TITANS_FAILED on logits that titans_stream_score would refuse. */
TITANS_API titans_status titans_generator_next(titans_generator* generator, int32_t* token, int* done);
TITANS_API void titans_generator_destroy(titans_generator* generator);

#ifdef __cplusplus
}
#endif
#endif /* TITANS_TITANS_H_ */
