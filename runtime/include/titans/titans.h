/* titans.h: run Titans models on a device. C interface.
 *
 * Handles are opaque. Every function that can fail returns a titans_status; the text of the last failure on the calling
 * thread is titans_last_error(). No function throws or aborts on bad input. A failed call leaves its stream unchanged.
 *
 * Threads: a session may be used from any number of threads at once. A stream, generator or anything else made from a
 * stream belongs to one thread at a time.
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
  TITANS_UNSUPPORTED = 4       /* this machine cannot: backend library missing, unknown device, newer schema */
} titans_status;

typedef struct titans_session titans_session;
typedef struct titans_stream titans_stream;
typedef struct titans_generator titans_generator;

/* "0.1.0" */
TITANS_API const char* titans_version(void);

/* Text of the last failure on this thread, "" if none. Valid until the next failing call on this thread. */
TITANS_API const char* titans_last_error(void);

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
} titans_session_options;

/* Opens the bundle at `path` (a folder). `options` may be NULL. */
TITANS_API titans_status titans_session_open(const char* path, const titans_session_options* options,
                                             titans_session** session);
TITANS_API void titans_session_close(titans_session* session);

/* Facts about a session as one JSON object: bundle, model, device, device_name, engine (its name, or null for the plain
 * graphs), engine_reason, engines_not_chosen (name, reason), backend, backend_version, memory_kernel (our kernel, such
 * as "cpu-avx512", or "standard-operators"), input and output (kind, name, dtype, size), vocab_size (null without
 * tokens), graphs (name, tokens, align, phases), state (name, role, dtype, shape, in_place), tokenizer, details (what
 * the backend has to say, texts). The string lives as long as the session handle. */
TITANS_API const char* titans_session_info(const titans_session* session);

/* What streams consume: "tokens", whose outputs are logits, or "vectors" of floats, whose outputs are vectors. */
TITANS_API const char* titans_session_input_kind(const titans_session* session);
/* Floats of one vector that goes in, and of one that comes out; with tokens both are the vocabulary. */
TITANS_API size_t titans_session_input_size(const titans_session* session);
TITANS_API size_t titans_session_output_size(const titans_session* session);
/* 0 for a bundle that takes vectors. */
TITANS_API int32_t titans_session_vocab_size(const titans_session* session);

/* ---- streams: one sequence and what its memory has learned ---- */

typedef enum titans_logits {
  TITANS_LOGITS_NONE = 0, /* write nothing */
  TITANS_LOGITS_LAST = 1, /* (vocab,) after the last token */
  TITANS_LOGITS_ALL = 2   /* (count, vocab), row i after token i */
} titans_logits;          /* of a bundle that gives vectors: the same of these */

TITANS_API titans_status titans_stream_create(titans_session* session, titans_stream** stream);
TITANS_API void titans_stream_destroy(titans_stream* stream);

/* A second stream with the same state, independent from here on. */
TITANS_API titans_status titans_stream_fork(const titans_stream* stream, titans_stream** fork);

/* Back to a fresh memory at position 0. Whether it learns is kept. */
TITANS_API titans_status titans_stream_reset(titans_stream* stream);

/* Consumes `count` >= 0 tokens, each in [0, vocab). `logits` must hold what `which` asks for: `capacity` is its size in
 * floats. count = 0 with LAST is an error unless the stream has consumed something. All tokens are checked before the
 * first is consumed; if the backend fails midway the stream is put back to where it stood. */
TITANS_API titans_status titans_stream_feed(titans_stream* stream, const int32_t* tokens, size_t count,
                                            titans_logits which, float* logits, size_t capacity);

/* The same of a bundle that takes vectors: `count` of them, one after the other, titans_session_input_size floats each;
 * an output is of titans_session_output_size floats. NaN and infinity are refused before anything is consumed. On such
 * a bundle titans_stream_feed, _step, _score and generators are TITANS_INVALID_ARGUMENT, and this is on all others. */
TITANS_API titans_status titans_stream_feed_vectors(titans_stream* stream, const float* vectors, size_t count,
                                                    titans_logits which, float* outputs, size_t capacity);

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

/* Bytes of state this stream owns now, all buffers counted. Constant in the number of tokens consumed. */
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
