/* SPDX-License-Identifier: BSD-3-Clause */
/* A C program over the public header alone, as another project would link to libfastops. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "fastops/fastops.h"

static const fastops_poll no_poll = {NULL, NULL};

static fastops_mitchell* make(double c) {
  fastops_mitchell_params params;
  fastops_mitchell* m = NULL;
  memset(&params, 0, sizeof params);
  params.c = c;
  CHECK(fastops_mitchell_create(&params, &m) == FASTOPS_OK && m != NULL, "c %g", c);
  return m;
}

static void library(void) {
  int i;
  const char* name;
  CHECK(fastops_abi_version() == FASTOPS_ABI_VERSION, "%d", fastops_abi_version());
  for (i = 0; (name = fastops_compiled_target(i)) != NULL; ++i) {
    const int runs = fastops_target_runs(name);
    CHECK(runs == 0 || runs == 1, "%s: %d", name, runs);
    CHECK(fastops_set_target(name) == (runs ? FASTOPS_OK : FASTOPS_UNSUPPORTED_TARGET), "%s", name);
    if (runs) CHECK(strcmp(fastops_get_target(), name) == 0, "%s", fastops_get_target());
  }
  CHECK(i >= 1 && fastops_compiled_target(-1) == NULL, "%d targets", i);
  CHECK(fastops_target_runs("v9") == -1 && fastops_set_target("v9") == FASTOPS_INVALID, "an unknown target");
  CHECK(fastops_set_target(NULL) == FASTOPS_INVALID, "no target");
  CHECK(fastops_set_num_threads(2) == FASTOPS_OK && fastops_get_num_threads() == 2, "threads");
  CHECK(fastops_set_num_threads(0) == FASTOPS_INVALID, "no threads");
}

static void elements(void) {
  const float a[5] = {3.0f, -3.0f, 1.5f, 0.0f, 1.75f}, b[5] = {3.0f, 5.0f, 1.5f, 7.0f, 1.75f};
  const float product[5] = {8.0f, -14.0f, 2.0f, 0.0f, 3.0f}; /* 1.5*1.5: carry; -3*5: 2^3 * 1.75 */
  const uint8_t small_a[3] = {3, 255, 0}, small_b[3] = {3, 255, 9};
  uint16_t wide[3];
  float out[5];
  double root, nine = 9.0;
  int i;
  fastops_mitchell* m = make(0.0);
  if (m == NULL) return;
  CHECK(fastops_mitchell_apply(m, FASTOPS_MUL, FASTOPS_F32, a, 4, b, 4, out, 4, 5) == FASTOPS_OK, "mul");
  for (i = 0; i < 5; ++i) CHECK(out[i] == product[i], "%g * %g = %g", a[i], b[i], out[i]);
  /* Backwards and with the second operand held still. */
  CHECK(fastops_mitchell_apply(m, FASTOPS_MUL, FASTOPS_F32, a + 4, -4, b, 0, out, 4, 5) == FASTOPS_OK, "strides");
  CHECK(out[4] == 8.0f && out[1] == 0.0f, "%g %g", out[4], out[1]);
  CHECK(fastops_mitchell_apply(m, FASTOPS_MUL, FASTOPS_U8, small_a, 1, small_b, 1, wide, 2, 3) == FASTOPS_OK, "u8");
  /* 255 = 2^7 (1 + 127/128): 2^15 (1 + 126/128) = 65024 */
  CHECK(wide[0] == 8 && wide[1] == 65024 && wide[2] == 0, "%d %d %d", wide[0], wide[1], wide[2]);
  CHECK(fastops_mitchell_apply(m, FASTOPS_SQRT, FASTOPS_F64, &nine, 8, NULL, 0, &root, 8, 1) == FASTOPS_OK, "sqrt");
  CHECK(root == 3.125, "%g", root); /* log2 9 ~ 3.125; half of it 1.5625; 2 (1 + 0.5625) */
  CHECK(fastops_mitchell_apply(m, FASTOPS_MUL, FASTOPS_F32, NULL, 4, NULL, 4, NULL, 4, 0) == FASTOPS_OK, "n = 0");
  fastops_mitchell_destroy(m);
  fastops_mitchell_destroy(NULL);
}

static void bad_params(void) {
  fastops_mitchell_params params;
  fastops_mitchell* m;
  int i;
  for (i = 0; i < 7; ++i) {
    memset(&params, 0, sizeof params);
    if (i == 0) params.form = 7;
    if (i == 1) params.segments = 3;
    if (i == 2) params.mantissa_bits = -1;
    if (i == 3) params.form = FASTOPS_FORM_ITERATIVE, params.corrections = 9;
    if (i == 4) params.c = NAN;
    if (i == 5) params.segments = 2, params.table[1] = INFINITY;
    if (i == 6) params.flush = 2;
    m = NULL;
    CHECK(fastops_mitchell_create(&params, &m) == FASTOPS_INVALID && m == NULL, "case %d", i);
    fastops_mitchell_destroy(m);
  }
  CHECK(fastops_mitchell_create(NULL, &m) == FASTOPS_INVALID, "no parameters");
}

static void matmul(void) {
  enum { M = 5, K = 7, N = 3 };
  float a[M * K], b[K * N], out[M * N], exact[M * N];
  const void* pa = a;
  const void* pb = b;
  void* pc = out;
  const fastops_matrix sa = {M, K, K, 1}, sb = {K, N, N, 1}, sc = {M, N, N, 1};
  int i, j, k;
  fastops_mitchell* m = make(0.0);
  if (m == NULL) return;
  for (i = 0; i < M * K; ++i) a[i] = (float)(1 << (i % 4)); /* powers of two: Mitchell's product is exact */
  for (i = 0; i < K * N; ++i) b[i] = (float)(i % 5) - 2.0f;
  for (i = 0; i < M; ++i)
    for (j = 0; j < N; ++j) {
      exact[i * N + j] = 0.0f;
      for (k = 0; k < K; ++k) exact[i * N + j] += a[i * K + k] * b[k * N + j];
    }
  CHECK(fastops_mitchell_matmul(m, FASTOPS_F32, 1, &pa, sa, &pb, sb, &pc, sc, no_poll) == FASTOPS_OK, "matmul");
  for (i = 0; i < M * N; ++i) CHECK(out[i] == exact[i], "element %d: %g, wanted %g", i, out[i], exact[i]);
  memset(out, 0, sizeof out);
  CHECK(fastops_mitchell_matmul(NULL, FASTOPS_F32, 1, &pa, sa, &pb, sb, &pc, sc, no_poll) == FASTOPS_OK, "exact");
  for (i = 0; i < M * N; ++i) CHECK(out[i] == exact[i], "element %d: %g, wanted %g", i, out[i], exact[i]);
  CHECK(fastops_mitchell_matmul(m, FASTOPS_F32, 1, &pa, sa, &pb, sa, &pc, sc, no_poll) == FASTOPS_INVALID, "shapes");
  CHECK(fastops_mitchell_matmul(m, FASTOPS_I8, 1, &pa, sa, &pb, sb, &pc, sc, no_poll) == FASTOPS_INVALID, "dtype");
  fastops_mitchell_destroy(m);
}

int main(void) {
  library();
  elements();
  bad_params();
  matmul();
  return check_result("test_capi");
}
