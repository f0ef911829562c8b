/* stream_exchange BUNDLE FROM TO TOKEN...: restores a stream from the state file FROM, or makes one if that is "-".
 * The stream consumes the tokens and is saved to TO, unless that is "-". Prints the logits after the last token, one
 * per line. For tests that move a stream between processors. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "titans/titans.h"

static titans_status run(titans_session* session, titans_stream** stream, char** arguments, int count, float* logits) {
  const char *from = arguments[0], *to = arguments[1];
  titans_status status = strcmp(from, "-") == 0 ? titans_stream_create(session, stream)
                                                : titans_session_restore(session, from, NULL, stream);
  for (int i = 2; i < count && status == TITANS_OK; ++i)
    status = titans_stream_step(*stream, (int32_t)strtol(arguments[i], NULL, 10), logits);
  if (status == TITANS_OK && strcmp(to, "-") != 0) status = titans_stream_save(*stream, to, NULL);
  return status;
}

int main(int argc, char** argv) {
  if (argc < 5) {
    fprintf(stderr, "usage: stream_exchange BUNDLE FROM TO TOKEN...\n");
    return 2;
  }
  titans_session* session = NULL;
  titans_stream* stream = NULL;
  float* logits = NULL;
  size_t vocab = 0;
  titans_status status = titans_session_open(argv[1], NULL, &session);
  if (status == TITANS_OK) {
    vocab = titans_session_output_size(session);
    logits = malloc(vocab * sizeof *logits);
    status = logits == NULL ? TITANS_FAILED : run(session, &stream, argv + 2, argc - 2, logits);
  }
  if (status != TITANS_OK) fprintf(stderr, "stream_exchange: %s\n", titans_last_error());
  for (size_t i = 0; status == TITANS_OK && i < vocab; ++i) printf("%.9g\n", (double)logits[i]);
  titans_stream_destroy(stream);
  titans_session_close(session);
  free(logits);
  return (int)status;
}
