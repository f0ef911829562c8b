/* remember BUNDLE STATE: a model of bytes reads stdin, and the file STATE keeps what it has learned.
 *
 * Started again, it goes on where it was. It ends with its input, or with SIGTERM or Ctrl-C, and saves before that; it
 * also saves from time to time, so that a power cut costs little. What it has counted goes to stdout. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/select.h>
#include <unistd.h>

#include "titans/titans.h"

enum { kBlock = 4096, kSaveEvery = 1 << 20 };

static volatile sig_atomic_t stopped;

static void stop(int signal_number) {
  (void)signal_number;
  stopped = 1;
}

/* The two signals wait until the program waits too: in `next_block` alone they are let through, so none is lost between
 * looking whether one has come and beginning to read. Returns the mask that lets them through. */
static sigset_t catch_signals(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = stop;
  sigaction(SIGTERM, &action, NULL);
  sigaction(SIGINT, &action, NULL);
  sigset_t caught, before;
  sigemptyset(&caught);
  sigaddset(&caught, SIGTERM);
  sigaddset(&caught, SIGINT);
  sigprocmask(SIG_BLOCK, &caught, &before);
  return before;
}

/* Bytes of stdin, 0 at its end or when a signal has come, -1 where it cannot be read. */
static ssize_t next_block(unsigned char* block, const sigset_t* open_mask) {
  while (!stopped) {
    fd_set input;
    FD_ZERO(&input);
    FD_SET(STDIN_FILENO, &input);
    if (pselect(STDIN_FILENO + 1, &input, NULL, NULL, NULL, open_mask) > 0) return read(STDIN_FILENO, block, kBlock);
    if (errno != EINTR) return -1;
  }
  return 0;
}

/* A stream with what STATE holds, or a fresh one where there is no such file. */
static titans_status open_stream(titans_session* session, const char* state, titans_stream** stream) {
  if (access(state, F_OK) != 0 && errno == ENOENT) return titans_stream_create(session, stream);
  return titans_session_restore(session, state, NULL, stream);
}

static int fail(const char* what) {
  fprintf(stderr, "remember: %s\n", what);
  return 1;
}

/* Learns from stdin until it ends or a signal comes. *nats gets the sum of -ln p of what was read. 0 if all went well.
 */
static int read_input(titans_stream* stream, const char* state, const sigset_t* open_mask, double* nats) {
  static unsigned char block[kBlock];
  static int32_t tokens[kBlock];
  static float logprobs[kBlock];
  uint64_t saved_at = titans_stream_position(stream);
  ssize_t count;
  while ((count = next_block(block, open_mask)) > 0) {
    for (ssize_t i = 0; i < count; ++i) tokens[i] = block[i];
    if (titans_stream_score(stream, tokens, (size_t)count, logprobs) != TITANS_OK) return fail(titans_last_error());
    for (ssize_t i = 0; i < count; ++i) *nats -= (double)logprobs[i];
    if (titans_stream_position(stream) - saved_at < kSaveEvery) continue;
    if (titans_stream_save(stream, state, NULL) != TITANS_OK) return fail(titans_last_error());
    saved_at = titans_stream_position(stream);
  }
  return count < 0 ? fail(strerror(errno)) : 0;
}

/* In the text format of Prometheus, for a collector that reads it from a file. */
static void print_metrics(const titans_session* session) {
  size_t size = 0;
  if (titans_session_metrics_text(session, NULL, 0, &size) != TITANS_OK) return;
  size += 1024; /* numbers may grow meanwhile */
  char* text = malloc(size);
  if (text != NULL && titans_session_metrics_text(session, text, size, &size) == TITANS_OK) fputs(text, stdout);
  free(text);
}

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: remember BUNDLE STATE\n");
    return 2;
  }
  const char* const state = argv[2];
  const sigset_t open_mask = catch_signals(); /* before the session's threads, which inherit what waits */

  titans_session* session = NULL;
  titans_stream* stream = NULL;
  titans_status status = titans_session_open(argv[1], NULL, &session);
  if (status == TITANS_OK) status = open_stream(session, state, &stream);
  if (status != TITANS_OK) {
    titans_session_close(session);
    return fail(titans_last_error());
  }
  const uint64_t start = titans_stream_position(stream);
  fprintf(stderr, "remember: from position %llu\n", (unsigned long long)start);

  double nats = 0.0;
  int failed = read_input(stream, state, &open_mask, &nats);
  /* Also after a failure: a call that fails leaves the stream as it was before. */
  if (titans_stream_save(stream, state, NULL) != TITANS_OK) failed = fail(titans_last_error());

  const uint64_t end = titans_stream_position(stream);
  printf("position: %llu\n", (unsigned long long)end);
  if (end > start) printf("bits_per_byte: %.6f\n", nats / log(2.0) / (double)(end - start));
  print_metrics(session);
  titans_stream_destroy(stream);
  titans_session_close(session);
  return failed;
}
