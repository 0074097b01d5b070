// SPDX-License-Identifier: BSD-3-Clause
// The C interface of element-wise Mitchell arithmetic: constants rounded once, the level's kernel, threads for long
// arrays.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdlib>
#include <new>

#include "core/fp_control.h"
#include "core/parallel.h"
#include "mitchell/mitchell_kernels.h"

namespace fastops {
namespace {

#define FASTOPS_LEVEL_TABLE(level) &level::kMitchellKernels,
constexpr const MitchellKernels* kKernels[] = {FASTOPS_FOR_EACH_LEVEL(FASTOPS_LEVEL_TABLE)};
#undef FASTOPS_LEVEL_TABLE

constexpr std::size_t kItemSize[kMitchellTypes] = {2, 2, 4, 8, 1, 1, 2, 2, 4, 4, 8, 8};
constexpr std::size_t kResultSize[kMitchellTypes] = {2, 2, 4, 8, 2, 2, 4, 4, 8, 8, 8, 8};

// Below this many elements a second thread costs more than it brings.
constexpr std::size_t kThreadsFrom = 1000000;
// A block of a long array: independent of the thread count, small enough to spread, large against the hand-over.
constexpr std::size_t kBlock = 65536;

// Operations that the forms without a logarithm do not have.
constexpr unsigned kLogFormOnly =
    1u << FASTOPS_DIV | 1u << FASTOPS_RECIPROCAL | 1u << FASTOPS_SQRT | 1u << FASTOPS_RSQRT;

// Bytes of the last cache that one core uses, 0 where unknown. Not sysconf's figure: on some CPUs and in virtual
// machines that is the sum over the whole socket.
std::size_t last_cache() noexcept {
#if defined(__x86_64__)
  // Cache parameters by sub-leaf: Intel's leaf 4, AMD's 0x8000001d of the same layout.
  for (const unsigned leaf : {0x8000001du, 4u}) {
    for (unsigned i = 0; i < 8; ++i) {
      unsigned a = 0, b = 0, c = 0, d = 0;
      if (!__get_cpuid_count(leaf, i, &a, &b, &c, &d) || (a & 31) == 0) break;
      if (((a >> 5) & 7) != 3) continue;
      return std::size_t{(b >> 22) + 1} * (((b >> 12) & 1023) + 1) * ((b & 4095) + 1) * (std::size_t{c} + 1);
    }
  }
#elif defined(_SC_LEVEL3_CACHE_SIZE)
  const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (size > 0) return static_cast<std::size_t>(size);
#endif
  return 0;
}

// Outputs beyond half of the last cache are written past it: nothing of them would be left when they are read. A cache
// that claims more than 64 MiB is shared by more than this thread.
std::size_t stream_from() noexcept {
  static const std::size_t bytes = [] {
    constexpr std::size_t most = std::size_t{64} << 20;
    const std::size_t size = last_cache();
    return (size == 0 || size > most ? most / 2 : size) / 2;
  }();
  return bytes;
}

template <class Int>
void fill(MitchellConstants<Int>& k, const fastops_mitchell_params& p, int bits, int unit_bits, int lowest_exponent,
          int bias) noexcept {
  // Half types count in their own unit, which is a multiple of the unit they are computed in.
  const auto rounded = [&](double c) {
    return static_cast<Int>(std::nearbyint(std::ldexp(c, bits))) * (Int{1} << (unit_bits - bits));
  };
  k.c = rounded(p.c);
  const int cut = p.mantissa_bits > 0 && p.mantissa_bits < bits ? unit_bits - p.mantissa_bits : 0;
  k.mantissa_mask = -(Int{1} << cut);
  k.flush_below = p.flush ? static_cast<Int>(lowest_exponent + bias) << unit_bits : 0;
  k.lowest_exponent = p.flush ? lowest_exponent : -30000;
  k.segment_bits = p.segments ? __builtin_ctz(static_cast<unsigned>(p.segments)) : 0;
  // float16's subnormals are in the short path's range.
  k.fast = p.form == FASTOPS_FORM_LOG && p.segments == 0 && !(p.flush && bits == 10);
  for (int i = 0; i < p.segments * p.segments; ++i) k.table[i] = rounded(p.table[i]);
}

bool is_valid(const fastops_mitchell_params& p) noexcept {
  const bool segments = p.segments == 0 || p.segments == 2 || p.segments == 4 || p.segments == 8 || p.segments == 16;
  if (p.form < 0 || p.form > FASTOPS_FORM_ITERATIVE || (p.flush & ~1) || p.corrections < 0 || p.corrections > 3 ||
      p.mantissa_bits < 0 || p.mantissa_bits > 52 || !segments || (p.segments && p.form != FASTOPS_FORM_LOG))
    return false;
  if (!(std::fabs(p.c) < 0.5)) return false;
  for (int i = 0; i < p.segments * p.segments; ++i)
    if (!(std::fabs(p.table[i]) < 0.5)) return false;
  return true;
}

struct Job {
  MitchellApply apply;
  const fastops_mitchell* m;
  int op;
  fastops_dtype dtype;
  MitchellArrays arrays;
  std::size_t n;
  std::atomic<int> flags;
};
// Each block's status flags are collected: a worker's would be lost, and np.errstate depend on the length.
void run_block(void* context, std::size_t block, unsigned) noexcept {
  auto& job = *static_cast<Job*>(context);
  const MitchellArrays& p = job.arrays;
  const std::size_t first = block * kBlock, count = job.n - first < kBlock ? job.n - first : kBlock;
  const auto at = static_cast<std::ptrdiff_t>(first);
  std::feclearexcept(FE_ALL_EXCEPT);
  job.apply(job.m, job.op, job.dtype, p.a + at * p.stride_a, p.stride_a, p.b + at * p.stride_b, p.stride_b,
            p.out + at * p.stride_out, p.stride_out, count);
  job.flags.fetch_or(std::fetestexcept(FE_ALL_EXCEPT), std::memory_order_relaxed);
}

bool overlap(const char* in, std::ptrdiff_t step, std::size_t size, const MitchellArrays& p, std::size_t out_size,
             std::size_t n) noexcept {
  if (in == p.out && step == p.stride_out) return false;
  const auto i = reinterpret_cast<std::intptr_t>(in), o = reinterpret_cast<std::intptr_t>(p.out);
  const auto last = static_cast<std::intptr_t>(n - 1);
  const std::intptr_t i_span = last * step, o_span = last * p.stride_out;
  const std::intptr_t i_low = i + std::min<std::intptr_t>(i_span, 0), o_low = o + std::min<std::intptr_t>(o_span, 0);
  const std::intptr_t i_high = i + std::max<std::intptr_t>(i_span, 0) + static_cast<std::intptr_t>(size);
  const std::intptr_t o_high = o + std::max<std::intptr_t>(o_span, 0) + static_cast<std::intptr_t>(out_size);
  return i_low < o_high && o_low < i_high;
}

__attribute__((noinline)) fastops_status apply_long(MitchellApply apply, const fastops_mitchell* m, int op,
                                                    fastops_dtype dtype, const MitchellArrays& p,
                                                    std::size_t n) noexcept {
  const bool aligned = reinterpret_cast<std::uintptr_t>(p.out) % kResultSize[dtype] == 0;
  if (aligned && n * kResultSize[dtype] > stream_from()) op |= kMitchellStream;
  // A reduction or accumulation reads what it wrote: one thread, in order.
  const bool parallel = worker_count() > 1 && p.stride_out != 0 &&
                        !overlap(p.a, p.stride_a, kItemSize[dtype], p, kResultSize[dtype], n) &&
                        !overlap(p.b, p.stride_b, kItemSize[dtype], p, kResultSize[dtype], n);
  if (!parallel) return apply(m, op, dtype, p.a, p.stride_a, p.b, p.stride_b, p.out, p.stride_out, n);
  Job job{apply, m, op, dtype, p, n, {0}};
  const int before = std::fetestexcept(FE_ALL_EXCEPT);
  const double work_ns = static_cast<double>(n * (2 * kItemSize[dtype] + kResultSize[dtype])) / 10.0;
  parallel_run((n + kBlock - 1) / kBlock, run_block, &job, work_ns, fastops_poll{nullptr, nullptr});
  std::feclearexcept(FE_ALL_EXCEPT);
  const int flags = before | job.flags.load(std::memory_order_relaxed);
  if (flags) std::feraiseexcept(flags);
  return FASTOPS_OK;
}

// Under the control that the kernels are written for: flush to zero would lose their subnormal results.
__attribute__((noinline)) fastops_status apply_controlled(const fastops_mitchell* m, fastops_mitchell_op op,
                                                          fastops_dtype dtype, const void* a, std::ptrdiff_t stride_a,
                                                          const void* b, std::ptrdiff_t stride_b, void* out,
                                                          std::ptrdiff_t stride_out, std::size_t n) noexcept {
  const DefaultControl control;
  return fastops_mitchell_apply(m, op, dtype, a, stride_a, b, stride_b, out, stride_out, n);
}

}  // namespace

void set_constants(fastops_mitchell& m, const fastops_mitchell_params& params) noexcept {
  m.params = params;
  const DefaultControl control;  // constants are rounded to nearest
  fill<std::int32_t>(m.single[FASTOPS_F16], params, 10, 23, -14, 127);
  fill<std::int32_t>(m.single[FASTOPS_BF16], params, 7, 23, -126, 127);
  fill<std::int32_t>(m.single[FASTOPS_F32], params, 23, 23, -126, 127);
  fill<std::int64_t>(m.wide, params, 52, 52, -1022, 1023);
}

}  // namespace fastops

