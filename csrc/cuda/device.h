// SPDX-License-Identifier: BSD-3-Clause
// What kernels use of the GPU beside plain C++. Each instruction that a CPU lacks stands here, with a plain body for
// the host, so that the same source runs under shim.h.
#ifndef FASTOPS_CUDA_DEVICE_H
#define FASTOPS_CUDA_DEVICE_H

#include "core/half.h"
#include "core/simd.h"
#include "cuda/gpu.h"

#if defined(__CUDACC__)
// A template's name, which has commas, is first given to a variable.
#define FASTOPS_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define FASTOPS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define FASTOPS_DEVICE __device__ __forceinline__
#define FASTOPS_DEVICE_CALL __device__ __noinline__
#else
#include "cuda/shim.h"
#define FASTOPS_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (static_cast<void>(stream), ::fastops::shim::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); }))
#define FASTOPS_DYNAMIC_SHARED(name) unsigned char* const name = ::fastops::shim::dynamic_memory()
#define FASTOPS_DEVICE inline __attribute__((always_inline))
#define FASTOPS_DEVICE_CALL __attribute__((noinline))
#endif

namespace fastops::FASTOPS_LEVEL {

// What the runtime says of the launch just made.
inline gpu::Status launched() noexcept {
#if defined(__CUDACC__)
  return static_cast<gpu::Status>(cudaGetLastError());
#else
  return 0;
#endif
}

// Dtypes: what lies in memory (S) and what it is computed in (E).
struct F16 {
  using S = std::uint16_t;
  using E = float;
  static FASTOPS_INLINE E get(S s) { return half::from_f16(s); }
  static FASTOPS_INLINE S put(E e) { return half::to_f16(e); }
};
struct BF16 {
  using S = std::uint16_t;
  using E = float;
  static FASTOPS_INLINE E get(S s) { return half::from_bf16(s); }
  static FASTOPS_INLINE S put(E e) { return half::to_bf16(e); }
};
struct F32 {
  using S = float;
  using E = float;
  static FASTOPS_INLINE E get(S s) { return s; }
  static FASTOPS_INLINE S put(E e) { return e; }
};
struct F64 {
  using S = double;
  using E = double;
  static FASTOPS_INLINE E get(S s) { return s; }
  static FASTOPS_INLINE S put(E e) { return e; }
};

// N elements that lie together, read and written at once. One access takes 16 bytes at most.
template <class S, int N> struct alignas(sizeof(S) * N < 16 ? sizeof(S) * N : 16) Vector {
  S v[N];
};
template <class P> FASTOPS_DEVICE P load_vector(const void* p) {
#if defined(__CUDACC__)
  return *static_cast<const P*>(p);
#else
  if (reinterpret_cast<std::uintptr_t>(p) % alignof(P) != 0) shim::fail("a load that is not aligned");
  P r;
  std::memcpy(&r, p, sizeof r);
  return r;
#endif
}
template <class P> FASTOPS_DEVICE void store_vector(void* p, const P& v) {
#if defined(__CUDACC__)
  *static_cast<P*>(p) = v;
#else
  if (reinterpret_cast<std::uintptr_t>(p) % alignof(P) != 0) shim::fail("a store that is not aligned");
  std::memcpy(p, &v, sizeof v);
#endif
}

// a b + c with subnormals read and written as zeros.
FASTOPS_DEVICE float fma_flushed(float a, float b, float c) {
#if defined(__CUDACC__)
  float r;
  asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
  return r;
#else
  const auto flushed = [](float x) { return simd::bits<std::uint32_t>(x) << 1 < 0x01000000u ? x * 0.0f : x; };
  return flushed(simd::fma(flushed(a), flushed(b), flushed(c)));
#endif
}

// Copies of 16 bytes from global to shared memory that go on while the thread computes: begun, closed into groups, and
// waited for until at most `kLeft` groups are under way. Zeros where not `valid`. Barriers are the caller's.
FASTOPS_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
#if defined(__CUDACC__)
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
#else
  shim::Fiber& self = shim::engine.self();
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0 || reinterpret_cast<std::uintptr_t>(global) % 16 != 0)
    shim::fail("a copy that is not aligned");
  self.copies.push_back({shared, valid ? global : nullptr, 16, self.groups});
#endif
}
FASTOPS_DEVICE void copy_async_close() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  ++shim::engine.self().groups;
#endif
}
template <int kLeft> FASTOPS_DEVICE void copy_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  // As late as the rules allow: what is not waited for has not arrived.
  shim::Fiber& self = shim::engine.self();
  std::vector<shim::Copy> later;
  for (const shim::Copy& copy : self.copies) {
    if (copy.group + kLeft >= self.groups)
      later.push_back(copy);
    else if (copy.from == nullptr)
      std::memset(copy.to, 0, copy.bytes);
    else
      std::memcpy(copy.to, copy.from, copy.bytes);
  }
  self.copies = later;
#endif
}

// Tiles of the tensor cores are volatile, since all lanes must meet at them: the compiler may move other assembly to
// where only some need its result. They round sums towards zero, eight terms at a time (Fasi, Higham, Mikaitis and
// Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021), and so do the plain bodies.

