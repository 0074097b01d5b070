// SPDX-License-Identifier: BSD-3-Clause
// Between the kernels, which nvcc compiles, and the Python module, which it never sees: plain structs and functions.
// All launches go to the current device and return at once.
#ifndef FASTOPS_CUDA_GPU_H
#define FASTOPS_CUDA_GPU_H

#include <cstddef>
#include <cstdint>

#include "fastops/fastops.h"
#include "mitchell/mitchell_params.h"

namespace fastops::gpu {

using Stream = void*;                                   // cudaStream_t
using Status = int;                                     // cudaError_t; 0: no error
inline constexpr Status kTooLarge = 9;                  // cudaErrorInvalidConfiguration
inline constexpr std::size_t kMostBlocks = 0x7fffffff;  // of a grid's first axis

// The runtime.

int device_count() noexcept;  // 0 without a driver
// Why there is no device; null where there is one.
const char* problem() noexcept;
const char* error_text(Status status) noexcept;
// The device whose memory this is; -1 for the host's.
int device_of(const void* p) noexcept;

// `device` is the current one of this thread while the object lives.
class OnDevice {
 public:
  explicit OnDevice(int device) noexcept;
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  Status status = 0;

 private:
  int before_ = -1;
};

// Memory in the order of a stream, of which the release names the same or a later one.
Status allocate(void** p, std::size_t bytes, Stream stream) noexcept;
Status release(void* p, Stream stream) noexcept;
// Memory that no stream uses any more.
void release_unused(void* p) noexcept;
// A stream of the current device for which nobody waits, as long as the process lives; null on failure.
Stream release_stream() noexcept;
// The host waits for all that the current device has got, on whatever streams.
Status synchronize() noexcept;
// Copies host memory, which may change when the call has returned, without waiting for the stream.
Status upload(void* to, const void* from, std::size_t bytes, Stream stream) noexcept;
// What `later` gets from here on runs after all that `earlier` has got.
Status wait(Stream later, Stream earlier) noexcept;

// All that a stream had got at some moment; it stays that when the stream is destroyed, whose handle says nothing then.
class Event {
 public:
  Event() = default;
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  Status record(Stream stream) noexcept;  // a stream of the device on which it is recorded first
  void reset() noexcept;                  // likewise
  bool is_done() noexcept;
  // What `later` gets from here on runs after it.
  Status precede(Stream later) noexcept;

