/* SPDX-License-Identifier: BSD-3-Clause */
/* The C interface of libfastops: plain structs and functions, no exception crosses it. */
#ifndef FASTOPS_FASTOPS_H
#define FASTOPS_FASTOPS_H

#include <stddef.h>
#include <stdint.h>

#if defined(FASTOPS_STATIC)
#define FASTOPS_API
#else
#define FASTOPS_API __attribute__((visibility("default")))
#endif

#define FASTOPS_ABI_VERSION 1

#ifdef __cplusplus
#define FASTOPS_NOEXCEPT noexcept
extern "C" {
#else
#define FASTOPS_NOEXCEPT
#endif

typedef enum fastops_status {
  FASTOPS_OK = 0,
  FASTOPS_NO_MEMORY = 1,
  FASTOPS_INTERRUPTED = 2,
  FASTOPS_INVALID = 3,
  FASTOPS_UNSUPPORTED_TARGET = 4
} fastops_status;

typedef enum fastops_dtype {
  FASTOPS_F16 = 0,
  FASTOPS_BF16 = 1,
  FASTOPS_F32 = 2,
  FASTOPS_F64 = 3,
  FASTOPS_I8 = 4,
  FASTOPS_U8 = 5,
  FASTOPS_I16 = 6,
  FASTOPS_U16 = 7,
  FASTOPS_I32 = 8,
  FASTOPS_U32 = 9,
  FASTOPS_I64 = 10,
  FASTOPS_U64 = 11
} fastops_dtype;

/* Called about every 20 ms by the calling thread during long work; a nonzero answer ends the work with
   FASTOPS_INTERRUPTED. A null function is never called. The function throws nothing: an exception ends the process. */
typedef struct fastops_poll {
  int (*function)(void* context);
  void* context;
} fastops_poll;

/* Library. */
FASTOPS_API int fastops_abi_version(void) FASTOPS_NOEXCEPT;
/* Names of the levels compiled in, lowest first; null past the end. */
FASTOPS_API const char* fastops_compiled_target(int index) FASTOPS_NOEXCEPT;
/* 1 where this CPU and operating system run the level, 0 where not, -1 for an unknown name. */
FASTOPS_API int fastops_target_runs(const char* name) FASTOPS_NOEXCEPT;
FASTOPS_API const char* fastops_get_target(void) FASTOPS_NOEXCEPT;
/* Process-wide. FASTOPS_INVALID: unknown name; FASTOPS_UNSUPPORTED_TARGET: this CPU lacks it. */
FASTOPS_API fastops_status fastops_set_target(const char* name) FASTOPS_NOEXCEPT;
FASTOPS_API unsigned fastops_get_num_threads(void) FASTOPS_NOEXCEPT;
/* 1 .. 1024; FASTOPS_INVALID otherwise. */
FASTOPS_API fastops_status fastops_set_num_threads(unsigned count) FASTOPS_NOEXCEPT;
/* min(affinity mask, cgroup quota), at least 1. */
FASTOPS_API unsigned fastops_default_num_threads(void) FASTOPS_NOEXCEPT;

/* Mitchell arithmetic. */
typedef enum fastops_mitchell_op {
  FASTOPS_MUL = 0,
  FASTOPS_DIV = 1,
  FASTOPS_SQUARE = 2,
  FASTOPS_RECIPROCAL = 3,
  FASTOPS_SQRT = 4,
  FASTOPS_RSQRT = 5,
  FASTOPS_LOG2 = 6,
  FASTOPS_EXP2 = 7
} fastops_mitchell_op;

typedef enum fastops_mitchell_form {
  FASTOPS_FORM_LOG = 0,      /* 1 + x + y with the carry into the exponent (Mitchell 1962) */
  FASTOPS_FORM_EQUATION = 1, /* 1 + x + y + c without carry (L-Mul's equation) */
  FASTOPS_FORM_ITERATIVE = 2 /* Babic's basic blocks */
} fastops_mitchell_form;

typedef enum fastops_gradient {
  FASTOPS_GRADIENT_EXACT = 0,
  FASTOPS_GRADIENT_STE = 1,
  FASTOPS_GRADIENT_MIMIC = 2
} fastops_gradient;

typedef struct fastops_mitchell_params {
  int32_t form;          /* fastops_mitchell_form */
  int32_t flush;         /* 1: subnormal operands and results are signed zeros */
  int32_t corrections;   /* FORM_ITERATIVE: correction blocks, 0 .. 3 */
  int32_t mantissa_bits; /* operands cut to so many mantissa bits; 0 keeps all */
  int32_t segments;      /* 0, 2, 4, 8 or 16 */
  double c;              /* log-domain constant, rounded once per dtype to rint(c 2^M) */
  double table[256];     /* segments x segments constants in place of c, row = first operand; unary: `segments` */
} fastops_mitchell_params;

/* Constants of one operation, rounded for every dtype. Immutable; threads may share it. */
typedef struct fastops_mitchell fastops_mitchell;
FASTOPS_API fastops_status fastops_mitchell_create(const fastops_mitchell_params* params,
                                                   fastops_mitchell** result) FASTOPS_NOEXCEPT;
FASTOPS_API void fastops_mitchell_destroy(fastops_mitchell* m) FASTOPS_NOEXCEPT;

/* out[i] = op(a[i], b[i]), strides in bytes; unary operations ignore b. Integers: FASTOPS_MUL and FASTOPS_SQUARE
   only, results of twice the width (64-bit: the same width, modulo 2^64). `out` may equal an operand exactly. */
FASTOPS_API fastops_status fastops_mitchell_apply(const fastops_mitchell* m, fastops_mitchell_op op,
                                                  fastops_dtype dtype, const void* a, ptrdiff_t stride_a, const void* b,
                                                  ptrdiff_t stride_b, void* out, ptrdiff_t stride_out,
                                                  size_t n) FASTOPS_NOEXCEPT;

/* One element of the plain multiplier (log form, no constant), and of the product with L-Mul's 2^-4: the bits of
   fastops_mitchell_apply, in a few nanoseconds. */
FASTOPS_API float fastops_mitchell_mul_f32(float a, float b) FASTOPS_NOEXCEPT;
FASTOPS_API double fastops_mitchell_mul_f64(double a, double b) FASTOPS_NOEXCEPT;
FASTOPS_API float fastops_mitchell_div_f32(float a, float b) FASTOPS_NOEXCEPT;
FASTOPS_API double fastops_mitchell_div_f64(double a, double b) FASTOPS_NOEXCEPT;
FASTOPS_API float fastops_mitchell_square_f32(float a) FASTOPS_NOEXCEPT;
FASTOPS_API double fastops_mitchell_square_f64(double a) FASTOPS_NOEXCEPT;
FASTOPS_API float fastops_mitchell_reciprocal_f32(float a) FASTOPS_NOEXCEPT;
FASTOPS_API double fastops_mitchell_reciprocal_f64(double a) FASTOPS_NOEXCEPT;
FASTOPS_API float fastops_mitchell_sqrt_f32(float a) FASTOPS_NOEXCEPT;
FASTOPS_API double fastops_mitchell_sqrt_f64(double a) FASTOPS_NOEXCEPT;
FASTOPS_API float fastops_mitchell_rsqrt_f32(float a) FASTOPS_NOEXCEPT;
FASTOPS_API double fastops_mitchell_rsqrt_f64(double a) FASTOPS_NOEXCEPT;
FASTOPS_API float fastops_mitchell_log2_f32(float a) FASTOPS_NOEXCEPT;
FASTOPS_API double fastops_mitchell_log2_f64(double a) FASTOPS_NOEXCEPT;
FASTOPS_API float fastops_mitchell_exp2_f32(float a) FASTOPS_NOEXCEPT;
FASTOPS_API double fastops_mitchell_exp2_f64(double a) FASTOPS_NOEXCEPT;
FASTOPS_API float fastops_lmul_f32(float a, float b) FASTOPS_NOEXCEPT;
FASTOPS_API double fastops_lmul_f64(double a, double b) FASTOPS_NOEXCEPT;

/* Shape and strides (in elements) shared by the matrices of a batch. */
typedef struct fastops_matrix {
  size_t rows, cols;
  ptrdiff_t row_stride, col_stride;
} fastops_matrix;

/* out[i] = a[i] b[i] for i < batch; dtype F16, BF16, F32 or F64. m == NULL multiplies exactly. */
FASTOPS_API fastops_status fastops_mitchell_matmul(const fastops_mitchell* m, fastops_dtype dtype, size_t batch,
                                                   const void* const* a, fastops_matrix shape_a, const void* const* b,
                                                   fastops_matrix shape_b, void* const* out, fastops_matrix shape_out,
                                                   fastops_poll poll) FASTOPS_NOEXCEPT;

/* The same for callers that pass no structure by value; it is not interrupted. */
FASTOPS_API fastops_status fastops_mitchell_matmul_flat(const fastops_mitchell* m, fastops_dtype dtype, size_t batch,
                                                        const void* const* a, const fastops_matrix* shape_a,
                                                        const void* const* b, const fastops_matrix* shape_b,
                                                        void* const* out,
                                                        const fastops_matrix* shape_out) FASTOPS_NOEXCEPT;

/* da[i] (rows of a) from dy[i]: the gradient of fastops_mitchell_matmul in its first operand. */
FASTOPS_API fastops_status fastops_mitchell_matmul_grad_a(const fastops_mitchell* m, fastops_gradient mode,
                                                          fastops_dtype dtype, size_t batch, const void* const* a,
                                                          fastops_matrix shape_a, const void* const* b,
                                                          fastops_matrix shape_b, const void* const* dy,
                                                          fastops_matrix shape_dy, void* const* da,
                                                          fastops_matrix shape_da, fastops_poll poll) FASTOPS_NOEXCEPT;
/* db[i] likewise, the gradient in the second operand. */
FASTOPS_API fastops_status fastops_mitchell_matmul_grad_b(const fastops_mitchell* m, fastops_gradient mode,
                                                          fastops_dtype dtype, size_t batch, const void* const* a,
                                                          fastops_matrix shape_a, const void* const* b,
                                                          fastops_matrix shape_b, const void* const* dy,
                                                          fastops_matrix shape_dy, void* const* db,
                                                          fastops_matrix shape_db, fastops_poll poll) FASTOPS_NOEXCEPT;

/* Two-dimensional convolution (cross-correlation), all arrays C-contiguous. */
typedef struct fastops_conv2d {
  size_t batch, channels, height, width;       /* x (batch, channels, height, width) */
  size_t filters, kernel_height, kernel_width; /* w (filters, channels / groups, kernel_height, kernel_width) */
  size_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;
} fastops_conv2d;
FASTOPS_API fastops_status fastops_mitchell_conv2d(const fastops_mitchell* m, fastops_dtype dtype,
                                                   const fastops_conv2d* shape, const void* x, const void* w, void* out,
                                                   fastops_poll poll) FASTOPS_NOEXCEPT;
/* dx and dw like x and w; either may be null. */
FASTOPS_API fastops_status fastops_mitchell_conv2d_grad(const fastops_mitchell* m, fastops_gradient mode,
                                                        fastops_dtype dtype, const fastops_conv2d* shape, const void* x,
                                                        const void* w, const void* dy, void* dx, void* dw,
                                                        fastops_poll poll) FASTOPS_NOEXCEPT;

/* out = sum over k of table[a][b], 256 x 256 int32 (or int64 with wide_table) entries indexed by raw bytes;
   out int32 (wide_out == 0; the caller has ruled overflow out) or int64; strides in elements. */
FASTOPS_API fastops_status fastops_lut_matmul(size_t batch, const uint8_t* const* a, fastops_matrix shape_a,
                                              const uint8_t* const* b, fastops_matrix shape_b, const void* table,
                                              int wide_table, void* const* out, fastops_matrix shape_out, int wide_out,
                                              fastops_poll poll) FASTOPS_NOEXCEPT;

/* da[i], db[i] from dy[i], contiguous, op FASTOPS_MUL or FASTOPS_DIV, dtype F16, BF16, F32 or F64. */
FASTOPS_API fastops_status fastops_mitchell_grad(const fastops_mitchell* m, fastops_mitchell_op op,
                                                 fastops_gradient mode, fastops_dtype dtype, const void* a,
                                                 const void* b, const void* dy, void* da, void* db,
                                                 size_t n) FASTOPS_NOEXCEPT;

/* Optimizer steps and moving averages over lists of tensors. */
#define FASTOPS_MAX_ROLES 16

/* Shape and strides of a tensor that is not contiguous in all its roles. */
typedef struct fastops_layout {
  int ndim; /* 0 .. 64 */
  const ptrdiff_t* shape;
  const ptrdiff_t* strides; /* strides[role * ndim + axis], in bytes */
} fastops_layout;

/* `count` tensors, each in the roles of the call (its parameter, gradient, state ...) with one shape. A tensor that a
   call writes shares no memory with any other. */
typedef struct fastops_tensor_list {
  size_t count, roles;
  const size_t* size;                  /* elements of tensor i */
  void* const* data;                   /* data[i * roles + r]; any alignment */
  const uint8_t* dtype;                /* dtype[i * roles + r], F16 .. F64 */
  const fastops_layout* const* layout; /* null, or one for each tensor, null where all its roles are contiguous */
} fastops_tensor_list;

/* Roles: parameter, then a shadow for each of 1 .. 15 profiles. shadow += w (parameter - shadow), w = 1 - decay in
   [0, 1]: weights[k] of profile k, or weights[k * count + i] with per_tensor. Shadows F32 or F64, or BF16 with a seed,
   from which they are rounded at random. A call that has begun is finished. */
FASTOPS_API fastops_status fastops_ema_update(const fastops_tensor_list* tensors, const double* weights, int per_tensor,
                                              const uint64_t* seed) FASTOPS_NOEXCEPT;

/* m = keep m + gain (g + weight_decay p); where `moves`, p -= lr (nesterov ? g + momentum m : m), and the shadow
   follows by ema_weight. Roles: p, g, then m and the shadow where there are such. p F32 or F64; g as p, or F16 or BF16
   beside F32; all others as p. */
typedef struct fastops_sgd {
  double lr, momentum, keep, gain, weight_decay, ema_weight;
  int32_t nesterov, moves, zero_grad, has_momentum, has_ema;
} fastops_sgd;
FASTOPS_API fastops_status fastops_sgd_step(const fastops_tensor_list* tensors,
                                            const fastops_sgd* step) FASTOPS_NOEXCEPT;

/* p *= decay; m += w1 (g - m), v = beta2 v + w2 g^2 with g += l2 p; p -= step_size m / (sqrt(v) scale + eps). Roles: p,
   g, m, v, then the shadow where there is one; dtypes as fastops_sgd_step. */
typedef struct fastops_adamw {
  double decay, l2, w1, beta2, w2, step_size, scale, eps, ema_weight;
  int32_t zero_grad, has_ema;
} fastops_adamw;
FASTOPS_API fastops_status fastops_adamw_step(const fastops_tensor_list* tensors,
                                              const fastops_adamw* step) FASTOPS_NOEXCEPT;

/* The same on rows of row_size[i] elements; every role contiguous. rows[i]: distinct rows of p, m and v, row_count[i]
   of them, one for each row of g; live[i]: a flag a row of p, set for those, and the moments of the others decay (null:
   they stay). rows == NULL: g has the shape of p, a row is live where it is not all zero, `decays` says what the others
   do. */
FASTOPS_API fastops_status fastops_lazy_adamw_rows(const fastops_tensor_list* tensors, const size_t* row_size,
                                                   const int64_t* const* rows, const size_t* row_count,
                                                   const uint8_t* const* live, int decays,
                                                   const fastops_adamw* step) FASTOPS_NOEXCEPT;

/* slow += alpha (fast - slow); fast = slow. Roles: slow, fast; F32 or F64. */
FASTOPS_API fastops_status fastops_lookahead_sync(const fastops_tensor_list* tensors, double alpha) FASTOPS_NOEXCEPT;

/* p *= exp(-lr g). Roles: p, g; dtypes as fastops_sgd_step. */
FASTOPS_API fastops_status fastops_eg_step(const fastops_tensor_list* tensors, double lr) FASTOPS_NOEXCEPT;

/* gain *= exp(gain_lr sign(m) sign(g)); scale *= exp(scale_lr cos(h, g)); m = beta m + (1 - beta) g;
   h = mu h + lr gain g; p -= scale h. Roles: p, g, m, h, gain; one scale a tensor. */
typedef struct fastops_adaptive_eg {
  double lr, beta, mu, gain_lr, gain_low, gain_high, scale_lr, scale_low, scale_high;
} fastops_adaptive_eg;
FASTOPS_API fastops_status fastops_adaptive_eg_step(const fastops_tensor_list* tensors, double* scales,
                                                    const fastops_adaptive_eg* step) FASTOPS_NOEXCEPT;

/* *answer = 1 where no element of any tensor is infinite or nan. One role, F16 .. F64. */
FASTOPS_API fastops_status fastops_all_finite(const fastops_tensor_list* tensors, int* answer) FASTOPS_NOEXCEPT;

/* Attention. */
typedef enum fastops_feature_map {
  FASTOPS_MAP_ELU = 0,      /* elu(x) + 1 */
  FASTOPS_MAP_RELU = 1,     /* max(x, 0) + kernel_eps */
  FASTOPS_MAP_RELU2 = 2,    /* max(x, 0)^2 + kernel_eps */
  FASTOPS_MAP_IDENTITY = 3, /* x */
  FASTOPS_MAP_COSINE = 4,   /* (x / |x|, 1): one feature more than x has elements */
  FASTOPS_MAP_EXP = 5,      /* exp(scale x) */
  FASTOPS_MAP_FAVOR = 6,  /* exp(w.x' - |x'|^2 / 2) / sqrt(features), x' = sqrt(scale) x, for rows w of `projection` */
  FASTOPS_MAP_SOFTMAX = 7 /* each feature by its own normaliser (Shen et al. 2021); ignores normalize and eps */
} fastops_feature_map;

/* The arrays' element type is F16, BF16, F32 or F64; states, decay and projection are F64 beside F64, else F32. */
typedef struct fastops_linear_attention {
  int32_t feature_map, causal, normalize, dtype;
  size_t batch, heads_q, heads_kv; /* heads_kv divides heads_q */
  size_t queries, keys;            /* causal: the last query sees all keys */
  size_t dim, features, values;    /* of q and k, of the state, of v */
  double eps, kernel_eps, scale;   /* scale multiplies the weights of the first five maps */
  const void* projection;          /* (features, dim), C order */
} fastops_linear_attention;

/* Strides in elements; rows are contiguous. */
typedef struct fastops_heads {
  const void* data;
  ptrdiff_t batch, head, row;
} fastops_heads;

/* S (batch, heads_kv, features, values), z and m (batch, heads_kv, features), C order: the sums are S 2^m and z 2^m. m
   of the last three maps only. With sequences, `batch` is their number. */
typedef struct fastops_linear_state {
  void *s, *z, *m;
} fastops_linear_state;

/* What may be absent: null pointers. key_mask: one byte a key, 0 hides it. offsets: sequences + 1 of them, in a batch
   of one, queries = keys. decay: logarithms of the decay before each key. */
typedef struct fastops_linear_options {
  fastops_heads key_mask, decay;
  const int64_t* offsets;
  size_t sequences;
  fastops_linear_state initial_state, final_state;
} fastops_linear_options;

FASTOPS_API fastops_status fastops_linear_attention_forward(const fastops_linear_attention* shape, fastops_heads q,
                                                            fastops_heads k, fastops_heads v, fastops_heads out,
                                                            const fastops_linear_options* options,
                                                            fastops_poll poll) FASTOPS_NOEXCEPT;
/* One token of each sequence: queries = keys = 1; `final_state` is the state, changed in place. */
FASTOPS_API fastops_status fastops_linear_attention_step(const fastops_linear_attention* shape, fastops_heads q,
                                                         fastops_heads k, fastops_heads v, fastops_heads out,
                                                         const fastops_linear_options* options) FASTOPS_NOEXCEPT;
/* dq, dk, dv in C order. d_final: the gradient of the final state (s and z), d_initial: that of the initial one. */
FASTOPS_API fastops_status fastops_linear_attention_backward(
    const fastops_linear_attention* shape, fastops_heads dy, fastops_heads q, fastops_heads k, fastops_heads v,
    fastops_heads y, void* dq, void* dk, void* dv, const fastops_linear_options* options,
    const fastops_linear_state* d_final, const fastops_linear_state* d_initial, fastops_poll poll) FASTOPS_NOEXCEPT;

/* Softmax attention without the matrix of weights. factor (F64 beside F64, else F32) multiplies the logits of a query.
 */
FASTOPS_API fastops_status fastops_softmax_attention(const fastops_linear_attention* shape, fastops_heads q,
                                                     fastops_heads k, fastops_heads v, fastops_heads out,
                                                     fastops_heads key_mask, fastops_heads factor,
                                                     const int64_t* offsets, size_t sequences,
                                                     fastops_poll poll) FASTOPS_NOEXCEPT;

/* Nystrom attention: the matrix of weights through `landmarks` means of segments. A sample with as few rows as
   landmarks gets exact attention. */
typedef struct fastops_nystrom_attention {
  int32_t dtype;       /* F16, BF16, F32 or F64; landmarks, convolution and information are F64 beside F64, else F32 */
  int32_t ridge_solve; /* 0: `iterations` steps of Newton's method; 1: (A^T A + ridge |A|_1 |A|_inf I)^-1 A^T */
  int32_t normalize;   /* 1: every row of weights sums to 1 */
  int32_t batch_init;  /* 1: one start coefficient for all matrices of the call */
  size_t batch, heads_q, heads_kv, queries, keys, dim, values;
  size_t landmarks, iterations, taps;
  double ridge, scale;
} fastops_nystrom_attention;

/* key_mask (batch, keys), of the queries too where they are as many. conv (heads_q, taps), taps odd; q_landmarks
   (batch, heads_q, landmarks, dim), k_landmarks (batch, heads_kv, ...); info (batch, heads_q, 4): residual, start
   coefficient, smallest and largest sum of a row's weights. All of them C order, or null. */
FASTOPS_API fastops_status fastops_nystrom_attention_forward(const fastops_nystrom_attention* shape, fastops_heads q,
                                                             fastops_heads k, fastops_heads v, fastops_heads out,
                                                             fastops_heads key_mask, const void* conv,
                                                             const void* q_landmarks, const void* k_landmarks,
                                                             void* info, fastops_poll poll) FASTOPS_NOEXCEPT;
/* dq, dk, dv in C order; d_conv, d_q_landmarks, d_k_landmarks like what they are of, or null. */
FASTOPS_API fastops_status fastops_nystrom_attention_backward(const fastops_nystrom_attention* shape, fastops_heads dy,
                                                              fastops_heads q, fastops_heads k, fastops_heads v,
                                                              void* dq, void* dk, void* dv, fastops_heads key_mask,
                                                              const void* conv, void* d_conv, const void* q_landmarks,
                                                              const void* k_landmarks, void* d_q_landmarks,
                                                              void* d_k_landmarks, fastops_poll poll) FASTOPS_NOEXCEPT;

/* Word counting. Keys are byte strings, counts 64-bit and below 2^63. */
typedef enum fastops_word_tokenizer {
  FASTOPS_WORDS_WHITESPACE = 0, /* runs of anything but white space */
  FASTOPS_WORDS_WORD = 1,       /* runs of letters, digits and the underscore */
  FASTOPS_WORDS_CHAR = 2,       /* code points */
  FASTOPS_WORDS_UNICODE = 3,    /* UAX #29 words with a letter or digit in them; needs the break tables */
  FASTOPS_WORDS_ZH = 4          /* needs a model */
} fastops_word_tokenizer;

typedef enum fastops_word_case {
  FASTOPS_CASE_KEEP = 0,
  FASTOPS_CASE_ASCII = 1,
  FASTOPS_CASE_UNICODE = 2, /* needs the tables of classes and cases */
  FASTOPS_CASE_FOLD = 3     /* likewise */
} fastops_word_case;

/* What becomes of bytes that are not UTF-8. */
typedef enum fastops_word_errors {
  FASTOPS_ERRORS_REPLACE = 0, /* one U+FFFD for each maximal subpart */
  FASTOPS_ERRORS_STRICT = 1,  /* the count ends with FASTOPS_INVALID */
  FASTOPS_ERRORS_IGNORE = 2,
  FASTOPS_ERRORS_ESCAPE = 3 /* they stay: letters of no alphabet, and no white space */
} fastops_word_errors;

/* A dictionary and model of the Chinese tokenizer; shared by threads, never written. */
typedef struct fastops_zh_model fastops_zh_model;

/* The hidden Markov model for words that the dictionary lacks: logarithms of probabilities, over the states begin,
   middle and end of a word and a word of one character, in this order. emit: FASTOPS_ZH_CHARACTERS times 4, for the
   code points from 0x4e00 on. */
#define FASTOPS_ZH_CHARACTERS 20950
typedef struct fastops_zh_hmm {
  double start[4];
  double trans[4][4]; /* from, to */
  const double* emit;
} fastops_zh_hmm;

/* Reads a dictionary as jieba's dict.txt is: on every line a word, a space, a frequency and what else follows. hmm:
   null for words of the dictionary alone; nothing passed here is kept. FASTOPS_INVALID: *line is no such line (from 1
   on), or 0 where no word has a frequency or the dictionary is too large. */
FASTOPS_API fastops_status fastops_zh_model_create(const char* dictionary, size_t size, const fastops_zh_hmm* hmm,
                                                   fastops_zh_model** model, size_t* line) FASTOPS_NOEXCEPT;
FASTOPS_API void fastops_zh_model_destroy(fastops_zh_model* model) FASTOPS_NOEXCEPT;

/* A table from keys to counts. One thread at a time writes; any number reads meanwhile none writes. */
typedef struct fastops_words fastops_words;

/* What to count. Everything pointed to outlives the counter. Tables are of two stages, for codes up to 0x10ffff: entry
 * [page[code >> 8] * 256 + (code & 255)]. 1 <= ngram_low <= ngram_high, 1 <= max_token_bytes. */
typedef struct fastops_word_rule {
  int tokenizer;
  int lowercase;
  int errors;
  int lines;    /* each line is a document; else each text is one */
  int doc_freq; /* also count documents */
  unsigned ngram_low, ngram_high;
  size_t max_token_bytes;
  const fastops_words* stop_words; /* null: none; applied before n-grams are joined */
  const uint16_t* class_pages;     /* null: only ASCII white space is white space, bytes from 0x80 on are letters */
  const uint8_t* classes; /* 1 white space, 2 letter, digit or underscore, 4 cased, 8 ignorable beside a sigma */
  const uint16_t* case_pages;
  const int32_t* cases; /* >= 0: code ^ entry; < 0: case_several + ~entry holds the count and the code points */
  const uint32_t* case_several;
  const uint16_t* break_pages;
  const uint8_t* break_classes;
  const fastops_zh_model* zh;
} fastops_word_rule;

typedef struct fastops_words_info {
  size_t entries, bytes;
  uint64_t total_low, total_high; /* the sum of the counts */
  uint64_t documents, error_bound;
  int doc_freq;
} fastops_words_info;

FASTOPS_API fastops_words* fastops_words_create(int doc_freq) FASTOPS_NOEXCEPT; /* null: no memory */
FASTOPS_API void fastops_words_destroy(fastops_words* words) FASTOPS_NOEXCEPT;
/* FASTOPS_INVALID: the count would reach 2^63, or the key has 2^32 - 2 bytes or more. */
FASTOPS_API fastops_status fastops_words_add(fastops_words* words, const char* key, size_t size, uint64_t count,
                                             uint64_t documents) FASTOPS_NOEXCEPT;
/* 1 where the key is there, with its counts. */
FASTOPS_API int fastops_words_get(const fastops_words* words, const char* key, size_t size, uint64_t* count,
                                  uint64_t* documents) FASTOPS_NOEXCEPT;
FASTOPS_API void fastops_words_describe(const fastops_words* words, fastops_words_info* info) FASTOPS_NOEXCEPT;
FASTOPS_API void fastops_words_annotate(fastops_words* words, uint64_t documents,
                                        uint64_t error_bound) FASTOPS_NOEXCEPT;
/* Adds everything of `from`; FASTOPS_INVALID, with nothing added, where a count would reach 2^63. */
FASTOPS_API fastops_status fastops_words_merge(fastops_words* words, const fastops_words* from) FASTOPS_NOEXCEPT;
/* The keys whose counts and documents lie in the closed ranges, and that are not in `without` (may be null). */
FASTOPS_API fastops_status fastops_words_select(const fastops_words* words, uint64_t min_count, uint64_t max_count,
                                                uint64_t min_documents, uint64_t max_documents,
                                                const fastops_words* without, fastops_poll poll,
                                                fastops_words** selected) FASTOPS_NOEXCEPT;
/* The `kept` largest counts less the next one, nothing else; error_bound grows by that one (Agarwal et al. 2012: tables
   of approximate counts may be merged and made smaller again). FASTOPS_INVALID: documents are counted. */
FASTOPS_API fastops_status fastops_words_shrink(fastops_words* words, size_t kept) FASTOPS_NOEXCEPT;
/* `parts` tables, by the FNV-1a hash (64 bits) of the key modulo parts; all or none are made. FASTOPS_INVALID: no
 * parts. */
FASTOPS_API fastops_status fastops_words_split(const fastops_words* words, size_t parts, fastops_poll poll,
                                               fastops_words** tables) FASTOPS_NOEXCEPT;
/* The `count` entries with the largest counts, then the smallest keys as bytes, in order; key_bytes: of their keys. */
FASTOPS_API fastops_status fastops_words_rank(const fastops_words* words, size_t count, size_t* entries,
                                              size_t* key_bytes, fastops_poll poll) FASTOPS_NOEXCEPT;
/* Of `count` entries: keys behind one another, count + 1 offsets, counts, and documents where not null. */
FASTOPS_API void fastops_words_read(const fastops_words* words, const size_t* entries, size_t count, char* keys,
                                    uint64_t* offsets, uint64_t* counts, uint64_t* documents) FASTOPS_NOEXCEPT;
/* The container's size, and the container. */
FASTOPS_API size_t fastops_words_packed_size(const fastops_words* words) FASTOPS_NOEXCEPT;
FASTOPS_API void fastops_words_pack(const fastops_words* words, void* to) FASTOPS_NOEXCEPT;
/* FASTOPS_INVALID with *why (a constant text) where the bytes are not a container. */
FASTOPS_API fastops_status fastops_words_unpack(const void* from, size_t size, fastops_words** words,
                                                const char** why) FASTOPS_NOEXCEPT;

/* Counting. A counter is used by one thread at a time and starts threads of the pool itself. */
typedef struct fastops_word_counter fastops_word_counter;

typedef enum fastops_word_failure {
  FASTOPS_WORDS_OK = 0,
  FASTOPS_WORDS_BAD_BYTE = 1,   /* not UTF-8, with errors "strict" */
  FASTOPS_WORDS_ENCODING = 2,   /* begins with the byte order mark of UTF-16 or UTF-32 */
  FASTOPS_WORDS_LONG_TOKEN = 3, /* more than max_token_bytes */
  FASTOPS_WORDS_READ = 4,       /* error_number says why reading failed */
  FASTOPS_WORDS_SPILL = 5       /* error_number says why the temporary file could not be written or read */
} fastops_word_failure;

/* What ended a call with FASTOPS_INVALID; offset: in the text or file, in bytes, UINT64_MAX for a token that came by
   itself; error_number: errno, or the bad byte, with what is wrong in the bits above its eight: 0 no sequence begins
   with it, 1 one begins that does not go on, 2 that the text's end cuts. */
typedef struct fastops_word_error {
  int failure, error_number;
  uint64_t offset;
} fastops_word_error;

/* workers: threads at most. memory_limit: bytes for tables before they go to a temporary file, 0 for none. approximate:
   keep about this many keys, with an error bound (Misra and Gries 1982), 0 for all. Null: no memory, or a rule out of
   its ranges or without a table that it needs; so with readers. */
FASTOPS_API fastops_word_counter* fastops_word_counter_create(const fastops_word_rule* rule, unsigned workers,
                                                              size_t memory_limit, size_t approximate) FASTOPS_NOEXCEPT;
FASTOPS_API void fastops_word_counter_destroy(fastops_word_counter* counter) FASTOPS_NOEXCEPT;
/* The next bytes of a text; it may be cut anywhere. */
FASTOPS_API fastops_status fastops_word_counter_feed(fastops_word_counter* counter, const void* data, size_t size,
                                                     fastops_poll poll) FASTOPS_NOEXCEPT;
/* The text ends. */
FASTOPS_API fastops_status fastops_word_counter_end(fastops_word_counter* counter, fastops_poll poll) FASTOPS_NOEXCEPT;
/* `count` texts, each whole. */
FASTOPS_API fastops_status fastops_word_counter_texts(fastops_word_counter* counter, const void* const* data,
                                                      const size_t* sizes, size_t count,
                                                      fastops_poll poll) FASTOPS_NOEXCEPT;
/* A token of a document, taken as it is; and the end of that document. */
FASTOPS_API fastops_status fastops_word_counter_token(fastops_word_counter* counter, const char* token,
                                                      size_t size) FASTOPS_NOEXCEPT;
FASTOPS_API fastops_status fastops_word_counter_end_document(fastops_word_counter* counter) FASTOPS_NOEXCEPT;
/* The lines of a file that begin in [start, stop). Where documents matter and are whole texts: all of the file. */
FASTOPS_API fastops_status fastops_word_counter_file(fastops_word_counter* counter, int file, uint64_t start,
                                                     uint64_t stop, fastops_poll poll) FASTOPS_NOEXCEPT;
/* The counts so far in *words; the counter is empty again. */
FASTOPS_API fastops_status fastops_word_counter_finish(fastops_word_counter* counter, fastops_poll poll,
                                                       fastops_words** words) FASTOPS_NOEXCEPT;
FASTOPS_API void fastops_word_counter_error(const fastops_word_counter* counter,
                                            fastops_word_error* error) FASTOPS_NOEXCEPT;

/* Ids of a text's tokens: the key's place in the order of fastops_words_rank; unknown keys are left out. *ids: valid
   until the next call with this reader. Null where the poll said so, too. */
typedef struct fastops_word_reader fastops_word_reader;
FASTOPS_API fastops_word_reader* fastops_word_reader_create(const fastops_word_rule* rule, const fastops_words* words,
                                                            fastops_poll poll) FASTOPS_NOEXCEPT;
FASTOPS_API void fastops_word_reader_destroy(fastops_word_reader* reader) FASTOPS_NOEXCEPT;
FASTOPS_API fastops_status fastops_word_reader_read(fastops_word_reader* reader, const void* text, size_t size,
                                                    const int64_t** ids, size_t* count,
                                                    fastops_word_error* error) FASTOPS_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