using namespace fastops;

fastops_status fastops_mitchell_create(const fastops_mitchell_params* params, fastops_mitchell** result) noexcept {
  if (params == nullptr || result == nullptr || !is_valid(*params)) return FASTOPS_INVALID;
  auto* m = new (std::nothrow) fastops_mitchell();
  if (m == nullptr) return FASTOPS_NO_MEMORY;
  set_constants(*m, *params);
  *result = m;
  return FASTOPS_OK;
}

void fastops_mitchell_destroy(fastops_mitchell* m) noexcept { delete m; }

fastops_status fastops_mitchell_apply(const fastops_mitchell* m, fastops_mitchell_op op, fastops_dtype dtype,
                                      const void* a, ptrdiff_t stride_a, const void* b, ptrdiff_t stride_b, void* out,
                                      ptrdiff_t stride_out, size_t n) noexcept {
  if (m == nullptr || static_cast<unsigned>(op) >= kMitchellOps || static_cast<unsigned>(dtype) >= kMitchellTypes)
    return FASTOPS_INVALID;
  const MitchellApply apply = kKernels[active_level()]->apply[op][dtype];
  if (apply == nullptr || (m->params.form != FASTOPS_FORM_LOG && ((1u << op) & kLogFormOnly) != 0))
    return FASTOPS_INVALID;
  if (__builtin_expect(!has_default_control(), 0))
    return apply_controlled(m, op, dtype, a, stride_a, b, stride_b, out, stride_out, n);
  // A jump, not a call: the arguments stay where they are.
  if (__builtin_expect(n < kThreadsFrom, 1)) return apply(m, op, dtype, a, stride_a, b, stride_b, out, stride_out, n);
  const bool binary = op <= FASTOPS_DIV;
  return apply_long(apply, m, op, dtype,
                    {static_cast<const char*>(a), static_cast<const char*>(binary ? b : a), static_cast<char*>(out),
                     stride_a, binary ? stride_b : stride_a, stride_out},
                    n);
}

fastops_status fastops_mitchell_grad(const fastops_mitchell* m, fastops_mitchell_op op, fastops_gradient mode,
                                     fastops_dtype dtype, const void* a, const void* b, const void* dy, void* da,
                                     void* db, size_t n) noexcept {
  if (m == nullptr || (op != FASTOPS_MUL && op != FASTOPS_DIV) || static_cast<unsigned>(dtype) > FASTOPS_F64 ||
      static_cast<unsigned>(mode) > FASTOPS_GRADIENT_MIMIC || (op == FASTOPS_DIV && m->params.form != FASTOPS_FORM_LOG))
    return FASTOPS_INVALID;
  const DefaultControl control;
  kKernels[active_level()]->grad[dtype](m, op, mode, a, b, dy, da, db, n);
  return FASTOPS_OK;
}
