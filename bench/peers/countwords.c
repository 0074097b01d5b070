/* SPDX-License-Identifier: BSD-3-Clause */
/* A yardstick, no part of the library: counts words as a careful C programmer does by hand, in the manner of the optimised
   C program of Hoyt's countwords comparison (64 KiB blocks, ASCII white space and lower case, FNV-1a, linear probing). Its
   table grows, so that a large vocabulary can be counted too. Built as a program (prints types and tokens) or as a shared
   library. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  char* word;
  size_t length;
  uint64_t hash, count;
} entry;

typedef struct {
  entry* entries;
  size_t size, used; /* size: a power of two */
  char* arena;
  size_t arena_left;
} table;

static char* keep(table* t, const char* word, size_t length) {
  if (length > t->arena_left) {
    t->arena_left = length > (1 << 20) ? length : (1 << 20);
    t->arena = malloc(t->arena_left); /* the process ends before it is freed */
    if (!t->arena) abort();
  }
  char* copy = t->arena;
  memcpy(copy, word, length);
  t->arena += length;
  t->arena_left -= length;
  return copy;
}

static void grow(table* t) {
  const size_t size = t->size * 2;
  entry* entries = calloc(size, sizeof *entries);
  if (!entries) abort();
  for (size_t i = 0; i < t->size; ++i) {
    if (!t->entries[i].word) continue;
    size_t k = t->entries[i].hash & (size - 1);
    while (entries[k].word) k = (k + 1) & (size - 1);
    entries[k] = t->entries[i];
  }
  free(t->entries);
  t->entries = entries;
  t->size = size;
}

static void add(table* t, const char* word, size_t length, uint64_t hash) {
  size_t k = hash & (t->size - 1);
  while (t->entries[k].word) {
    entry* e = &t->entries[k];
    if (e->hash == hash && e->length == length && memcmp(e->word, word, length) == 0) {
      ++e->count;
      return;
    }
    k = (k + 1) & (t->size - 1);
  }
  t->entries[k] = (entry){keep(t, word, length), length, hash, 1};
  if (++t->used > t->size / 2) grow(t);
}

/* 0, with the numbers of different words and of all words; -1 where the file cannot be read or a word is too long. */
int countwords(const char* path, uint64_t* types, uint64_t* tokens) {
  enum { kBlock = 64 * 1024 };
  static char buffer[kBlock];
  const uint64_t kOffset = 0xcbf29ce484222325u, kPrime = 0x100000001b3u;
  FILE* file = fopen(path, "rb");
  if (!file) return -1;
  table t = {calloc(1 << 16, sizeof(entry)), 1 << 16, 0, NULL, 0};
  if (!t.entries) abort();
  size_t kept = 0, got;
  *tokens = 0;
  while ((got = fread(buffer + kept, 1, kBlock - kept, file)) > 0 || kept > 0) {
    const size_t size = kept + got;
    /* Up to the last white space; the rest waits for the next block. */
    size_t stop = size;
    if (got > 0) {
      while (stop > 0 && (unsigned char)buffer[stop - 1] > ' ') --stop;
      if (stop == 0 && size == kBlock) {
        fclose(file);
        return -1;
      }
    }
    for (size_t i = 0; i < stop;) {
      const size_t begin = i;
      uint64_t hash = kOffset;
      for (unsigned char c; i < stop && (c = (unsigned char)buffer[i]) > ' '; ++i) {
        if (c >= 'A' && c <= 'Z') buffer[i] = (char)(c += 'a' - 'A');
        hash = (hash ^ c) * kPrime;
      }
      if (i > begin) {
        add(&t, buffer + begin, i - begin, hash);
        ++*tokens;
      }
      ++i;
    }
    kept = size - stop;
    memmove(buffer, buffer + stop, kept);
    if (got == 0) break;
  }
  fclose(file);
  *types = t.used;
  free(t.entries);
  return 0;
}

int main(int argc, char** argv) {
  uint64_t types, tokens;
  if (argc != 2 || countwords(argv[1], &types, &tokens) != 0) return EXIT_FAILURE;
  printf("%llu %llu\n", (unsigned long long)types, (unsigned long long)tokens);
  return EXIT_SUCCESS;
}