 private:
  void* event_ = nullptr;
};
// Where what a stream gets goes.
enum class Capture {
  kNone,
  kGraph,   // events outside of it cannot be waited for
  kBroken,  // nowhere: it would end the capture of a blocking stream, for which the default stream waits
};
Capture capture_of(Stream stream) noexcept;
inline bool is_captured(Stream stream) noexcept { return capture_of(stream) == Capture::kGraph; }

// Mitchell arithmetic.

inline constexpr int kMaxDimensions = 8;

// Null data: the number. Strides in elements.
struct Operand {
  const void* data;
  double number;
  std::ptrdiff_t stride[kMaxDimensions];
};
struct Elementwise {
  fastops_mitchell_op op;
  fastops_dtype dtype;
  int ndim;
  std::size_t shape[kMaxDimensions];
  Operand a, b;
  void* out;
  std::ptrdiff_t stride_out[kMaxDimensions];
};
// F16 .. F64. `out` may equal an operand exactly.
Status mitchell_apply(const fastops_mitchell& m, const Elementwise& call, Stream stream) noexcept;

// Of mitchell_mul or mitchell_div. A gradient has strides of 0 along the axes over which it is summed.
struct Strided {
  const void* data;
  std::ptrdiff_t stride[kMaxDimensions];
};
struct ElementwiseGradient {
  fastops_mitchell_op op;
  fastops_gradient mode;
  fastops_dtype dtype;
  int ndim;
  std::size_t shape[kMaxDimensions];
  Strided a, b, dy, da, db;
};
// Bytes of device memory that a call needs beside its arrays.
std::size_t mitchell_gradient_workspace(const fastops_mitchell& m, const ElementwiseGradient& call) noexcept;
// `product`: the multiplier's own products, for the mimicked gradient of a quotient.
Status mitchell_gradient(const fastops_mitchell& m, const fastops_mitchell& product, const ElementwiseGradient& call,
                         void* workspace, Stream stream) noexcept;

// out[i] = a[i] b[i] over a batch; strides in elements, those of the batch first.
inline constexpr int kBatchDimensions = 4;
struct Matrices {
  const void* data;
  std::ptrdiff_t batch[kBatchDimensions], row, col;
};
struct Matmul {
  fastops_dtype dtype;
  std::size_t batch[kBatchDimensions];  // 1 where there is no such axis
  std::size_t rows, cols, depth;
  Matrices a, b, out;
};
Status mitchell_matmul(const fastops_mitchell* m, const Matmul& call, Stream stream) noexcept;

// Matrix products whose rows, columns and depth are several axes each: convolutions, and gradients, which are summed
// over what a batch repeats.
enum class Results {
  kMatrix,
  // Pixels of planes: depth is (channel, kernel row, kernel column), columns are (image, row, column), groups the
  // batch, and no step of b in the plane leads backwards.
  kPixels,
  // Of kernels: rows are (channel, kernel row, kernel column), depth is (image, row, column).
  kTaps,
};
enum class Terms {
  kProducts,  // of the multiplier: M(a, b)
  kExact,     // a b
  kSlopes,    // b times the multiplier's slope in `point` at a
};
inline constexpr int kIndexAxes = 5;
// An index, its last axis fastest.
struct Index {
  int axes;
  std::size_t length[kIndexAxes];
};
// A step along each axis of an index: in memory, and in the plane of an image.
struct Walk {
  std::ptrdiff_t stride[kIndexAxes];
  std::int32_t y[kIndexAxes], x[kIndexAxes];
};
// An element lies at data + offset + the steps of its row and column, its pixel at (y, x) + theirs. Pixels outside
// height x width are not there. All pixels are below kMostPixels in size.
inline constexpr std::ptrdiff_t kMostPixels = std::ptrdiff_t{1} << 29;
struct Gathered {
  const void* data;
  bool flush;  // a half type's subnormals read as zero
  std::ptrdiff_t batch[kBatchDimensions], offset;
  Walk row, col;
  std::int32_t y, x, height, width;
};
struct GatheredMatmul {
  fastops_dtype dtype;
  Results results;  // but for kMatrix the axes have the order above
  Terms terms;
  bool transposed;  // a is the second operand of M, or the point is that of the slopes
  bool skips;       // what b has not gives no term; else it is zero
  // Steps of depth among which an element of a result with a point has a term if it has any; 0: it always has one.
  std::size_t taps;
  std::size_t batch[kBatchDimensions];  // 1 where there is no such axis
  Index rows, cols, depth;
  Gathered a, b, point, out;
};
// Whether kPixels or kTaps are worth a kernel of their own, which tiles of 64 x 64 would leave mostly idle.
bool mitchell_is_depthwise(const GatheredMatmul& call) noexcept;
std::size_t mitchell_gathered_workspace(const GatheredMatmul& call) noexcept;
Status mitchell_gathered(const fastops_mitchell* m, const GatheredMatmul& call, void* workspace,
                         Stream stream) noexcept;
// Writes zeros.
Status clear(void* p, std::size_t bytes, Stream stream) noexcept;

// a and b of bytes, table of 256 x 256 int32 (int64: wide_table) entries, out int32 or int64 (wide_out).
Status lut_matmul(const Matmul& call, const void* table, bool wide_table, bool wide_out, Stream stream) noexcept;

// Lists of tensors.

inline constexpr int kRoles = 5;
// Elements of a tensor that a block of threads takes; a multiple of 32.
inline constexpr std::size_t kChunk = 16384;
struct Tensor {
  void* at[kRoles];
  std::uint64_t size;
  std::uint8_t dtype[kRoles];
  std::uint8_t packs;  // every role is aligned to four of its elements
};
struct Chunk {
  std::uint32_t tensor, index;
};
// In the device's memory.
struct TensorTable {
  const Tensor* tensors;
  const Chunk* chunks;
  std::size_t chunk_count;
};
// Roles as in fastops.h: parameter, shadow. `weights`: one a tensor, in the device's memory, in place of w. A seed:
// bfloat16 shadows round at random.
Status ema_update(const TensorTable& table, double w, const double* weights, const std::uint64_t* seed,
                  Stream stream) noexcept;
Status sgd_step(const TensorTable& table, const fastops_sgd& step, Stream stream) noexcept;
Status adamw_step(const TensorTable& table, const fastops_adamw& step, Stream stream) noexcept;

// Linear attention.

// Rows of heads; strides in elements. `packs`: groups of 8 elements lie together and are aligned to their size, 16
// bytes at most.
struct Heads {
  const void* data;
  std::ptrdiff_t batch[kBatchDimensions], head, row, col;
  bool packs;
};
inline constexpr std::size_t kMostTokens = std::size_t{1} << 30, kMostNumbers = std::size_t{1} << 20;
// C order: (sequences or batch, heads_kv, features, values) and without the last axis, or null.
struct LinearState {
  float *s, *z, *m;  // m: of exponential maps; not of gradients
};
struct LinearAttention {
  fastops_dtype dtype;  // F16, BF16 or F32
  fastops_feature_map map;
  bool causal, normalize, tf32;  // tf32: of F32, by the tensor cores
  std::size_t batch[kBatchDimensions];
  std::size_t heads_q, heads_kv, queries, keys, dim, features, values;  // at most kMostTokens, kMostNumbers
  float eps, kernel_eps, scale;
  Heads q, k, v, out;
  Heads mask, decay;       // mask: a byte a key
  const void* projection;  // of FAVOR: (features, dim), C order
  fastops_dtype projection_dtype;
  fastops_dtype decay_dtype;
  // `sequences` + 1 of them, int32 or int64 (wide_offsets), or null. They are clamped: the host has not seen them.
  const void* offsets;
  bool wide_offsets;
  std::size_t sequences;
  LinearState initial, final;
  // Of the gradient.
  Heads dy, y, dq, dk, dv;
  LinearState d_final, d_initial;
};
// Bytes of device memory that a call needs beside its arrays.
std::size_t linear_attention_workspace(const LinearAttention& call, bool gradient) noexcept;
Status linear_attention(const LinearAttention& call, void* workspace, Stream stream) noexcept;
Status linear_attention_backward(const LinearAttention& call, void* workspace, Stream stream) noexcept;
// One token: queries = keys = 1, `final` is the state, changed in place; features at most kMostStepFeatures.
inline constexpr std::size_t kMostStepFeatures = 3072;
Status linear_attention_step(const LinearAttention& call, Stream stream) noexcept;

// Nystrom attention.

inline constexpr std::size_t kMostLandmarks = 4096;
struct NystromAttention {
  fastops_dtype dtype;                            // F16, BF16 or F32
  bool ridge_solve, normalize, batch_init, tf32;  // tf32: of F32, by the tensor cores
  std::size_t iterations, taps;
  double ridge, scale;
  std::size_t batch[kBatchDimensions];
  std::size_t heads_q, heads_kv, queries, keys, dim, values, landmarks;  // at most kMostTokens, kMostNumbers
  Heads q, k, v, out;
  Heads mask;                             // a byte a key, one for all heads; of queries, too, where there are as many
  const void* conv;                       // (heads_q, taps), C order, or null
  const void *q_landmarks, *k_landmarks;  // (batch, heads, landmarks, dim), C order; null: means of segments
  fastops_dtype conv_dtype, q_landmarks_dtype, k_landmarks_dtype;
  float* info[4];  // (batch, heads_q) each, or null: residual, coefficient, least and largest sum of weights
  // Of the gradient.
  Heads dy, dq, dk, dv;
  float* d_conv;                         // (heads_q, taps)
  float *d_q_landmarks, *d_k_landmarks;  // as those given, or null: not wanted
};
std::size_t nystrom_attention_workspace(const NystromAttention& call, bool gradient) noexcept;
Status nystrom_attention(const NystromAttention& call, void* workspace, Stream stream) noexcept;
Status nystrom_attention_backward(const NystromAttention& call, void* workspace, Stream stream) noexcept;

}  // namespace fastops::gpu
#endif
