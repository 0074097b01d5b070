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
  memset(out, 0, sizeof out);
  CHECK(fastops_mitchell_matmul_flat(m, FASTOPS_F32, 1, &pa, &sa, &pb, &sb, &pc, &sc) == FASTOPS_OK, "flat");
  for (i = 0; i < M * N; ++i) CHECK(out[i] == exact[i], "element %d: %g, wanted %g", i, out[i], exact[i]);
  CHECK(fastops_mitchell_matmul_flat(m, FASTOPS_F32, 1, &pa, &sa, &pb, NULL, &pc, &sc) == FASTOPS_INVALID, "no shape");
  CHECK(fastops_mitchell_matmul(m, FASTOPS_F32, 1, &pa, sa, &pb, sa, &pc, sc, no_poll) == FASTOPS_INVALID, "shapes");
  CHECK(fastops_mitchell_matmul(m, FASTOPS_I8, 1, &pa, sa, &pb, sb, &pc, sc, no_poll) == FASTOPS_INVALID, "dtype");
  CHECK(fastops_mitchell_matmul_grad_a(m, (fastops_gradient)3, FASTOPS_F32, 1, &pa, sa, &pb, sb, &pa, sc, &pc, sa,
                                       no_poll) == FASTOPS_INVALID,
        "mode");
  CHECK(fastops_mitchell_conv2d(m, FASTOPS_F32, NULL, a, b, out, no_poll) == FASTOPS_INVALID, "no shape");
  fastops_mitchell_destroy(m);
}

/* Sizes that no memory has are refused, instead of wrapping to small ones or running for ever. */
static void sizes(void) {
  const size_t big = (size_t)1 << 62;
  float x[16] = {0};
  const void* px = x;
  void* py = x;
  const fastops_matrix huge = {big, big, 0, 0};
  const fastops_heads rows = {x, 0, 0, 0}, none = {NULL, 0, 0, 0};
  const fastops_linear_options options = {{NULL, 0, 0, 0},    {NULL, 0, 0, 0},   NULL, 0,
                                          {NULL, NULL, NULL}, {NULL, NULL, NULL}};
  fastops_linear_attention shape = {FASTOPS_MAP_ELU, 1, 1, FASTOPS_F32, 0, 1, 1, 0, 0, 1, 1, 0, 0.0, 0.0, 1.0, NULL};
  fastops_nystrom_attention nystrom = {FASTOPS_F32, 0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 1, 6, 0, 0.0, 1.0};
  fastops_conv2d conv = {1, 1, 4, 4, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1};
  fastops_mitchell* m = make(0.0);
  if (m == NULL) return;
  CHECK(fastops_mitchell_matmul(m, FASTOPS_F32, 1, &px, huge, &px, huge, &py, huge, no_poll) == FASTOPS_INVALID,
        "matmul");
  shape.batch = nystrom.batch = big;
  shape.queries = shape.keys = shape.values = nystrom.queries = nystrom.keys = nystrom.values = big;
  CHECK(fastops_linear_attention_forward(&shape, rows, rows, rows, rows, &options, no_poll) == FASTOPS_INVALID,
        "linear");
  CHECK(fastops_softmax_attention(&shape, rows, rows, rows, rows, none, none, NULL, 0, no_poll) == FASTOPS_INVALID,
        "softmax");
  CHECK(fastops_nystrom_attention_forward(&nystrom, rows, rows, rows, rows, none, NULL, NULL, NULL, NULL, no_poll) ==
            FASTOPS_INVALID,
        "nystrom");
  conv.padding_h = (size_t)-1 / 2 + 1; /* twice that is 0 */
  CHECK(fastops_mitchell_conv2d(m, FASTOPS_F32, &conv, x, x, x, no_poll) == FASTOPS_INVALID, "padding");
  conv.padding_h = 0;
  conv.dilation_h = big;
  conv.kernel_height = 5; /* four times that is 0 */
  CHECK(fastops_mitchell_conv2d(m, FASTOPS_F32, &conv, x, x, x, no_poll) == FASTOPS_INVALID, "dilation");
  fastops_mitchell_destroy(m);
}

/* The functions of one element have the bits of the kernels, whatever the operands. */
typedef float (*binary_f32)(float, float);
typedef double (*binary_f64)(double, double);
typedef float (*unary_f32)(float);
typedef double (*unary_f64)(double);

static uint64_t next_word(void) {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state ^ (state >> 29);
}