// d (16 x 8, float) += a (16 x 16) b (16 x 8) by the lanes of a warp, of F16 or BF16. With g = lane / 4, t = lane % 4:
// a[0] holds (g, 2t) and (g, 2t + 1), a[1] row g + 8, a[2] and a[3] the same 8 columns further; b[0] holds (2t, g) and
// (2t + 1, g), b[1] 8 rows further; d[0], d[1]: (g, 2t), (g, 2t + 1), d[2], d[3]: row g + 8. (PTX ISA, mma.m16n8k16.)
template <class H>
FASTOPS_DEVICE void multiply_tile(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<H, BF16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  struct Fragment {
    std::uint32_t v[6];
  };
  const unsigned g = shim::lane() / 4, t = shim::lane() % 4;
  const auto element = [](std::uint32_t pair, unsigned k) {
    return H::get(static_cast<std::uint16_t>(pair >> (16 * (k % 2))));
  };
  const shim::Shown<Fragment> shown(Fragment{{a[0], a[1], a[2], a[3], b[0], b[1]}});
  // Row g's part of a lies in the lanes 4g .. 4g + 3, column n's part of b in the lanes 4n .. 4n + 3.
  for (unsigned half = 0; half < 2; ++half) {
    double sums[4] = {d[0], d[1], d[2], d[3]};
    for (unsigned k = 0; k < 8; ++k) {
      const Fragment row = shown.of(g * 4 + k / 2);
      for (unsigned n = 0; n < 2; ++n) {
        const Fragment column = shown.of((2 * t + n) * 4 + k / 2);
        for (unsigned r = 0; r < 2; ++r)
          sums[2 * r + n] += double{element(row.v[2 * half + r], k)} * double{element(column.v[4 + half], k)};
      }
    }
    for (unsigned i = 0; i < 4; ++i) d[i] = shim::toward_zero(sums[i]);
  }
#endif
}

// x with the 10 bits of fraction that the tensor cores keep of a float (TF32).
FASTOPS_DEVICE float to_tf32(float x) {
#if defined(__CUDACC__)
  std::uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return simd::bits<float>(r & ~0x1fffu);  // PTX leaves these open
#else
  const auto u = simd::bits<std::uint32_t>(x);
  return (u & 0x7fffffffu) >= 0x7f800000u ? x : simd::bits<float>((u + 0x1000u) & ~0x1fffu);
#endif
}

// d (16 x 8) += a (16 x 8) b (8 x 8) by the lanes of a warp, of TF32. a[0] holds (g, t), a[1] row g + 8, a[2] and a[3]
// the same 4 columns further; b[0] holds (t, g), b[1] 4 rows further; d as above. (PTX ISA, mma.m16n8k8.)
FASTOPS_DEVICE void multiply_tile_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#if defined(__CUDACC__)
  const auto word = [](float x) { return simd::bits<std::uint32_t>(x); };
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(word(a[0])), "r"(word(a[1])), "r"(word(a[2])), "r"(word(a[3])), "r"(word(b[0])), "r"(word(b[1])));
#else
  struct Fragment {
    float v[6];
  };
  const unsigned g = shim::lane() / 4, t = shim::lane() % 4;
  const shim::Shown<Fragment> shown(Fragment{{a[0], a[1], a[2], a[3], b[0], b[1]}});
  double sums[4] = {d[0], d[1], d[2], d[3]};
  for (unsigned k = 0; k < 8; ++k) {
    const Fragment row = shown.of(g * 4 + k % 4);
    for (unsigned n = 0; n < 2; ++n) {
      const Fragment column = shown.of((2 * t + n) * 4 + k % 4);
      for (unsigned r = 0; r < 2; ++r) sums[2 * r + n] += double{row.v[k / 4 * 2 + r]} * double{column.v[4 + k / 4]};
    }
  }
  for (unsigned i = 0; i < 4; ++i) d[i] = shim::toward_zero(sums[i]);
#endif
}

// Four matrices of 8 x 8 numbers of 16 bits from shared memory: matrix i has its rows where the lanes 8i .. 8i + 7 say,
// 16 bytes each. r[i] holds (g, 2t) and (g, 2t + 1) of it, or of its transpose. (PTX ISA, ldmatrix.)
template <bool kTransposed> FASTOPS_DEVICE void load_matrices(std::uint32_t (&r)[4], const std::uint16_t* row) {
#if defined(__CUDACC__)
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
#else
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) shim::fail("a matrix row that is not aligned");
  const unsigned g = shim::lane() / 4, t = shim::lane() % 4;
  const shim::Shown<const std::uint16_t*> shown(row);
  for (unsigned i = 0; i < 4; ++i) {
    const auto element = [&](unsigned k) -> std::uint32_t {
      return kTransposed ? shown.of(8 * i + 2 * t + k)[g] : shown.of(8 * i + g)[2 * t + k];
    };
    r[i] = element(0) | element(1) << 16;
  }
#endif
}

// 2^x within 2 units in the last place, subnormal results flushed.
FASTOPS_DEVICE float fast_exp2(float x) {
#if defined(__CUDACC__)
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return __builtin_exp2f(x);
#endif
}

}  // namespace fastops::FASTOPS_LEVEL
#endif
