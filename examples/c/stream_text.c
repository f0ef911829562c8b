/* stream_text BUNDLE FILE: how many bits per byte a model of bytes needs for a file, learning as it reads. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>

#include "titans/titans.h"

enum { kBlock = 4096 };

static int fail(const char* what) {
  fprintf(stderr, "stream_text: %s\n", what);
  return 1;
}

/* Adds up -ln p of the whole file. */
static titans_status score_file(titans_stream* stream, FILE* file, double* nats, uint64_t* bytes) {
  unsigned char block[kBlock];
  int32_t tokens[kBlock];
  float logprobs[kBlock];
  size_t count;
  while ((count = fread(block, 1, kBlock, file)) > 0) {
    for (size_t i = 0; i < count; ++i) tokens[i] = block[i];
    titans_status status = titans_stream_score(stream, tokens, count, logprobs);
    if (status != TITANS_OK) return status;
    for (size_t i = 0; i < count; ++i) *nats -= (double)logprobs[i];
    *bytes += count;
  }
  return TITANS_OK;
}

int main(int argc, char** argv) {
  if (argc != 3) return fail("usage: stream_text BUNDLE FILE");
  FILE* file = fopen(argv[2], "rb");
  if (file == NULL) return fail("cannot open the file");

  titans_session* session = NULL;
  titans_stream* stream = NULL;
  double nats = 0.0;
  uint64_t bytes = 0;
  titans_status status = titans_session_open(argv[1], NULL, &session);
  if (status == TITANS_OK) status = titans_stream_create(session, &stream);
  if (status == TITANS_OK) status = score_file(stream, file, &nats, &bytes);
  const int unread = ferror(file);
  titans_stream_destroy(stream);
  titans_session_close(session);
  fclose(file);

  if (status != TITANS_OK) return fail(titans_last_error());
  if (unread) return fail("cannot read the file");
  if (bytes == 0) return fail("the file is empty");
  printf("bits_per_byte: %.6f\n", nats / log(2.0) / (double)bytes);
  return 0;
}