static void one_element(void) {
  static const binary_f32 two_f32[3] = {fastops_mitchell_mul_f32, fastops_mitchell_div_f32, fastops_lmul_f32};
  static const binary_f64 two_f64[3] = {fastops_mitchell_mul_f64, fastops_mitchell_div_f64, fastops_lmul_f64};
  static const unary_f32 one_f32[6] = {fastops_mitchell_square_f32, fastops_mitchell_reciprocal_f32,
                                       fastops_mitchell_sqrt_f32,   fastops_mitchell_rsqrt_f32,
                                       fastops_mitchell_log2_f32,   fastops_mitchell_exp2_f32};
  static const unary_f64 one_f64[6] = {fastops_mitchell_square_f64, fastops_mitchell_reciprocal_f64,
                                       fastops_mitchell_sqrt_f64,   fastops_mitchell_rsqrt_f64,
                                       fastops_mitchell_log2_f64,   fastops_mitchell_exp2_f64};
  /* Zeros, the ends of the subnormal and normal numbers, infinity, a nan; then every pattern alike. */
  static const uint32_t edges32[8] = {0, 1, 0x007fffff, 0x00800000, 0x3f800000, 0x7f7fffff, 0x7f800000, 0x7fc00000};
  static const uint64_t edges64[8] = {0,
                                      1,
                                      0x000fffffffffffffu,
                                      0x0010000000000000u,
                                      0x3ff0000000000000u,
                                      0x7fefffffffffffffu,
                                      0x7ff0000000000000u,
                                      0x7ff8000000000000u};
  fastops_mitchell *plain = make(0.0), *lmul = make(0.0625);
  long i;
  int k;
  if (plain == NULL || lmul == NULL) return;
  for (i = 0; i < 200000; ++i) {
    uint32_t p32[2];
    uint64_t p64[2];
    float a32, b32, got32, want32;
    double a64, b64, got64, want64;
    for (k = 0; k < 2; ++k) {
      const uint64_t word = next_word();
      const int edge = (int)(k == 0 ? i % 8 : i / 8 % 8);
      p32[k] = i < 256 ? edges32[edge] | (uint32_t)((i >> (6 + k) & 1) << 31) : (uint32_t)word;
      p64[k] = i < 256 ? edges64[edge] | (uint64_t)(i >> (6 + k) & 1) << 63 : next_word();
    }
    memcpy(&a32, &p32[0], 4);
    memcpy(&b32, &p32[1], 4);
    memcpy(&a64, &p64[0], 8);
    memcpy(&b64, &p64[1], 8);
    for (k = 0; k < 3; ++k) {
      const fastops_mitchell* m = k == 2 ? lmul : plain;
      const fastops_mitchell_op op = k == 1 ? FASTOPS_DIV : FASTOPS_MUL;
      fastops_mitchell_apply(m, op, FASTOPS_F32, &a32, 4, &b32, 4, &want32, 4, 1);
      fastops_mitchell_apply(m, op, FASTOPS_F64, &a64, 8, &b64, 8, &want64, 8, 1);
      got32 = two_f32[k](a32, b32);
      got64 = two_f64[k](a64, b64);
      CHECK(memcmp(&got32, &want32, 4) == 0, "%d(%a, %a) = %a, not %a", k, a32, b32, got32, want32);
      CHECK(memcmp(&got64, &want64, 8) == 0, "%d(%a, %a) = %a, not %a", k, a64, b64, got64, want64);
    }
    for (k = 0; k < 6; ++k) {
      const fastops_mitchell_op op = (fastops_mitchell_op)(FASTOPS_SQUARE + k);
      fastops_mitchell_apply(plain, op, FASTOPS_F32, &a32, 4, &a32, 4, &want32, 4, 1);
      fastops_mitchell_apply(plain, op, FASTOPS_F64, &a64, 8, &a64, 8, &want64, 8, 1);
      got32 = one_f32[k](a32);
      got64 = one_f64[k](a64);
      CHECK(memcmp(&got32, &want32, 4) == 0, "op %d(%a) = %a, not %a", op, a32, got32, want32);
      CHECK(memcmp(&got64, &want64, 8) == 0, "op %d(%a) = %a, not %a", op, a64, got64, want64);
    }
  }
  fastops_mitchell_destroy(plain);
  fastops_mitchell_destroy(lmul);
}

/* Chinese words by a dictionary of this program's own. */
static void chinese(void) {
  static const char dictionary[] = "\xe4\xb8\xad\xe5\x9b\xbd 3 ns\n\xe5\x9b\xbd\xe4\xba\xba 2\n";
  static const char text[] = "\xe4\xb8\xad\xe5\x9b\xbd\xe4\xba\xba";
  fastops_zh_model* model = NULL;
  size_t line = 9;
  fastops_word_rule rule;
  fastops_word_counter* counter;
  fastops_words* words = NULL;
  uint64_t count, documents;
  CHECK(fastops_zh_model_create("no entry\n", 9, NULL, &model, &line) == FASTOPS_INVALID && model == NULL && line == 1,
        "line %zu", line);
  CHECK(fastops_zh_model_create(dictionary, sizeof dictionary - 1, NULL, &model, &line) == FASTOPS_OK, "a model");
  memset(&rule, 0, sizeof rule);
  rule.tokenizer = FASTOPS_WORDS_ZH;
  rule.ngram_low = rule.ngram_high = 1;
  rule.max_token_bytes = 100;
  rule.zh = model;
  counter = fastops_word_counter_create(&rule, 1, 0, 0);
  CHECK(counter != NULL && fastops_word_counter_feed(counter, text, sizeof text - 1, no_poll) == FASTOPS_OK &&
            fastops_word_counter_finish(counter, no_poll, &words) == FASTOPS_OK,
        "a count");
  CHECK(fastops_words_get(words, text, 6, &count, &documents) == 1 && count == 1, "the first word");
  CHECK(fastops_words_get(words, text + 6, 3, &count, &documents) == 1 && count == 1, "the last word");
  fastops_words_destroy(words);
  fastops_word_counter_destroy(counter);
  fastops_zh_model_destroy(model);
}

int main(void) {
  chinese();
  library();
  elements();
  bad_params();
  matmul();
  sizes();
  one_element();
  return check_result("test_capi");
}
