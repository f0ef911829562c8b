/* The library of custom operators as it would be on a GPU, for tests: the real one of $TITANS_REAL_OPS, of which it
 * says that its nodes for the CPU are for the GPU. With TITANS_FAKE_FALLBACK they are what they are, as where ONNX
 * Runtime has not let the GPU have them; TITANS_FAKE_FAULT is what the GPU finds wrong in a call, once. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

static void* real(const char* name) {
  void* library = dlopen(getenv("TITANS_REAL_OPS"), RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) abort();
  return dlsym(library, name);
}

void* RegisterCustomOps(void* options, const void* base) {
  return ((void* (*)(void*, const void*))real("RegisterCustomOps"))(options, base);
}

const char* titans_onnxruntime_ops_target(void) { return "plain"; }

int titans_onnxruntime_ops_cuda_target(int ordinal, char* text, size_t size) {
  const char* why_not = getenv("TITANS_FAKE_NO_KERNEL");
  (void)ordinal;
  snprintf(text, size, "%s", why_not == NULL ? "cuda-sm89" : why_not);
  return why_not == NULL;
}

void titans_onnxruntime_ops_made(size_t* cpu, size_t* cuda) {
  ((void (*)(size_t*, size_t*))real("titans_onnxruntime_ops_made"))(cpu, cuda);
  if (getenv("TITANS_FAKE_FALLBACK") == NULL) {
    *cuda = *cpu;
    *cpu = 0;
  }
}

int titans_onnxruntime_ops_cuda_error(char* text, size_t size) {
  const char* fault = getenv("TITANS_FAKE_FAULT");
  if (fault == NULL) return 0;
  snprintf(text, size, "%s", fault);
  unsetenv("TITANS_FAKE_FAULT");
  return 1;
}
