/* A fake library of custom operators for a GPU. It wraps the real one, $TITANS_REAL_OPS, and reports its CPU nodes as
 * CUDA nodes. With TITANS_FAKE_FALLBACK it reports CPU nodes, as if ONNX Runtime had not assigned them to the GPU.
 * TITANS_FAKE_FAULT is the error that the GPU reports for a call, once. */
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
