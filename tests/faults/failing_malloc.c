/* SPDX-License-Identifier: BSD-3-Clause */
/* For LD_PRELOAD: the k-th allocation after fail_arm(k, ...) answers null, once or from then on; threads likewise. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

/* glibc's own names, since dlsym itself allocates. */
extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);

static atomic_int armed;
static atomic_long seen, bytes, failing, threads_left = -1;
static atomic_int sticky;

/* k == 0 only counts. */
void fail_arm(long k, int for_good) {
  seen = 0;
  bytes = 0;
  failing = k;
  sticky = for_good;
  armed = 1;
}
/* Ends it; the number of allocations since fail_arm. */
long fail_disarm(void) {
  armed = 0;
  return seen;
}
/* The bytes that were asked for since fail_arm. */
long fail_bytes(void) { return bytes; }
/* So many more threads can be started; -1: any number. */
void fail_threads(long left) { threads_left = left; }

static int fails(size_t size) {
  if (!armed) return 0;
  bytes += (long)size;
  const long now = ++seen;
  if (failing == 0 || (sticky ? now < failing : now != failing)) return 0;
  errno = ENOMEM;
  return 1;
}

void* malloc(size_t size) { return fails(size) ? NULL : __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return fails(count * size) ? NULL : __libc_calloc(count, size); }
void* realloc(void* p, size_t size) { return fails(size) ? NULL : __libc_realloc(p, size); }
void* memalign(size_t alignment, size_t size) { return fails(size) ? NULL : __libc_memalign(alignment, size); }
void* aligned_alloc(size_t alignment, size_t size) { return fails(size) ? NULL : __libc_memalign(alignment, size); }
int posix_memalign(void** result, size_t alignment, size_t size) {
  if (fails(size)) return ENOMEM;
  *result = __libc_memalign(alignment, size);
  return *result ? 0 : ENOMEM;
}

int pthread_create(pthread_t* id, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
  typedef int (*Create)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static Create create;
  if (threads_left == 0) return EAGAIN;
  if (threads_left > 0) --threads_left;
  if (create == NULL) create = (Create)dlsym(RTLD_NEXT, "pthread_create");
  return create(id, attributes, start, argument);
}
