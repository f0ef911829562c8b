// Preloaded into a process: counts the calls that change files, and at a chosen one kills the process, lets the call
// fail, or cuts it short.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { OFF, COUNT, KILL, KILL_HALFWAY, FAIL, SHORT };

static int mode, error;
static long chosen, calls;
static char kinds[256];

// From here on; `at` counts from 0.
void file_calls_arm(int new_mode, long at, int new_error) {
  mode = new_mode;
  chosen = at;
  error = new_error;
  calls = 0;
  memset(kinds, 0, sizeof(kinds));
}

// A letter for each call since then.
const char* file_calls_kinds(void) { return kinds; }

// Whether this call is the chosen one. Where it is to be killed right away, it never returns.
static int is_chosen(char kind) {
  if (mode == OFF) return 0;
  if (calls < (long)sizeof(kinds) - 1) kinds[calls] = kind;
  int chosen_now = mode != COUNT && calls++ == chosen;
  if (mode == COUNT) ++calls;
  if (chosen_now && (mode == KILL || (mode == KILL_HALFWAY && kind != 'w'))) kill(getpid(), SIGKILL);
  return chosen_now;
}

#define NEXT(name) __typeof__(&name) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL_IF_CHOSEN(kind)             \
  if (is_chosen(kind) && mode == FAIL) { \
    errno = error;                       \
    return -1;                           \
  }

ssize_t write(int file, const void* data, size_t bytes) {
  NEXT(write);
  if (is_chosen('w')) {
    if (mode == FAIL) {
      errno = error;
      return -1;
    }
    ssize_t written = next(file, data, bytes / 2);
    if (mode == KILL_HALFWAY) kill(getpid(), SIGKILL);
    if (bytes / 2 > 0) return written;
  }
  return next(file, data, bytes);
}

int fsync(int file) {
  FAIL_IF_CHOSEN('s')
  NEXT(fsync);
  return next(file);
}

int rename(const char* from, const char* to) {
  FAIL_IF_CHOSEN('r')
  NEXT(rename);
  return next(from, to);
}

int unlink(const char* path) {
  FAIL_IF_CHOSEN('u')
  NEXT(unlink);
  return next(path);
}

static int open_any(const char* symbol, const char* path, int flags, mode_t permissions) {
  if (flags & O_CREAT) {
    FAIL_IF_CHOSEN('o')
  }
  int (*next)(const char*, int, ...) = (int (*)(const char*, int, ...))dlsym(RTLD_NEXT, symbol);
  return next(path, flags, permissions);
}

int open(const char* path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t permissions = flags & O_CREAT ? va_arg(more, mode_t) : 0;
  va_end(more);
  return open_any("open", path, flags, permissions);
}

int open64(const char* path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t permissions = flags & O_CREAT ? va_arg(more, mode_t) : 0;
  va_end(more);
  return open_any("open64", path, flags, permissions);
}
