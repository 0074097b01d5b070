// SPDX-License-Identifier: BSD-3-Clause
// Linear attention on a GPU, by chunks of tokens: the chunks' sums f(k) v at once, a scan over them, then every row
// from the sums before its chunk and the weights within it. The gradients of q, k and v are products of the same form.
#include "attention/attention_blocks.h"
#include "attention/attention_math.h"

namespace fastops::FASTOPS_LEVEL {
namespace linear_kernels {

using namespace attention;

constexpr int kScanAhead = 8;  // chunks whose sums are under way at once
// Logarithms (base 2) of decays below it count as it: two to their power are 0.
constexpr double kLeastDecay = -256.0;

// Kinds of arithmetic beside that of attention_blocks.h.
struct ByBf16 {
  using S = std::uint16_t;
  static constexpr int kPitch = kTile + 8;
  static constexpr bool kKeepsRows = true;
  static FASTOPS_DEVICE S put(float x) { return half::to_bf16(x); }
  static FASTOPS_DEVICE float get(S x) { return half::from_bf16(x); }
  template <bool kTurnedA, bool kTurnedB>
  static FASTOPS_DEVICE void product(Sums& d, const S* a, const S* b, int depth, int columns) {
    const int lane = static_cast<int>(threadIdx.x) % 32, r = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
    a += kTurnedA ? (r + high) * kPitch + low : (r + low) * kPitch + high;
    b += kTurnedB ? (r + low) * kPitch + high : (r + high) * kPitch + low;
#pragma unroll 1
    for (int k = 0; k < depth; k += 16) {
      std::uint32_t rows[4];
      load_matrices<kTurnedA>(rows, a + (kTurnedA ? k * kPitch : k));
#pragma unroll
      for (int n = 0; n < kColumns; n += 2) {
        if (n * 8 >= columns) continue;
        std::uint32_t both[4];
        load_matrices<kTurnedB>(both, b + (kTurnedB ? k * kPitch + n * 8 : n * 8 * kPitch + k));
        multiply_tile<BF16>(d[n], rows, {both[0], both[1]});
        multiply_tile<BF16>(d[n + 1], rows, {both[2], both[3]});
      }
    }
  }
};

// Of floats with float16's fraction: its exponents would not hold sums of weights.
struct ByTf32 : ByFloats {
  static FASTOPS_DEVICE S put(float x) { return to_tf32(x); }
  template <bool kTurnedA, bool kTurnedB>
  static FASTOPS_DEVICE void product(Sums& d, const S* a, const S* b, int depth, int columns) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int k = t; k < depth; k += 8) {
      const float rows[4] = {at<kTurnedA>(a, g, k), at<kTurnedA>(a, g + 8, k), at<kTurnedA>(a, g, k + 4),
                             at<kTurnedA>(a, g + 8, k + 4)};
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        if (n * 8 >= columns) continue;
        multiply_tile_tf32(d[n], rows, {at<kTurnedB>(b, n * 8 + g, k), at<kTurnedB>(b, n * 8 + g, k + 4)});
      }
    }
  }
};
// Calls.

struct Decay {
  int whole;
  float part;  // in [0, 1)
};
FASTOPS_DEVICE float decay_between(const Decay& later, const Decay& earlier) {
  return fast_exp2(static_cast<float>(later.whole - earlier.whole) + (later.part - earlier.part));
}
struct Norm {
  float down, root;  // |x| = root / down, down a power of two
};
// What the kernels of a call share. Positions count tokens of a sequence so that a query sees the keys up to its own
// and chunks begin at multiples of their length: key j is at `lead` + j, query i at `shift` + i. Without causality both
// are 0.
struct Call {
  gpu::LinearAttention of;
  int group, chunk;                 // query heads of a key head; tokens of a chunk
  std::size_t state;                // numbers in a chunk's sums: S, then z
  int lead, shift;                  // without offsets
  std::int64_t chunks_k, chunks_q;  // of a sequence without offsets; with them, of all sequences at most
  std::int64_t* begins;             // with offsets: where sequences begin, and where their chunks do
  std::int64_t* first_chunks;
  Decay* decays;        // (batch, heads_kv, keys): the logarithm from the chunk's begin up to and with the token
  Decay* chunk_decays;  // (chunks, heads_kv)
  Norm *norms_q, *norms_k;
  // Of exponential maps: features made beforehand, in units of 2 to the largest exponent so far of the feature, and the
  // units of the rows.
  float *features_q, *features_k;    // (batch, heads, rows, features)
  float* tops;                       // (batch, heads_q, queries); null with the softmax map
  float* references;                 // the exponents: (chunks or, without causality, sequences, heads_kv, features)
  float* maxima;                     // (chunks, heads_kv, features)
  float* states;                     // (chunks, heads_kv, state): sums of each chunk, then those before it
  float* totals;                     // (sequences, heads_kv, state)
  float *inverses, *biases;          // (batch, heads_q, queries): 1 / denominator, -dy.y
  float *features_dq, *features_dk;  // gradients in features, of the cosine map and the exponential ones
};
// No exponent yet.
constexpr float kNone = -1e38f;
FASTOPS_HD bool has_exponents(fastops_feature_map map) { return map >= FASTOPS_MAP_EXP; }
// 2 to the difference of exponents, which are integers: exact. Of none and none it is 1.
FASTOPS_DEVICE float power_between(float from, float to) { return attention::times_power(1.0f, from - to); }

// Where a chunk is.
struct Place {
  std::int64_t sequence, batch;
  int chunk;  // within its sequence
  int begin, queries, keys, lead, shift;
  bool exists;
};
FASTOPS_DEVICE Place place_of(const Call& call, std::int64_t index, bool of_queries) {
  Place at;
  if (call.of.offsets == nullptr) {
    const std::int64_t chunks = of_queries ? call.chunks_q : call.chunks_k;
    at.sequence = at.batch = index / chunks;
    at.chunk = static_cast<int>(index - at.sequence * chunks);
    at.begin = 0;
    at.queries = static_cast<int>(call.of.queries);
    at.keys = static_cast<int>(call.of.keys);
    at.lead = call.lead;
    at.shift = call.shift;
    at.exists = true;
    return at;
  }
  std::int64_t low = 0, high = static_cast<std::int64_t>(call.of.sequences);
  at.exists = high > 0 && index < call.first_chunks[high];
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    if (call.first_chunks[middle] <= index)
      low = middle;
    else
      high = middle;
  }
  at.sequence = low;
  at.batch = 0;
  at.lead = at.shift = at.begin = at.keys = at.queries = at.chunk = 0;
  if (!at.exists) return at;
  at.chunk = static_cast<int>(index - call.first_chunks[low]);
  at.begin = static_cast<int>(call.begins[low]);
  at.keys = at.queries = static_cast<int>(call.begins[low + 1]) - at.begin;
  return at;
}

FASTOPS_DEVICE const char* head_of(const Call& call, const gpu::Heads& x, std::ptrdiff_t item, std::int64_t batch,
                                   std::int64_t head, std::int64_t first) {
  return attention::head_of(call.of.batch, x, item, batch, head, first);
}

// Rows that a block reads. In shared memory: all threads read the same.
enum class Kind { kQueries, kKeys, kValues, kGradients };
struct Source {
  const char* data;
  std::ptrdiff_t head, row, col;  // head in bytes
  const std::uint8_t* mask;
  std::ptrdiff_t mask_step;
  const Norm* norms;
  std::ptrdiff_t norms_head;
  int first, last;  // positions
  int columns;
  fastops_dtype dtype;
  bool packs, is_mapped;
  float factor;  // of features
};
FASTOPS_DEVICE void set_source(Source* to, const Call& call, Kind kind, const Place& at, std::int64_t head_q) {
  const gpu::LinearAttention& of = call.of;
  const bool of_keys = kind == Kind::kKeys || kind == Kind::kValues;
  const gpu::Heads& x = kind == Kind::kQueries  ? of.q
                        : kind == Kind::kKeys   ? of.k
                        : kind == Kind::kValues ? of.v
                                                : of.dy;
  const std::int64_t head = of_keys ? head_q / call.group : head_q;
  const std::ptrdiff_t item = item_of(of.dtype);
  to->data = head_of(call, x, item, at.batch, head, at.begin);
  to->head = x.head * item;
  to->row = x.row;
  to->col = x.col;
  to->mask = of_keys && of.mask.data != nullptr
                 ? reinterpret_cast<const std::uint8_t*>(head_of(call, of.mask, 1, at.batch, head, at.begin))
                 : nullptr;
  to->mask_step = of.mask.row;
  const std::size_t heads = of_keys ? of.heads_kv : of.heads_q, rows = of_keys ? of.keys : of.queries;
  const std::int64_t flat = (at.batch * static_cast<std::int64_t>(heads) + head) * static_cast<std::int64_t>(rows);
  const Norm* const norms = kind == Kind::kQueries ? call.norms_q : kind == Kind::kKeys ? call.norms_k : nullptr;
  to->norms = norms == nullptr ? nullptr : norms + flat + at.begin;
  to->norms_head = static_cast<std::ptrdiff_t>(rows);
  to->first = of_keys ? at.lead : at.shift;
  to->last = to->first + (of_keys ? at.keys : at.queries);
  to->columns = static_cast<int>(kind == Kind::kQueries || kind == Kind::kKeys ? of.dim : of.values);
  to->dtype = of.dtype;
  to->packs = x.packs && to->columns % 8 == 0;
  to->is_mapped = kind == Kind::kQueries || kind == Kind::kKeys;
  to->factor = kind == Kind::kQueries ? of.scale : 1.0f;
  if (call.references == nullptr || !to->is_mapped) return;
  // Features that were made before.
  const auto features = static_cast<std::ptrdiff_t>(of.features);
  const float* const made = kind == Kind::kQueries ? call.features_q : call.features_k;
  to->data = reinterpret_cast<const char*>(made + (flat + at.begin) * features);
  to->head = static_cast<std::ptrdiff_t>(rows) * features * 4;
  to->row = features;
  to->col = 1;
  to->columns = static_cast<int>(features);
  to->dtype = FASTOPS_F32;
  to->packs = features % 8 == 0;
  to->is_mapped = false;
  to->factor = 1.0f;
}
// A state's S, read as rows.
FASTOPS_DEVICE void set_state_source(Source* to, const Call& call, const float* state) {
  *to = Source{};
  to->data = reinterpret_cast<const char*>(state);
  to->row = static_cast<std::ptrdiff_t>(call.of.values);
  to->col = 1;
  to->last = static_cast<int>(call.of.features);
  to->columns = static_cast<int>(call.of.values);
  to->dtype = FASTOPS_F32;
  to->factor = 1.0f;
  to->packs = call.of.values % 8 == 0;
}
FASTOPS_DEVICE bool lives(const Source& from, int position) {
  return position >= from.first && position < from.last &&
         (from.mask == nullptr || from.mask[(position - from.first) * from.mask_step] != 0);
}

// A number's feature; beyond the row's numbers the constant one of the cosine map.
FASTOPS_DEVICE float map_feature(const Call& call, float x, bool is_number, const Norm& norm) {
  switch (call.of.map) {
    case FASTOPS_MAP_ELU:
      return attention::elu_feature(x);
    case FASTOPS_MAP_RELU:
      return attention::rectified(x) + call.of.kernel_eps;
    case FASTOPS_MAP_RELU2: {
      const float r = attention::rectified(x);
      return simd::fma(r, r, call.of.kernel_eps);
    }
    case FASTOPS_MAP_COSINE:
      return is_number ? x * norm.down / norm.root : 1.0f;
    default:
      return x;
  }
}
// The derivative's product with a feature's gradient.
FASTOPS_DEVICE float map_gradient(fastops_feature_map map, float x, float d) {
  switch (map) {
    case FASTOPS_MAP_ELU:
      return x < 0.0f ? d * attention::elu_feature(x) : d;
    case FASTOPS_MAP_RELU:
      return x > 0.0f ? d : x * 0.0f;
    case FASTOPS_MAP_RELU2:
      return x > 0.0f ? d * (x + x) : x * 0.0f;
    default:
      return d;
  }
}

// Eight numbers that lie together.
template <class A> FASTOPS_DEVICE void read_pack(const char* data, fastops_dtype dtype, float (&x)[8]) {
  if (std::is_same_v<A, ByFp32> || dtype == FASTOPS_F32) {
    const auto v = load_vector<Vector<float, 8>>(data);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = v.v[i];
  } else {
    const auto v = load_vector<Vector<std::uint16_t, 8>>(data);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = std::is_same_v<A, ByBf16> ? half::from_bf16(v.v[i]) : half::from_f16(v.v[i]);
  }
}

// The rows from a position on and the columns from `column` on to shared memory, features where the source is mapped,
// times a factor for each row (null: 1); zeros where there is no row. Whether some number is not finite.
template <class A>
FASTOPS_DEVICE bool load_tile(typename A::S* to, const Call& call, const Source& from, int head, int position,
                              int column, const float* factors) {
  constexpr int kRows = kThreads * 8 / kTile, kAhead = 2;
  const char* const data = from.data + head * from.head;
  const Norm* const norms = from.norms == nullptr ? nullptr : from.norms + head * from.norms_head;
  const auto features = from.is_mapped ? static_cast<int>(call.of.features) : from.columns;
  const int t = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  if constexpr (std::is_same_v<A, ByBf16>) {
    // Values as they are.
    if (from.packs && !from.is_mapped && factors == nullptr && from.dtype == FASTOPS_BF16) {
      constexpr int kLoads = kTile / kRows;
      using Words = Vector<std::uint32_t, 4>;
      Words v[kLoads];
      const int row = t / (kTile / 8), c = t % (kTile / 8) * 8, col = column + c;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int p = position + row + i * kRows;
        v[i] = lives(from, p) && col < from.columns ? load_vector<Words>(data + ((p - from.first) * from.row + col) * 2)
                                                    : Words{};
      }
      std::uint32_t wild = 0;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        // An exponent of ones carries into the sign.
#pragma unroll
        for (int j = 0; j < 4; ++j) wild |= ((v[i].v[j] & 0x7f807f80u) + 0x00800080u) & 0x80008000u;
        store_vector(to + (row + i * kRows) * A::kPitch + c, v[i]);
      }
      return wild != 0;
    }
  }
  if (from.packs) {
    const int c = t % (kTile / 8) * 8, col = column + c;
    const std::ptrdiff_t item = item_of(from.dtype);
#pragma unroll 1
    for (int row = t / (kTile / 8); row < kTile; row += kAhead * kRows) {
      float x[kAhead][8];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int p = position + row + i * kRows;
        if (lives(from, p) && col < from.columns) {
          read_pack<A>(data + ((p - from.first) * from.row + col) * item, from.dtype, x[i]);
        } else {
#pragma unroll
          for (int j = 0; j < 8; ++j) x[i][j] = 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int p = position + row + i * kRows;
        float factor = from.factor;
        if (factors != nullptr) factor *= factors[row + i * kRows];
        if (!lives(from, p)) factor = 0.0f;
        if (from.is_mapped) {
          const Norm norm = norms == nullptr || factor == 0.0f ? Norm{0.0f, 1.0f} : norms[p - from.first];
#pragma unroll
          for (int j = 0; j < 8; ++j) x[i][j] = map_feature(call, x[i][j], col < from.columns, norm);
        }
        Vector<typename A::S, 8> v;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          v.v[j] = A::put(col + j < features ? x[i][j] * factor : 0.0f);
          sum = simd::fma(A::get(v.v[j]), 0.0f, sum);
        }
        store_vector(to + (row + i * kRows) * A::kPitch + c, v);
      }
    }
    return sum != sum;
  }
  const int c = t % kTile, col = column + c;
#pragma unroll 1
  for (int row = t / kTile; row < kTile; row += kThreads / kTile) {
    const int p = position + row;
    float x = 0.0f;
    if (lives(from, p) && col < features) {
      if (col < from.columns) x = element_of(data, (p - from.first) * from.row + col * from.col, from.dtype);
      if (from.is_mapped)
        x = map_feature(call, x, col < from.columns, norms == nullptr ? Norm{0.0f, 1.0f} : norms[p - from.first]);
      x *= factors == nullptr ? from.factor : from.factor * factors[row];
    }
    const typename A::S stored = A::put(x);
    sum = simd::fma(A::get(stored), 0.0f, sum);
    to[row * A::kPitch + c] = stored;
  }
  return sum != sum;
}

// What a block keeps of the rows or columns of a tile.
struct Along {
  Decay decay[kTile];
  float factor[kTile], bias[kTile];
};
// Their decays, and for queries 1 / denominator and -dy.y.
FASTOPS_DEVICE void load_along(Along* to, const Call& call, const Place& at, int position, std::int64_t head_q,
                               bool with_inverses) {
  const int t = static_cast<int>(threadIdx.x);
  if (t >= kTile) return;
  const int p = position + t, key = p - at.lead, query = p - at.shift;
  const std::int64_t head_k = head_q / call.group;
  Decay decay{0, 0.0f};
  if (call.decays != nullptr && key >= 0 && key < at.keys)
    decay = call.decays[(at.batch * static_cast<std::int64_t>(call.of.heads_kv) + head_k) *
                            static_cast<std::int64_t>(call.of.keys) +
                        at.begin + key];
  to->decay[t] = decay;
  float factor = 1.0f, bias = 0.0f;
  if (with_inverses) {
    const bool exists = query >= 0 && query < at.queries;
    const std::int64_t i =
        (at.batch * static_cast<std::int64_t>(call.of.heads_q) + head_q) * static_cast<std::int64_t>(call.of.queries) +
        at.begin + query;
    factor = exists ? call.inverses[i] : 0.0f;
    bias = exists ? call.biases[i] : 0.0f;
  }
  to->factor[t] = factor;
  to->bias[t] = bias;
}
// Sums of a chunk: of f(k) v and f(k), or, for the gradient of the state, of f(q) dy / denominator and f(q) times what
// the denominator's own gradient is. A block makes 64 features by 64 values of them.
template <class A>
__global__ void __launch_bounds__(kThreads) sums_kernel(const __grid_constant__ Call call, bool of_queries) {
  using S = typename A::S;
  alignas(16) __shared__ S x[kTile * A::kPitch], y[kTile * A::kPitch];
  __shared__ Source sources[2];
  __shared__ Along along;
  __shared__ float factors[kTile], weights[kTile];
  const gpu::LinearAttention& of = call.of;
  const auto features = static_cast<int>(of.features), values = static_cast<int>(of.values);
  const auto across = static_cast<unsigned>((values + kTile - 1) / kTile);
  const auto down = static_cast<unsigned>((features + kTile - 1) / kTile);
  const auto heads = static_cast<unsigned>(of.heads_kv);
  const int e0 = static_cast<int>(blockIdx.x % across) * kTile,
            f0 = static_cast<int>(blockIdx.x / across % down) * kTile;
  const unsigned rest = blockIdx.x / across / down, head = rest % heads, index = rest / heads;
  const Place at = place_of(call, index, of_queries);
  if (!at.exists) return;
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  const std::int64_t head_q = static_cast<std::int64_t>(head) * call.group;
  if (t < 2)
    set_source(&sources[t], call,
               t == 0 ? (of_queries ? Kind::kQueries : Kind::kKeys) : (of_queries ? Kind::kGradients : Kind::kValues),
               at, head_q);
  __syncthreads();

  const int first = at.chunk * call.chunk;
  const bool with_decay = call.decays != nullptr, with_inverses = of_queries && call.inverses != nullptr;
  const Decay all = with_decay ? call.chunk_decays[static_cast<std::size_t>(index) * heads + head] : Decay{0, 0.0f};
  const int depth_f = smaller(features - f0, kTile), depth_e = smaller(values - e0, kTile);
  Sums d = {};
  float sum = 0.0f;
  for (int r = 0; r < (of_queries ? call.group : 1); ++r)
    for (int p = first; p < first + call.chunk; p += kTile) {
      if (p >= sources[0].last || p + kTile <= sources[0].first) continue;
      load_along(&along, call, at, p, head_q + r, with_inverses);
      if (t < kTile) {
        float factor = along.factor[t];
        const Decay decay = along.decay[t];
        if (with_decay) factor *= of_queries ? decay_between(decay, Decay{0, 0.0f}) : decay_between(all, decay);
        factors[t] = factor;
        weights[t] = of_queries ? factor * along.bias[t] : factor;
      }
      __syncthreads();
#pragma unroll 1
      for (int operand = 0; operand < 2; ++operand)
        load_tile<A>(operand == 0 ? x : y, call, sources[operand], r, p, operand == 0 ? f0 : e0,
                     operand == 0 ? nullptr : factors);
      __syncthreads();
      if (warp * 16 < depth_f) A::template product<true, true>(d, x + warp * 16, y, kTile, depth_e);
      if (t < kTile)
        for (int i = 0; i < kTile; ++i) sum = simd::fma(A::get(x[i * A::kPitch + t]), weights[i], sum);
      __syncthreads();
    }

  float* const to = call.states + (static_cast<std::size_t>(index) * heads + head) * call.state;
  const int g = t % 32 / 4 + warp * 16, c = t % 4 * 2;
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int f = g + i / 2 * 8, e = n * 8 + c + i % 2;
      if (f < depth_f && e < depth_e)
        to[static_cast<std::size_t>(f0 + f) * of.values + static_cast<std::size_t>(e0 + e)] = d[n][i];
    }
  if (e0 == 0 && t < depth_f) to[of.features * of.values + static_cast<std::size_t>(f0 + t)] = sum;
}

// The sums before each chunk (after it, backwards) in place of its own, and those over all chunks. A thread has one
// number of a state.
struct Scan {
  gpu::LinearState from, to;
  bool backward, of_queries;
};
__global__ void __launch_bounds__(2 * kThreads) scan_kernel(const __grid_constant__ Call call, const Scan scan) {
  const std::size_t heads = call.of.heads_kv, in_s = call.of.features * call.of.values, used = in_s + call.of.features;
  const auto pieces = static_cast<unsigned>((used + blockDim.x - 1) / blockDim.x);
  const std::size_t i = blockIdx.x % pieces * static_cast<std::size_t>(blockDim.x) + threadIdx.x;
  const std::size_t rest = blockIdx.x / pieces, head = rest % heads, sequence = rest / heads;
  if (i >= used) return;
  std::int64_t first = 0, count = scan.of_queries ? call.chunks_q : call.chunks_k;
  if (call.of.offsets != nullptr) {
    first = call.first_chunks[sequence];
    count = call.first_chunks[sequence + 1] - first;
  } else {
    first = static_cast<std::int64_t>(sequence) * count;
  }
  const std::size_t which = sequence * heads + head;
  const auto place = [&](const gpu::LinearState& state) {
    return i < in_s ? state.s + which * in_s + i : state.z + which * call.of.features + (i - in_s);
  };
  // The units of exponential maps: those of the sums so far, and of each chunk's.
  const std::size_t features = call.of.features, feature = i < in_s ? i / call.of.values : i - in_s;
  const bool has_units = call.references != nullptr, moves = has_units && call.of.causal;
  const auto unit_of = [&](std::int64_t c) {
    return call.references[(static_cast<std::size_t>(c) * heads + head) * features + feature];
  };
  const float given = has_units && call.of.initial.m != nullptr ? call.of.initial.m[which * features + feature] : kNone;
  const float begin = given > kNone ? given : kNone;
  float unit = begin;
  if (scan.backward && count > 0 && moves) unit = unit_of(first + count - 1);
  // Without causality all have one unit.
  const float all = has_units && !moves ? power_between(begin, unit_of(static_cast<std::int64_t>(sequence))) : 1.0f;
  float running = scan.from.s != nullptr ? *place(scan.from) : 0.0f;
  if (!scan.backward) running *= all;
  for (std::int64_t done = 0; done < count; done += kScanAhead) {
    float own[kScanAhead], keep[kScanAhead];  // keep: what is left of the sums before, in the units of the chunk
#pragma unroll
    for (int j = 0; j < kScanAhead; ++j) {
      const std::int64_t c = first + (scan.backward ? count - 1 - done - j : done + j);
      const bool exists = done + j < count;
      own[j] = exists ? call.states[(static_cast<std::size_t>(c) * heads + head) * call.state + i] : 0.0f;
      keep[j] = exists && call.decays != nullptr
                    ? decay_between(call.chunk_decays[static_cast<std::size_t>(c) * heads + head], Decay{0, 0.0f})
                    : 1.0f;
      if (moves && exists) {
        const float next = !scan.backward ? unit_of(c) : c > first ? unit_of(c - 1) : begin;
        keep[j] = scan.backward ? power_between(next, unit) : power_between(unit, next);
        unit = next;
      }
    }
#pragma unroll
    for (int j = 0; j < kScanAhead; ++j) {
      if (done + j >= count) continue;
      const std::int64_t c = first + (scan.backward ? count - 1 - done - j : done + j);
      if (moves && !scan.backward) running *= keep[j];
      call.states[(static_cast<std::size_t>(c) * heads + head) * call.state + i] = running;
      running = moves ? running + own[j] : simd::fma(running, keep[j], own[j]);
      if (moves && scan.backward) running *= keep[j];
    }
  }
  if (call.totals != nullptr) call.totals[which * call.state + i] = running;
  if (scan.backward) running *= all;
  if (scan.to.s != nullptr) *place(scan.to) = running;
}

// Rows of a result: sum over the tokens that a row sees of (a.b) c, and a times the state M. Queries see earlier keys,
// keys are seen by later queries.
//                 a      b      c      M      then
enum class Role {
  kForward,       // f(q)   f(k)   v      S      / denominator
  kDenominators,  // f(q)   f(k)          z
  kQueries,       // dy     v      f(k)   S^T    / denominator, f'(q)
  kKeys,          // v      dy     f(q)   dS^T   f'(k)
  kValues,        // f(k)   f(q)   dy     dS
};
FASTOPS_DEVICE bool is_of_keys(Role role) { return role >= Role::kKeys; }

// Takes what is not finite out of y, and adds it, times w, to the rows that see it: elsewhere 0 times it would be
// added. What is left goes through the same product as other tiles, whose rounding the tensor cores have to themselves.
template <class A>
FASTOPS_DEVICE void take_wild(Sums& d, const typename A::S* w, typename A::S* y, int row, bool later) {
  const auto is_wild = [](float x) { return x * 0.0f != 0.0f; };
  const int t = static_cast<int>(threadIdx.x), c = t % 4 * 2;
#pragma unroll 1
  for (int k = 0; k < kTile; ++k)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = row + i / 2 * 8;
        const float x = A::get(y[k * A::kPitch + n * 8 + c + i % 2]);
        if (is_wild(x) && (later ? k >= at : k <= at))
          d[n][i] = simd::fma(A::get(w[i / 2 * 8 * A::kPitch + k]), x, d[n][i]);
      }
  __syncthreads();
  for (int i = t; i < kTile * kTile; i += kThreads) {
    typename A::S& x = y[i / kTile * A::kPitch + i % kTile];
    if (is_wild(A::get(x))) x = A::put(0.0f);
  }
  __syncthreads();
}

// Two kernels: of the first two roles and of the others.
template <class A, bool kGradient>
__global__ void __launch_bounds__(kThreads, 4) rows_kernel(const __grid_constant__ Call call, const Role role) {
  using S = typename A::S;
  constexpr int kSize = kTile * A::kPitch;
  alignas(16) __shared__ S x[kSize], y[kSize], third[A::kKeepsRows ? kSize : 8];
  // A warp reads no rows of x but its own: where there is no room it writes the weights over them.
  S* const w = A::kKeepsRows ? third : x;
  __shared__ Source sources[4], state_source;
  __shared__ Along rows, columns;
  __shared__ float z[kTile], state_sums[kTile];
  const gpu::LinearAttention& of = call.of;
  const bool of_keys = kGradient && is_of_keys(role), later = of_keys;
  const auto heads = static_cast<unsigned>(of_keys ? of.heads_kv : of.heads_q);
  const int values = static_cast<int>(of.values), features = static_cast<int>(of.features);
  const bool is_turned = kGradient && role != Role::kValues, is_dq = kGradient && role == Role::kQueries;
  const bool is_y = !kGradient && role == Role::kForward;
  const bool has_units = call.references != nullptr;
  const int dim = has_units ? features : static_cast<int>(of.dim);
  const int width = is_turned ? dim : kGradient || is_y ? values : 1;
  const int depth = is_turned ? values : features;
  const auto across = static_cast<unsigned>((width + kTile - 1) / kTile);
  const auto tiles = static_cast<unsigned>(call.chunk / kTile);
  const int n0 = static_cast<int>(blockIdx.x % across) * kTile;
  const int tile = static_cast<int>(blockIdx.x / across % tiles);
  const unsigned rest = blockIdx.x / across / tiles, head = rest % heads, index = rest / heads;
  const Place at = place_of(call, index, !of_keys);
  if (!at.exists) return;
  const int begin = at.chunk * call.chunk, position = begin + tile * kTile;
  const std::int64_t head_q = of_keys ? static_cast<std::int64_t>(head) * call.group : head,
                     head_k = head_q / call.group;
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, g = t % 32 / 4 + warp * 16, c = t % 4 * 2;
  const int own = warp * 16 * A::kPitch;
  constexpr Kind kinds[] = {Kind::kQueries, Kind::kKeys, Kind::kValues, Kind::kGradients};
  if (t < 4 && (t < 3 || of.dy.data != nullptr)) set_source(&sources[t], call, kinds[t], at, head_q);
  __syncthreads();
  const Source& out_rows = sources[of_keys ? 1 : 0];
  if (position >= out_rows.last || position + kTile <= out_rows.first) return;
  const Source& a = sources[is_dq ? 3 : is_turned ? 2 : of_keys ? 1 : 0];
  const Source& b = sources[is_dq ? 2 : is_turned ? 3 : of_keys ? 0 : 1];
  const Source& third_source = sources[is_y ? 2 : is_dq ? 1 : is_turned ? 0 : 3];
  const bool normalizes = of.normalize, with_decay = call.decays != nullptr;
  const bool with_inverses = kGradient && call.inverses != nullptr;

  load_along(&rows, call, at, position, head_q, with_inverses && !of_keys);
  // The sums before the chunk; without causality those of all.
  const std::size_t chunk_state =
      static_cast<std::size_t>(of.causal ? index : at.sequence) * of.heads_kv + static_cast<std::size_t>(head_k);
  const float* const state = (of.causal ? call.states : call.totals) + chunk_state * call.state;
  const float* const state_z = state + of.features * of.values;
  if (t == 0) set_state_source(&state_source, call, state);
  if (t < kTile) z[t] = is_turned && n0 + t < static_cast<int>(of.features) ? state_z[n0 + t] : 0.0f;

  __syncthreads();

  Sums d = {};
  float denominators[2] = {0.0f, 0.0f}, of_state = 0.0f;
  const int panels = (depth + kTile - 1) / kTile, most = smaller(width - n0, kTile);
  const bool keeps = A::kKeepsRows && panels == 1;
  // The tiles of b: before the first the state.
  const int from = of_keys ? position : begin;
  const int to = of_keys ? (b.last < begin + call.chunk ? b.last : begin + call.chunk) : position + kTile;
  const int groups = of_keys ? call.group : 1;
  const int per_group = of.causal && to > from ? (to - from + kTile - 1) / kTile : 0;
  const bool has_state = !of.causal || (later ? of.d_final.s != nullptr || begin + call.chunk < out_rows.last
                                              : of.initial.s != nullptr || at.chunk > 0);
  bool is_loaded = false;
  for (int step = has_state ? -1 : 0; step < per_group * groups; ++step) {
    const bool is_state = step < 0;
    const int r = is_state ? 0 : step / per_group;
    const int p = is_state ? 0 : from + (step - r * per_group) * kTile;
    if (!is_state && (p >= b.last || p + kTile <= b.first)) continue;
    const int tokens = is_state || b.last - p > kTile ? kTile : b.last - p;
    Sums weights = {};
    for (int panel = 0; panel < panels; ++panel) {
      const int k0 = panel * kTile, steps = rounded_up(smaller(depth - k0, kTile), 16);
      __syncthreads();
      const bool turned = is_state && is_turned;
#pragma unroll 1
      for (int operand = is_loaded ? 1 : 0; operand < 2; ++operand) {
        const bool of_a = operand == 0;
        load_tile<A>(of_a ? x : y, call,
                     of_a       ? a
                     : is_state ? state_source
                                : b,
                     of_a ? 0 : r,
                     of_a       ? position
                     : is_state ? (turned ? n0 : k0)
                                : p,
                     !of_a && is_state && !turned ? n0 : k0, nullptr);
      }
      is_loaded = keeps;
      if (!is_state && panel == 0) load_along(&columns, call, at, p, head_q + r, with_inverses && of_keys);
      __syncthreads();
      if (!is_state)
        A::template product<false, false>(weights, x + own, y, steps, tokens);
      else if (turned)
        A::template product<false, false>(d, x + own, y, steps, most);
      else if (kGradient || is_y)
        A::template product<false, true>(d, x + own, y, steps, most);
      if (is_state && !kGradient && normalizes)
        for (int k = t % 2; k < steps && k0 + k < features; k += 2)
          of_state = simd::fma(A::get(x[t / 2 * A::kPitch + k]), state_z[k0 + k], of_state);
    }
    if (is_state) {
      // The state decays up to the row, or from it on.
      of_state += __shfl_xor_sync(~0u, of_state, 1);
      const Decay all = with_decay && later ? call.chunk_decays[static_cast<std::size_t>(index) * of.heads_kv + head]
                                            : Decay{0, 0.0f};
      if (t % 2 == 0) state_sums[t / 2] = of_state;
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = g + half * 8;
        const Decay decay = rows.decay[row];
        const float factor = !with_decay ? 1.0f : later ? decay_between(all, decay) : decay_between(decay, all);
        const float extra = is_dq ? rows.bias[row] : 1.0f;
        denominators[half] = t % 4 == 0 ? state_sums[row] * factor : 0.0f;
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            d[n][half * 2 + i] =
                (is_turned ? simd::fma(extra, z[n * 8 + c + i], d[n][half * 2 + i]) : d[n][half * 2 + i]) * factor;
      }
      continue;
    }

    const bool diagonal = p == position;
    S* const own_w = w + own;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, col = n * 8 + c + i % 2;
        float weight = weights[n][i];
        if (is_turned) weight += rows.bias[row] + columns.bias[col];
        if (kGradient) weight *= columns.factor[col];
        if (with_decay)
          weight *= later ? decay_between(columns.decay[col], rows.decay[row])
                          : decay_between(rows.decay[row], columns.decay[col]);
        if (diagonal && (later ? col < row : col > row)) weight = 0.0f;
        const S stored = A::put(weight);
        denominators[i / 2] += A::get(stored);
        own_w[(row - warp * 16) * A::kPitch + col] = stored;
      }
    if (!kGradient && !is_y) continue;
    __syncthreads();
    const bool wild = load_tile<A>(y, call, third_source, r, p, n0, nullptr);
    if (__syncthreads_or(wild) && diagonal) take_wild<A>(d, own_w + (g - warp * 16) * A::kPitch, y, g, later);
    A::template product<false, true>(d, own_w, y, rounded_up(tokens, 16), most);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    denominators[half] += __shfl_xor_sync(~0u, denominators[half], 1);
    denominators[half] += __shfl_xor_sync(~0u, denominators[half], 2);
    if (!has_units) denominators[half] += of.eps;
  }
  const auto length = static_cast<std::int64_t>(of_keys ? of.keys : of.queries);
  const std::int64_t flat = (at.batch * heads + head) * length + at.begin;
  // Of exponential maps sums are in units of 2^top.
  const auto top_of = [&](int row) {
    return has_units && call.tops != nullptr && row >= 0 && row < at.queries ? call.tops[flat + row] : 0.0f;
  };
  const auto scaled_eps = [&](float top) { return has_units && of.eps != 0.0f ? of.eps * math::exp2(-top) : 0.0f; };
  if (!kGradient && !is_y) {
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (c == 0) state_sums[g + half * 8] = denominators[half];
    __syncwarp();
    const int row = position + t / 2 - at.shift;
    const bool exists = row >= 0 && row < at.queries;
    const char* const dy = head_of(call, of.dy, item_of(of.dtype), at.batch, head_q, at.begin + row);
    const char* const result = head_of(call, of.y, item_of(of.dtype), at.batch, head_q, at.begin + row);
    float sum = 0.0f;
    for (int e = t % 2; e < values && exists; e += 2)
      sum = simd::fma(element_of(dy, e * of.dy.col, of.dtype), element_of(result, e * of.y.col, of.dtype), sum);
    sum += __shfl_xor_sync(~0u, sum, 1);
    if (t % 2 != 0 || !exists) return;
    const float top = top_of(row), denominator = state_sums[t / 2] + scaled_eps(top);
    const std::int64_t i = flat + row;
    if (!normalizes) {
      call.inverses[i] = math::exp2(top);
      call.biases[i] = 0.0f;
      return;
    }
    // Of smaller ones the inverse times a feature might overflow.
    call.inverses[i] = denominator < 0x1p-100f && denominator > -0x1p-100f ? 0.0f : 1.0f / denominator;
    call.biases[i] = -sum;
    return;
  }

  float* const of_features = !is_turned ? nullptr : is_dq ? call.features_dq : call.features_dk;
  S* const own_w = w + own;
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = g + half * 8, p = position + row;
    float factor = 1.0f;
    const float top = is_y ? top_of(p - out_rows.first) : 0.0f;
    if (is_y && normalizes)
      factor = denominators[half] + scaled_eps(top);
    else if (is_y && has_units)
      factor = math::exp2(top);
    const bool divides = is_y && normalizes, empty = divides && factor < 0x1p-126f && factor > -0x1p-126f;
    if (is_dq) factor = (has_units ? 1.0f : of.scale) * rows.factor[row];
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float v = d[n][half * 2 + i], scaled = divides ? (empty ? 0.0f : v / factor) : v * factor;
        const int col = n * 8 + c + i;
        if (of_features == nullptr)
          own_w[(row - warp * 16) * A::kPitch + col] = A::put(scaled);
        else if (col < most && p >= out_rows.first && p < out_rows.last)
          of_features[(flat + p - out_rows.first) * width + n0 + col] = scaled;
      }
  }
  if (of_features != nullptr) return;
  __syncwarp();
  const gpu::Heads& target = is_y ? of.out : is_dq ? of.dq : is_turned ? of.dk : of.dv;
  const fastops_dtype dtype = of.dtype;
  for (int i = t % 32; i < 16 * kTile / 8; i += 32) {
    const int r = i / (kTile / 8), at_column = i % (kTile / 8) * 8, column = n0 + at_column;
    const int p = position + warp * 16 + r, row = p - out_rows.first;
    if (p < out_rows.first || p >= out_rows.last || column >= width) continue;
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = A::get(own_w[r * A::kPitch + at_column + j]);
    if (of_keys && !lives(out_rows, p)) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = 0.0f;
    } else if (is_turned) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (column + j < width)
          v[j] = map_gradient(of.map,
                              element_of(out_rows.data, row * out_rows.row + (column + j) * out_rows.col, dtype), v[j]);
    }
    char* data = const_cast<char*>(head_of(call, target, item_of(dtype), at.batch, head, at.begin + row));
    const std::ptrdiff_t step = target.col;
    data += column * step * item_of(dtype);
    if (target.packs && column + 8 <= width) {
      if (dtype == FASTOPS_F32) {
        Vector<float, 8> all;
#pragma unroll
        for (int j = 0; j < 8; ++j) all.v[j] = v[j];
        store_vector(data, all);
      } else {
        Vector<std::uint16_t, 8> all;
#pragma unroll
        for (int j = 0; j < 8; ++j) all.v[j] = dtype == FASTOPS_F16 ? half::to_f16(v[j]) : half::to_bf16(v[j]);
        store_vector(data, all);
      }
    } else {
      for (int j = 0; j < 8 && column + j < width; ++j) set_element(data, j * step, dtype, v[j]);
    }
  }
}

// What is made before: a warp for each chunk or row.

// Offsets that lie in the array and rise, whatever the caller's are, and the first chunk of each sequence.
__global__ void __launch_bounds__(kThreads) sequences_kernel(const __grid_constant__ Call call) {
  __shared__ std::int64_t shared[kThreads];
  const gpu::LinearAttention& of = call.of;
  const auto count = static_cast<std::int64_t>(of.sequences), length = static_cast<std::int64_t>(of.keys);
  const int t = static_cast<int>(threadIdx.x);
  // The largest of, or the sum of, what the threads up to this one have.
  const auto scanned = [&](std::int64_t own, bool largest) {
    shared[t] = own;
    __syncthreads();
    for (int d = 1; d < kThreads; d *= 2) {
      const std::int64_t other = t >= d ? shared[t - d] : 0;
      __syncthreads();
      shared[t] = !largest ? shared[t] + other : other > shared[t] ? other : shared[t];
      __syncthreads();
    }
    return shared[t];
  };
  std::int64_t before = 0;
  for (std::int64_t base = 0; base <= count; base += kThreads) {
    const std::int64_t i = base + t;
    std::int64_t own = 0;
    if (i <= count)
      own = of.wide_offsets ? static_cast<const std::int64_t*>(of.offsets)[i]
                            : static_cast<const std::int32_t*>(of.offsets)[i];
    own = own < before ? before : own;
    own = scanned(own > length ? length : own, true);
    if (i <= count) call.begins[i] = own;
    before = shared[kThreads - 1];
    __syncthreads();
  }
  before = 0;
  if (t == 0) call.first_chunks[0] = 0;
  for (std::int64_t base = 0; base < count; base += kThreads) {
    const std::int64_t i = base + t;
    const std::int64_t tokens = i < count ? call.begins[i + 1] - call.begins[i] : 0;
    const std::int64_t chunks = scanned((tokens + call.chunk - 1) / call.chunk, false);
    if (i < count) call.first_chunks[i + 1] = before + chunks;
    before += shared[kThreads - 1];
    __syncthreads();
  }
}

FASTOPS_DEVICE Decay split(double logarithm) {
  // (Of nan there is no whole number.)
  const int whole = logarithm == logarithm ? static_cast<int>(logarithm) : 0;
  const int down = whole - (logarithm < whole);
  return {down, static_cast<float>(logarithm - down)};
}
// Logarithms of the decay from the begin of a chunk up to each of its tokens. Sums of steep ones are in double
// precision, and kept as a whole number and a fraction: their differences are what counts.
__global__ void __launch_bounds__(kThreads) decays_kernel(const __grid_constant__ Call call, std::size_t warps) {
  const gpu::LinearAttention& of = call.of;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::size_t i = (static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (i >= warps) return;
  const std::size_t index = i / of.heads_kv, head = i % of.heads_kv;
  const Place at = place_of(call, static_cast<std::int64_t>(index), false);
  if (!at.exists) return;
  const std::ptrdiff_t item = item_of(of.decay_dtype);
  const char* const data = head_of(call, of.decay, item, at.batch, static_cast<std::int64_t>(head), at.begin);
  Decay* const to = call.decays + (static_cast<std::size_t>(at.batch) * of.heads_kv + head) * of.keys + at.begin;
  const int first = at.chunk * call.chunk - at.lead;
  double sum = 0.0;
  for (int j = first; j < first + call.chunk; j += 32) {
    const int key = j + lane;
    double own = 0.0;
    if (key >= 0 && key < at.keys)
      own = 1.4426950408889634 * static_cast<double>(element_of(data, key * of.decay.row, of.decay_dtype));
    own = own < kLeastDecay ? kLeastDecay : own > 0.0 ? 0.0 : own;
    for (int d = 1; d < 32; d *= 2) {
      const double other = __shfl_sync(~0u, own, static_cast<unsigned>(lane >= d ? lane - d : lane));
      if (lane >= d) own += other;
    }
    own += sum;
    if (key >= 0 && key < at.keys) to[key] = split(own);
    sum = __shfl_sync(~0u, own, 31u);
  }
  if (lane == 0) call.chunk_decays[i] = split(sum);
}

// A power of two that brings a number next to 1. (Of subnormal ones the inverse would overflow.)
FASTOPS_DEVICE float power_down(float largest) {
  const int exponent = static_cast<int>(simd::bits<std::uint32_t>(largest) >> 23 & 255) - 126;
  return simd::bits<float>(static_cast<std::uint32_t>(127 - (exponent < -120 ? -120 : exponent)) << 23);
}
// |x| of the rows of q or k.
__global__ void __launch_bounds__(kThreads) norms_kernel(const __grid_constant__ Call call, bool of_queries) {
  const gpu::LinearAttention& of = call.of;
  const gpu::Heads& x = of_queries ? of.q : of.k;
  const std::size_t heads = of_queries ? of.heads_q : of.heads_kv, rows = of_queries ? of.queries : of.keys;
  const int lane = static_cast<int>(threadIdx.x) % 32, dim = static_cast<int>(of.dim);
  const std::size_t i = (static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const std::size_t row = i % rows, head = i / rows % heads, batch = i / rows / heads;
  std::size_t batches = 1;
  for (const std::size_t length : of.batch) batches *= length;
  if (batch >= batches) return;
  const char* const data = head_of(call, x, item_of(of.dtype), static_cast<std::int64_t>(batch),
                                   static_cast<std::int64_t>(head), static_cast<std::int64_t>(row));
  float largest = 0.0f;
  for (int d = lane; d < dim; d += 32) {
    const float v = element_of(data, d * x.col, of.dtype), size = v < 0.0f ? -v : v;
    largest = size <= largest ? largest : size;
  }
  for (unsigned d = 16; d != 0; d /= 2) {
    const float other = __shfl_xor_sync(~0u, largest, d);
    largest = other <= largest ? largest : other;
  }
  Norm norm{0.0f, 1.0f};
  if (largest != 0.0f) {
    norm.down = power_down(largest);
    float sum = 0.0f;
    for (int d = lane; d < dim; d += 32) {
      const float v = element_of(data, d * x.col, of.dtype) * norm.down;
      sum = simd::fma(v, v, sum);
    }
    norm.root = simd::sqrt(sum_of_warp(sum));
  }
  if (lane == 0) (of_queries ? call.norms_q : call.norms_k)[i] = norm;
}
// Gradients of rows from those of x / |x|.
__global__ void __launch_bounds__(kThreads) unit_gradients_kernel(const __grid_constant__ Call call, bool of_queries) {
  const gpu::LinearAttention& of = call.of;
  const gpu::Heads& x = of_queries ? of.q : of.k;
  const std::size_t heads = of_queries ? of.heads_q : of.heads_kv, rows = of_queries ? of.queries : of.keys;
  const int lane = static_cast<int>(threadIdx.x) % 32, dim = static_cast<int>(of.dim);
  const std::size_t i = (static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const std::size_t row = i % rows, head = i / rows % heads, batch = i / rows / heads;
  std::size_t batches = 1;
  for (const std::size_t length : of.batch) batches *= length;
  if (batch >= batches) return;
  const auto batch_index = static_cast<std::int64_t>(batch), head_index = static_cast<std::int64_t>(head);
  const char* const data = head_of(call, x, item_of(of.dtype), batch_index, head_index, static_cast<std::int64_t>(row));
  const float* const df = (of_queries ? call.features_dq : call.features_dk) + i * of.dim;
  const Norm norm = (of_queries ? call.norms_q : call.norms_k)[i];
  bool is_hidden = false;
  if (!of_queries && of.mask.data != nullptr)
    is_hidden = *head_of(call, of.mask, 1, batch_index, head_index, static_cast<std::int64_t>(row)) == 0;
  float sum = 0.0f;
  for (int d = lane; d < dim; d += 32)
    sum = simd::fma(element_of(data, d * x.col, of.dtype) * norm.down / norm.root, df[d], sum);
  sum = sum_of_warp(sum);
  const gpu::Heads& target = of_queries ? of.dq : of.dk;
  void* const to = const_cast<char*>(
      head_of(call, target, item_of(of.dtype), batch_index, head_index, static_cast<std::int64_t>(row)));
  for (int d = lane; d < dim; d += 32) {
    const float unit = element_of(data, d * x.col, of.dtype) * norm.down / norm.root;
    const float v = (df[d] - unit * sum) / norm.root * norm.down;
    set_element(to, d * target.col, of.dtype, is_hidden ? 0.0f : v);
  }
}

// Exponential maps: exp(x) = y 2^n with an integer n, so a unit 2^m changes no bit of a sum. Before the call's own
// kernels features are made in units of 2^m, m the largest n of a feature up to the chunk (without causality of all);
// what later chunks hold changes no row.

// How far a row's largest weight lies above 1: early rows of a chunk see keys far below its largest.
constexpr float kLift = 60.0f;

// Logarithms of the features of a head's rows.
struct Logits {
  const char* data;
  std::ptrdiff_t row, col;
  fastops_dtype dtype;
  float factor;
  FASTOPS_DEVICE float at(std::ptrdiff_t r, std::ptrdiff_t d) const {
    return element_of(data, r * row + d * col, dtype) * factor;
  }
};
FASTOPS_DEVICE std::int64_t flat_row(const Call& call, bool of_queries, const Place& at, std::int64_t head) {
  const auto heads = static_cast<std::int64_t>(of_queries ? call.of.heads_q : call.of.heads_kv);
  return (at.batch * heads + head) * static_cast<std::int64_t>(of_queries ? call.of.queries : call.of.keys) + at.begin;
}
FASTOPS_DEVICE Logits logits_of(const Call& call, bool of_queries, const Place& at, std::int64_t head) {
  const gpu::LinearAttention& of = call.of;
  if (of.map == FASTOPS_MAP_FAVOR) {
    // Made by project_kernel, in the place of the features.
    const auto features = static_cast<std::ptrdiff_t>(of.features);
    const float* const made = of_queries ? call.features_q : call.features_k;
    return {reinterpret_cast<const char*>(made + flat_row(call, of_queries, at, head) * features), features, 1,
            FASTOPS_F32, 1.0f};
  }
  const gpu::Heads& x = of_queries ? of.q : of.k;
  return {head_of(call, x, item_of(of.dtype), at.batch, head, at.begin), x.row, x.col, of.dtype, of.scale};
}
FASTOPS_DEVICE float share_of(const Call& call) {
  return call.of.map == FASTOPS_MAP_FAVOR ? 1.0f / simd::sqrt(static_cast<float>(call.of.features)) : 1.0f;
}
// The units of a chunk.
FASTOPS_DEVICE const float* units_of(const Call& call, std::size_t index, const Place& at, std::size_t head) {
  const std::size_t which = call.of.causal ? index : static_cast<std::size_t>(at.sequence);
  return call.references + (which * call.of.heads_kv + head) * call.of.features;
}
FASTOPS_DEVICE bool is_hidden(const Call& call, const Place& at, std::int64_t head, int key) {
  const gpu::Heads& mask = call.of.mask;
  return mask.data != nullptr && *head_of(call, mask, 1, at.batch, head, at.begin + key) == 0;
}
// A row of q or k by its number among all.
struct RowOf {
  std::int64_t batch, head, row;
  bool exists;
};
FASTOPS_DEVICE RowOf row_of(const Call& call, bool of_queries) {
  const gpu::LinearAttention& of = call.of;
  const std::size_t heads = of_queries ? of.heads_q : of.heads_kv, rows = of_queries ? of.queries : of.keys;
  const std::size_t i = (static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  std::size_t batches = 1;
  for (const std::size_t length : of.batch) batches *= length;
  const std::size_t batch = i / rows / heads;
  return {static_cast<std::int64_t>(batch), static_cast<std::int64_t>(i / rows % heads),
          static_cast<std::int64_t>(i % rows), batch < batches};
}

// FAVOR+: W x' - |x'|^2 / 2, x' = sqrt(scale) x. A warp for each row.
__global__ void __launch_bounds__(kThreads) project_kernel(const __grid_constant__ Call call, bool of_queries) {
  const gpu::LinearAttention& of = call.of;
  const RowOf row = row_of(call, of_queries);
  if (!row.exists) return;
  const gpu::Heads& x = of_queries ? of.q : of.k;
  const int lane = static_cast<int>(threadIdx.x) % 32, dim = static_cast<int>(of.dim);
  const char* const data = head_of(call, x, item_of(of.dtype), row.batch, row.head, row.row);
  float square = 0.0f;
  for (int d = lane; d < dim; d += 32) {
    const float v = element_of(data, d * x.col, of.dtype);
    square = simd::fma(v, v, square);
  }
  square = 0.5f * of.scale * sum_of_warp(square);
  const float root = simd::sqrt(of.scale);
  const std::size_t i = (static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  float* const to = (of_queries ? call.features_q : call.features_k) + i * of.features;
  for (std::size_t f = static_cast<std::size_t>(lane); f < of.features; f += 32) {
    float sum = 0.0f;
    for (int d = 0; d < dim; ++d)
      sum = simd::fma(element_of(of.projection, static_cast<std::ptrdiff_t>(f) * dim + d, of.projection_dtype) * root,
                      element_of(data, d * x.col, of.dtype), sum);
    to[f] = sum - square;
  }
}

// Of a launch by features: the feature of a thread, its chunk or sequence, and its key head.
struct Feature {
  std::size_t index, head, feature;
  bool exists;
};
FASTOPS_DEVICE Feature feature_of(const Call& call) {
  const auto pieces = static_cast<unsigned>((call.of.features + kThreads - 1) / kThreads);
  const unsigned rest = blockIdx.x / pieces;
  const std::size_t f = blockIdx.x % pieces * static_cast<std::size_t>(kThreads) + threadIdx.x;
  return {rest / call.of.heads_kv, rest % call.of.heads_kv, f, f < call.of.features};
}
// The largest exponents of the keys of a chunk.
__global__ void __launch_bounds__(kThreads) maxima_kernel(const __grid_constant__ Call call) {
  const Feature my = feature_of(call);
  const Place at = place_of(call, static_cast<std::int64_t>(my.index), false);
  if (!my.exists || !at.exists) return;
  const auto head = static_cast<std::int64_t>(my.head);
  const Logits logits = logits_of(call, false, at, head);
  float top = kNone;
  for (int p = at.chunk * call.chunk; p < (at.chunk + 1) * call.chunk; ++p) {
    const int key = p - at.lead;
    if (key < 0 || key >= at.keys || is_hidden(call, at, head, key)) continue;
    const float n = attention::split_exp(logits.at(key, static_cast<std::ptrdiff_t>(my.feature))).n;
    top = n > top ? n : top;
  }
  call.maxima[(my.index * call.of.heads_kv + my.head) * call.of.features + my.feature] = top;
}
// The units of every chunk, or of all, and of the last state.
__global__ void __launch_bounds__(kThreads) references_kernel(const __grid_constant__ Call call) {
  const Feature my = feature_of(call);
  if (!my.exists) return;
  const std::size_t heads = call.of.heads_kv, features = call.of.features;
  std::int64_t count = call.chunks_k, first = static_cast<std::int64_t>(my.index) * count;
  if (call.of.offsets != nullptr) {
    first = call.first_chunks[my.index];
    count = call.first_chunks[my.index + 1] - first;
  }
  const std::size_t which = (my.index * heads + my.head) * features + my.feature;
  const float given = call.of.initial.m != nullptr ? call.of.initial.m[which] : kNone;
  float top = given > kNone ? given : kNone;
  for (std::int64_t done = 0; done < count; done += kScanAhead) {
    float own[kScanAhead];
#pragma unroll
    for (int j = 0; j < kScanAhead; ++j)
      own[j] = done + j < count
                   ? call.maxima[(static_cast<std::size_t>(first + done + j) * heads + my.head) * features + my.feature]
                   : kNone;
#pragma unroll
    for (int j = 0; j < kScanAhead; ++j) {
      top = own[j] > top ? own[j] : top;
      if (call.of.causal && done + j < count)
        call.references[(static_cast<std::size_t>(first + done + j) * heads + my.head) * features + my.feature] = top;
    }
  }
  if (!call.of.causal) call.references[which] = top;
  if (call.of.final.m != nullptr) call.of.final.m[which] = top > kNone ? top : -__builtin_inff();
}
// Features of the keys of a chunk.
__global__ void __launch_bounds__(kThreads) key_powers_kernel(const __grid_constant__ Call call) {
  const std::size_t index = blockIdx.x / call.of.heads_kv, head = blockIdx.x % call.of.heads_kv;
  const Place at = place_of(call, static_cast<std::int64_t>(index), false);
  if (!at.exists) return;
  const Logits logits = logits_of(call, false, at, static_cast<std::int64_t>(head));
  const float* const units = units_of(call, index, at, head);
  const auto features = static_cast<int>(call.of.features);
  float* const to = call.features_k + flat_row(call, false, at, static_cast<std::int64_t>(head)) * features;
  const float share = share_of(call);
  for (int p = at.chunk * call.chunk; p < (at.chunk + 1) * call.chunk; ++p) {
    const int key = p - at.lead;
    if (key < 0 || key >= at.keys) continue;
    for (int d = static_cast<int>(threadIdx.x); d < features; d += kThreads) {
      const attention::Exponential<float> e = attention::split_exp(logits.at(key, d));
      to[static_cast<std::ptrdiff_t>(key) * features + d] = attention::times_power(e.y, e.n - units[d]) * share;
    }
  }
}
FASTOPS_DEVICE float most_of_warp(float v) {
  for (unsigned d = 16; d != 0; d /= 2) {
    const float other = __shfl_xor_sync(~0u, v, d);
    v = other > v ? other : v;
  }
  return v;
}
// Features of the queries of a chunk in units that make the largest of a row's weights 2^kLift; of the softmax map
// those that add up to 1.
__global__ void __launch_bounds__(kThreads) query_powers_kernel(const __grid_constant__ Call call) {
  const std::size_t index = blockIdx.x / call.of.heads_q, head = blockIdx.x % call.of.heads_q;
  const Place at = place_of(call, static_cast<std::int64_t>(index), true);
  if (!at.exists) return;
  const Logits logits = logits_of(call, true, at, static_cast<std::int64_t>(head));
  const float* const units = units_of(call, index, at, head / static_cast<std::size_t>(call.group));
  const auto features = static_cast<int>(call.of.features);
  const std::int64_t flat = flat_row(call, true, at, static_cast<std::int64_t>(head));
  const bool is_softmax = call.of.map == FASTOPS_MAP_SOFTMAX;
  const float share = share_of(call);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int first = at.chunk * call.chunk - at.shift;
  for (int row = first + static_cast<int>(threadIdx.x) / 32; row < first + call.chunk; row += kThreads / 32) {
    if (row < 0 || row >= at.queries) continue;
    float top = 2 * kNone;
    for (int d = lane; d < features; d += 32) {
      const float n = attention::split_exp(logits.at(row, d)).n + (is_softmax ? 0.0f : units[d]);
      top = n <= top ? top : n;
    }
    top = most_of_warp(top);
    float* const to = call.features_q + (flat + row) * features;
    float sum = 0.0f;
    for (int d = lane; d < features; d += 32) {
      const attention::Exponential<float> e = attention::split_exp(logits.at(row, d));
      const float n = e.n + (is_softmax ? 0.0f : units[d]);
      const float v = attention::times_power(e.y, n - top + (is_softmax ? 0.0f : kLift)) * share;
      sum += v;
      to[d] = v;
    }
    if (is_softmax) {
      sum = sum_of_warp(sum);
      for (int d = lane; d < features; d += 32) to[d] /= sum;
    } else if (lane == 0) {
      call.tops[flat + row] = top - kLift;
    }
  }
}
// The softmax map: features of the queries by the sums that they see.
__global__ void __launch_bounds__(kThreads) divide_kernel(const __grid_constant__ Call call) {
  const Feature my = feature_of(call);
  const Place at = place_of(call, static_cast<std::int64_t>(my.index), true);
  if (!my.exists || !at.exists) return;
  const gpu::LinearAttention& of = call.of;
  const auto head = static_cast<std::int64_t>(my.head);
  const auto features = static_cast<std::ptrdiff_t>(of.features);
  const std::size_t which = of.causal ? my.index : static_cast<std::size_t>(at.sequence);
  float z =
      (of.causal ? call.states
                 : call.totals)[(which * of.heads_kv + my.head) * call.state + of.features * of.values + my.feature];
  const float* const kf = call.features_k + flat_row(call, false, at, head) * features;
  for (int p = at.chunk * call.chunk; p < (at.chunk + 1) * call.chunk; ++p) {
    const int key = p - at.lead, row = p - at.shift;
    if (of.causal && key >= 0 && key < at.keys && !is_hidden(call, at, head, key))
      z += kf[key * features + static_cast<std::ptrdiff_t>(my.feature)];
    if (row < 0 || row >= at.queries) continue;
    for (int r = 0; r < call.group; ++r) {
      float* const f =
          call.features_q + (flat_row(call, true, at, head * call.group + r) + row) * features + my.feature;
      *f = z == 0.0f ? 0.0f : *f / z;
    }
  }
}
// What the sums' gradients add: to the chunk's own (of_keys: to those of its keys, of the rows from each on).
__global__ void __launch_bounds__(kThreads) shares_kernel(const __grid_constant__ Call call, bool of_keys) {
  const Feature my = feature_of(call);
  const Place at = place_of(call, static_cast<std::int64_t>(my.index), true);
  if (!my.exists || !at.exists) return;
  const gpu::LinearAttention& of = call.of;
  const auto head = static_cast<std::int64_t>(my.head);
  const auto features = static_cast<std::ptrdiff_t>(of.features);
  float sum = 0.0f;
  for (int p = (at.chunk + 1) * call.chunk - 1; p >= at.chunk * call.chunk; --p) {
    const int key = p - at.lead, row = p - at.shift;
    if (row >= 0 && row < at.queries)
      for (int r = 0; r < call.group; ++r)
        sum += call.features_dq[(flat_row(call, true, at, head * call.group + r) + row) * features +
                                static_cast<std::ptrdiff_t>(my.feature)];
    if (of_keys && key >= 0 && key < at.keys)
      call.features_dk[(flat_row(call, false, at, head) + key) * features + static_cast<std::ptrdiff_t>(my.feature)] +=
          sum;
  }
  if (!of_keys)
    call.states[(my.index * of.heads_kv + my.head) * call.state + of.features * of.values + my.feature] += sum;
}
// Gradients of rows from those of their features; of the softmax map's queries it leaves what the keys' sums get.
__global__ void __launch_bounds__(kThreads) power_gradients_kernel(const __grid_constant__ Call call, bool of_queries) {
  const gpu::LinearAttention& of = call.of;
  const RowOf my = row_of(call, of_queries);
  if (!my.exists) return;
  const std::size_t i = (static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const gpu::Heads &x = of_queries ? of.q : of.k, &target = of_queries ? of.dq : of.dk;
  const int lane = static_cast<int>(threadIdx.x) % 32, dim = static_cast<int>(of.dim);
  const auto features = static_cast<int>(of.features);
  const char* const data = head_of(call, x, item_of(of.dtype), my.batch, my.head, my.row);
  char* const to = const_cast<char*>(head_of(call, target, item_of(of.dtype), my.batch, my.head, my.row));
  const float* const f = (of_queries ? call.features_q : call.features_k) + i * of.features;
  float* const df = (of_queries ? call.features_dq : call.features_dk) + i * of.features;
  bool hidden = false;
  if (!of_queries && of.mask.data != nullptr) hidden = *head_of(call, of.mask, 1, my.batch, my.head, my.row) == 0;
  const bool divides = of_queries && of.map == FASTOPS_MAP_SOFTMAX;
  // In the exponents; hidden keys' features may be nan.
  float sum = 0.0f;
  for (int d = lane; d < features; d += 32) {
    const float e = hidden ? 0.0f : f[d] * df[d];
    sum += e;
    if (!divides) df[d] = e;
  }
  sum = sum_of_warp(sum);
  __syncwarp();
  if (of.map == FASTOPS_MAP_FAVOR) {
    const float root = simd::sqrt(of.scale);
    for (int d = lane; d < dim; d += 32) {
      float v = 0.0f;
      for (int j = 0; j < features; ++j)
        v = simd::fma(df[j], element_of(of.projection, static_cast<std::ptrdiff_t>(j) * dim + d, of.projection_dtype),
                      v);
      const float gradient = root * (v - root * element_of(data, d * x.col, of.dtype) * sum);
      set_element(to, d * target.col, of.dtype, hidden ? 0.0f : gradient);
    }
    return;
  }
  if (!divides) {
    for (int d = lane; d < dim; d += 32) set_element(to, d * target.col, of.dtype, of.scale * df[d]);
    return;
  }
  float top = 2 * kNone, total = 0.0f;
  for (int d = lane; d < dim; d += 32) {
    const float n = attention::split_exp(element_of(data, d * x.col, of.dtype) * of.scale).n;
    top = n <= top ? top : n;
  }
  top = most_of_warp(top);
  for (int d = lane; d < dim; d += 32) {
    const auto e = attention::split_exp(element_of(data, d * x.col, of.dtype) * of.scale);
    total += attention::times_power(e.y, e.n - top);
  }
  total = sum_of_warp(total);
  for (int d = lane; d < dim; d += 32) {
    const auto e = attention::split_exp(element_of(data, d * x.col, of.dtype) * of.scale);
    const float p = attention::times_power(e.y, e.n - top) / total, a = f[d] * df[d];
    set_element(to, d * target.col, of.dtype, of.scale * (a - p * sum));
    df[d] = p == 0.0f ? 0.0f : -a * f[d] / p;
  }
}

// One token: a block for each head of the state. Threads lie along the values, and in slices of the features.
constexpr int kStepThreads = 256, kSlices = kStepThreads / 32;
__global__ void __launch_bounds__(kStepThreads) step_kernel(const __grid_constant__ Call call) {
  FASTOPS_DYNAMIC_SHARED(memory);
  __shared__ float shared[kStepThreads];
  const gpu::LinearAttention& of = call.of;
  const auto dim = static_cast<int>(of.dim), features = static_cast<int>(of.features),
             values = static_cast<int>(of.values);
  float *const kf = reinterpret_cast<float*>(memory), *const qf = kf + features, *const keeps = qf + features;
  const std::size_t index = blockIdx.x;
  const auto batch = static_cast<std::int64_t>(index / of.heads_kv),
             head = static_cast<std::int64_t>(index % of.heads_kv);
  const int t = static_cast<int>(threadIdx.x);
  const std::ptrdiff_t item = item_of(of.dtype);
  // The features of a row.
  const auto load = [&](const gpu::Heads& x, std::int64_t h, float factor, float* to) {
    const char* const data = head_of(call, x, item, batch, h, 0);
    Norm norm{0.0f, 1.0f};
    if (of.map == FASTOPS_MAP_COSINE) {
      float largest = 0.0f;
      for (int d = 0; d < dim; ++d) {
        const float v = element_of(data, d * x.col, of.dtype), size = v < 0.0f ? -v : v;
        largest = size <= largest ? largest : size;
      }
      if (largest != 0.0f) {
        norm.down = power_down(largest);
        float sum = 0.0f;
        for (int d = t; d < dim; d += kStepThreads) {
          const float v = element_of(data, d * x.col, of.dtype) * norm.down;
          sum = simd::fma(v, v, sum);
        }
        norm.root = simd::sqrt(sum_of_block<kSlices>(sum, shared));
      }
    }
    for (int d = t; d < features; d += kStepThreads) {
      const float v = d < dim ? element_of(data, d * x.col, of.dtype) : 1.0f;
      float f = v;
      if (of.map == FASTOPS_MAP_FAVOR) {
        const float root = simd::sqrt(of.scale);
        f = 0.0f;
        float square = 0.0f;
        for (int i = 0; i < dim; ++i) {
          const float own = element_of(data, i * x.col, of.dtype);
          square = simd::fma(own, own, square);
          f = simd::fma(element_of(of.projection, static_cast<std::ptrdiff_t>(d) * dim + i, of.projection_dtype) * root,
                        own, f);
        }
        f -= 0.5f * of.scale * square;
      }
      if (of.map == FASTOPS_MAP_ELU) f = attention::elu_feature(v);
      if (of.map == FASTOPS_MAP_RELU) f = attention::rectified(v) + of.kernel_eps;
      if (of.map == FASTOPS_MAP_RELU2) f = simd::fma(attention::rectified(v), attention::rectified(v), of.kernel_eps);
      if (of.map == FASTOPS_MAP_COSINE && d < dim) f = v * norm.down / norm.root;
      // Of the softmax and exp maps too this is the exponent; of FAVOR it is without a factor.
      to[d] = of.map == FASTOPS_MAP_FAVOR ? f : f * factor;
    }
  };
  const bool has_units = has_exponents(of.map), is_softmax = of.map == FASTOPS_MAP_SOFTMAX;
  float* const m = has_units ? of.final.m + index * of.features : nullptr;
  const float share = share_of(call);
  float keep = 1.0f;
  if (of.decay.data != nullptr) {
    const char* const data = head_of(call, of.decay, item_of(of.decay_dtype), batch, head, 0);
    const float g = element_of(data, 0, of.decay_dtype);
    keep = math::exp(g > 0.0f ? 0.0f : g);
  }
  load(of.k, head, has_units ? of.scale : 1.0f, kf);
  float *const s = of.final.s + index * of.features * of.values, *const z = of.final.z + index * of.features;
  const char* const v = head_of(call, of.v, item, batch, head, 0);
  for (int d = t; d < features; d += kStepThreads) {
    float own = keep;
    if (has_units) {
      const attention::Exponential<float> e = attention::split_exp(kf[d]);
      const float before = m[d] > kNone ? m[d] : kNone, unit = e.n > before ? e.n : before;
      own = power_between(before, unit);
      kf[d] = attention::times_power(e.y, e.n - unit) * share;
      m[d] = unit;
    }
    keeps[d] = own;
    z[d] = simd::fma(own, z[d], kf[d]);
  }
  for (int r = 0; r < call.group; ++r) {
    const std::int64_t head_q = head * call.group + r;
    __syncthreads();
    load(of.q, head_q, of.scale, qf);
    __syncthreads();
    float denominator = 1.0f, eps = of.eps;
    bool is_empty = false;
    if (has_units) {
      float top = 2 * kNone, sum = 0.0f;
      for (int d = 0; d < features; ++d) {
        const float n = attention::split_exp(qf[d]).n + (is_softmax ? 0.0f : m[d]);
        top = n <= top ? top : n;
      }
      __syncthreads();
      for (int d = t; d < features; d += kStepThreads) {
        const attention::Exponential<float> e = attention::split_exp(qf[d]);
        qf[d] = attention::times_power(e.y, e.n + (is_softmax ? 0.0f : m[d]) - top) * share;
        sum += qf[d];
      }
      if (is_softmax) {
        sum = sum_of_block<kSlices>(sum, shared);
        for (int d = t; d < features; d += kStepThreads) qf[d] = z[d] == 0.0f ? 0.0f : qf[d] / sum / z[d];
      } else {
        denominator = math::exp2(-top);
        eps = eps != 0.0f ? eps * denominator : 0.0f;
      }
      __syncthreads();
    }
    if (of.normalize && !is_softmax) {
      float sum = 0.0f;
      for (int d = t; d < features; d += kStepThreads) sum = simd::fma(qf[d], z[d], sum);
      denominator = sum_of_block<kSlices>(sum, shared) + eps;
      is_empty = denominator < 0x1p-126f && denominator > -0x1p-126f;
    }
    char* const out = const_cast<char*>(head_of(call, of.out, item, batch, head_q, 0));
    for (int e0 = 0; e0 < values; e0 += 32) {
      const int e = e0 + t % 32;
      float sum = 0.0f;
      if (e < values) {
        const float value = element_of(v, e * of.v.col, of.dtype);
        for (int d = t / 32; d < features; d += kSlices) {
          float* const at = s + static_cast<std::size_t>(d) * of.values + static_cast<std::size_t>(e);
          float now = *at;
          if (r == 0) *at = now = simd::fma(kf[d], value, keeps[d] * now);
          sum = simd::fma(qf[d], now, sum);
        }
      }
      __syncthreads();
      shared[t] = sum;
      __syncthreads();
      if (t < 32 && e < values) {
        for (int i = 1; i < kSlices; ++i) sum += shared[i * 32 + t];
        set_element(out, e * of.out.col, of.dtype, is_empty ? 0.0f : sum / denominator);
      }
    }
  }
}

// Launches.

// Blocks that occupy a large GPU some times over: of a constant, so that results do not depend on the GPU.
constexpr std::int64_t kEnoughBlocks = 1024;

std::int64_t batches_of(const gpu::LinearAttention& of) noexcept {
  std::int64_t n = 1;
  for (const std::size_t length : of.batch) n *= static_cast<std::int64_t>(length);
  return n;
}
struct Prepared {
  Call call;
  std::int64_t batches, sequences, chunks_k, chunks_q;  // of all sequences
  std::size_t bytes;
};
Prepared prepare(const gpu::LinearAttention& of, void* workspace, bool gradient) noexcept {
  Prepared p{};
  Call& call = p.call;
  call.of = of;
  call.group = static_cast<int>(of.heads_kv == 0 ? 1 : of.heads_q / of.heads_kv);
  call.state = (of.features * of.values + of.features + 3) / 4 * 4;
  p.batches = batches_of(of);
  p.sequences = of.offsets == nullptr ? p.batches : static_cast<std::int64_t>(of.sequences);
  const auto queries = static_cast<std::int64_t>(of.queries), keys = static_cast<std::int64_t>(of.keys);
  const auto heads = static_cast<std::int64_t>(of.heads_kv);
  const auto tiles = [](std::size_t n) { return divided_up(static_cast<std::int64_t>(n), kTile); };
  if (of.causal) {
    // Twice as long where writing and reading the sums would be most of the work.
    call.chunk = of.features * of.values >= kTile * kTile && !has_exponents(of.map) ? 2 * kTile : kTile;
    call.lead = queries > keys ? static_cast<int>(divided_up(queries - keys, call.chunk) * call.chunk) : 0;
    call.shift = static_cast<int>(call.lead + keys - queries);
  } else {
    const std::int64_t longest = queries > keys ? queries : keys;
    std::int64_t n =
        p.batches * heads * tiles(of.features) * tiles(of.values) * divided_up(longest, kTile) / kEnoughBlocks;
    n = n < 1 ? 1 : n > 64 ? 64 : n;
    call.chunk = static_cast<int>(n) * kTile;
  }
  call.chunks_k = divided_up(call.lead + keys, call.chunk);
  call.chunks_q = of.causal ? call.chunks_k : divided_up(queries, call.chunk);
  if (of.offsets != nullptr) {
    // At most, since every sequence may end within a chunk.
    call.chunks_k = keys / call.chunk + p.sequences;
    call.chunks_q = call.chunks_k;
    p.chunks_k = p.chunks_q = call.chunks_k;
  } else {
    p.chunks_k = p.batches * call.chunks_k;
    p.chunks_q = p.batches * call.chunks_q;
  }
  Parts parts(workspace);
  const auto take = [&](auto*& to, std::int64_t n) {
    to = parts.take<std::remove_reference_t<decltype(*to)>>(static_cast<std::size_t>(n));
  };
  const std::int64_t state = static_cast<std::int64_t>(call.state) * heads;
  const std::int64_t rows_q = p.batches * static_cast<std::int64_t>(of.heads_q) * queries,
                     rows_k = p.batches * heads * keys;
  take(call.states, state * (p.chunks_k > p.chunks_q ? p.chunks_k : p.chunks_q));
  if (!of.causal) take(call.totals, state * p.sequences);
  if (of.offsets != nullptr) {
    take(call.begins, p.sequences + 1);
    take(call.first_chunks, p.sequences + 1);
  }
  if (of.decay.data != nullptr) {
    take(call.decays, rows_k);
    take(call.chunk_decays, p.chunks_k * heads);
  }
  if (of.map == FASTOPS_MAP_COSINE) {
    take(call.norms_q, rows_q);
    take(call.norms_k, rows_k);
    if (gradient) {
      take(call.features_dq, rows_q * static_cast<std::int64_t>(of.dim));
      take(call.features_dk, rows_k * static_cast<std::int64_t>(of.dim));
    }
  }
  const bool is_softmax = of.map == FASTOPS_MAP_SOFTMAX;
  if (has_exponents(of.map)) {
    const auto features = static_cast<std::int64_t>(of.features);
    // Each feature is divided by its own sum.
    if (is_softmax) call.of.normalize = false;
    take(call.features_q, rows_q * features);
    take(call.features_k, rows_k * features);
    if (!is_softmax) take(call.tops, rows_q);
    take(call.maxima, p.chunks_k * heads * features);
    take(call.references, (of.causal ? p.chunks_k : p.sequences) * heads * features);
    if (gradient) {
      take(call.features_dq, rows_q * features);
      take(call.features_dk, rows_k * features);
    }
  }
  if (gradient && !is_softmax && (of.normalize || has_exponents(of.map))) {
    take(call.inverses, rows_q);
    take(call.biases, rows_q);
  }
  p.bytes = parts.used();
  return p;
}

class Launches : Launcher {
 public:
  Launches(const Prepared& p, gpu::Stream stream) noexcept : Launcher(stream), p_(p), call_(p.call) {}

  gpu::Status forward() noexcept {
    before();
    sums(false, {call_.of.initial, call_.of.final, false, false});
    divide();
    rows(Role::kForward);
    return status_;
  }
  gpu::Status backward() noexcept {
    const gpu::LinearAttention& of = call_.of;
    before();
    sums(false, {of.initial, {}, false, false});
    divide();
    if (call_.inverses != nullptr) rows(Role::kDenominators);
    rows(Role::kQueries);
    if (has_exponents(of.map)) chain(true);
    sums(true, {of.d_final, of.d_initial, true, true});
    rows(Role::kKeys);
    rows(Role::kValues);
    if (has_exponents(of.map)) {
      shares(true);
      chain(false);
    }
    if (of.map == FASTOPS_MAP_COSINE)
      for (const bool of_queries : {true, false})
        by_warps(of_queries ? rows_q() : rows_k(), [&](unsigned blocks) {
          FASTOPS_LAUNCH(unit_gradients_kernel, blocks, kThreads, 0, stream_, call_, of_queries);
        });
    return status_;
  }

 private:
  std::int64_t rows_q() const noexcept {
    return p_.batches * static_cast<std::int64_t>(call_.of.heads_q * call_.of.queries);
  }
  std::int64_t rows_k() const noexcept {
    return p_.batches * static_cast<std::int64_t>(call_.of.heads_kv * call_.of.keys);
  }
  template <class F> void by_warps(std::int64_t warps, const F& launch) noexcept {
    run(divided_up(warps, kThreads / 32), launch);
  }

  void before() noexcept {
    const gpu::LinearAttention& of = call_.of;
    if (of.offsets != nullptr)
      run(1, [&](unsigned) { FASTOPS_LAUNCH(sequences_kernel, 1, kThreads, 0, stream_, call_); });
    if (of.decay.data != nullptr) {
      const std::int64_t warps = p_.chunks_k * static_cast<std::int64_t>(of.heads_kv);
      by_warps(warps, [&](unsigned blocks) {
        FASTOPS_LAUNCH(decays_kernel, blocks, kThreads, 0, stream_, call_, static_cast<std::size_t>(warps));
      });
    }
    if (of.map == FASTOPS_MAP_COSINE)
      for (const bool of_queries : {true, false})
        by_warps(of_queries ? rows_q() : rows_k(), [&](unsigned blocks) {
          FASTOPS_LAUNCH(norms_kernel, blocks, kThreads, 0, stream_, call_, of_queries);
        });
    if (has_exponents(of.map)) exponents();
  }
  // Launches by chunks and heads, a thread for each feature.
  template <class F> void by_features(std::int64_t items, const F& launch) noexcept {
    run(items * static_cast<std::int64_t>(call_.of.heads_kv) *
            divided_up(static_cast<std::int64_t>(call_.of.features), kThreads),
        launch);
  }
  void exponents() noexcept {
    const gpu::LinearAttention& of = call_.of;
    if (of.map == FASTOPS_MAP_FAVOR)
      for (const bool of_queries : {true, false})
        by_warps(of_queries ? rows_q() : rows_k(), [&](unsigned blocks) {
          FASTOPS_LAUNCH(project_kernel, blocks, kThreads, 0, stream_, call_, of_queries);
        });
    by_features(p_.chunks_k,
                [&](unsigned blocks) { FASTOPS_LAUNCH(maxima_kernel, blocks, kThreads, 0, stream_, call_); });
    by_features(p_.sequences,
                [&](unsigned blocks) { FASTOPS_LAUNCH(references_kernel, blocks, kThreads, 0, stream_, call_); });
    run(p_.chunks_k * static_cast<std::int64_t>(of.heads_kv),
        [&](unsigned blocks) { FASTOPS_LAUNCH(key_powers_kernel, blocks, kThreads, 0, stream_, call_); });
    run(p_.chunks_q * static_cast<std::int64_t>(of.heads_q),
        [&](unsigned blocks) { FASTOPS_LAUNCH(query_powers_kernel, blocks, kThreads, 0, stream_, call_); });
  }
  // The softmax map's features of the queries by the sums of the keys', and what its gradient adds to theirs.
  void divide() noexcept {
    if (call_.of.map != FASTOPS_MAP_SOFTMAX) return;
    by_features(p_.chunks_q,
                [&](unsigned blocks) { FASTOPS_LAUNCH(divide_kernel, blocks, kThreads, 0, stream_, call_); });
  }
  void shares(bool of_keys) noexcept {
    if (call_.of.map != FASTOPS_MAP_SOFTMAX || (of_keys && !call_.of.causal)) return;
    by_features(p_.chunks_q,
                [&](unsigned blocks) { FASTOPS_LAUNCH(shares_kernel, blocks, kThreads, 0, stream_, call_, of_keys); });
  }
  void chain(bool of_queries) noexcept {
    by_warps(of_queries ? rows_q() : rows_k(), [&](unsigned blocks) {
      FASTOPS_LAUNCH(power_gradients_kernel, blocks, kThreads, 0, stream_, call_, of_queries);
    });
  }
  template <class F> void by_arithmetic(const F& f) noexcept {
    if (call_.of.dtype == FASTOPS_BF16)
      f(ByBf16());
    else if (call_.of.dtype == FASTOPS_F16 || call_.of.tf32)
      f(ByTf32());
    else
      f(ByFp32());
  }
  void sums(bool of_queries, const Scan& scan) noexcept {
    const gpu::LinearAttention& of = call_.of;
    const auto heads = static_cast<std::int64_t>(of.heads_kv);
    const std::int64_t pieces = divided_up(static_cast<std::int64_t>(of.features), kTile) *
                                divided_up(static_cast<std::int64_t>(of.values), kTile);
    by_arithmetic([&](auto arithmetic) {
      const auto kernel = sums_kernel<decltype(arithmetic)>;
      run((of_queries ? p_.chunks_q : p_.chunks_k) * heads * pieces,
          [&](unsigned blocks) { FASTOPS_LAUNCH(kernel, blocks, kThreads, 0, stream_, call_, of_queries); });
    });
    if (of_queries) shares(false);
    const auto used = static_cast<std::int64_t>(of.features * of.values + of.features);
    run(divided_up(used, 2 * kThreads) * heads * p_.sequences,
        [&](unsigned blocks) { FASTOPS_LAUNCH(scan_kernel, blocks, 2 * kThreads, 0, stream_, call_, scan); });
  }
  void rows(Role role) noexcept {
    const gpu::LinearAttention& of = call_.of;
    const bool of_keys = role >= Role::kKeys;
    const std::size_t width = role == Role::kForward || role == Role::kValues ? of.values
                              : role == Role::kDenominators                   ? 1
                              : has_exponents(of.map)                         ? of.features
                                                                              : of.dim;
    const std::int64_t tiles = divided_up(static_cast<std::int64_t>(width), kTile) * (call_.chunk / kTile);
    by_arithmetic([&](auto arithmetic) {
      const auto kernel =
          role >= Role::kQueries ? rows_kernel<decltype(arithmetic), true> : rows_kernel<decltype(arithmetic), false>;
      run((of_keys ? p_.chunks_k : p_.chunks_q) * static_cast<std::int64_t>(of_keys ? of.heads_kv : of.heads_q) * tiles,
          [&](unsigned blocks) { FASTOPS_LAUNCH(kernel, blocks, kThreads, 0, stream_, call_, role); });
    });
  }

  const Prepared& p_;
  const Call& call_;
};

}  // namespace linear_kernels
using namespace linear_kernels;
}  // namespace fastops::FASTOPS_LEVEL

namespace fastops::gpu {

std::size_t linear_attention_workspace(const LinearAttention& call, bool gradient) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  return level::prepare(call, nullptr, gradient).bytes;
}
Status linear_attention(const LinearAttention& call, void* workspace, Stream stream) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  const level::Prepared prepared = level::prepare(call, workspace, false);
  return level::Launches(prepared, stream).forward();
}
Status linear_attention_backward(const LinearAttention& call, void* workspace, Stream stream) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  const level::Prepared prepared = level::prepare(call, workspace, true);
  return level::Launches(prepared, stream).backward();
}
Status linear_attention_step(const LinearAttention& of, Stream stream) noexcept {
  namespace level = fastops::FASTOPS_LEVEL;
  level::Call call{};
  call.of = of;
  call.group = static_cast<int>(of.heads_kv == 0 ? 1 : of.heads_q / of.heads_kv);
  const std::int64_t blocks = level::batches_of(of) * static_cast<std::int64_t>(of.heads_kv);
  if (blocks == 0) return 0;
  if (static_cast<std::size_t>(blocks) > kMostBlocks || of.features > kMostStepFeatures) return kTooLarge;
  FASTOPS_LAUNCH(level::step_kernel, static_cast<unsigned>(blocks), level::kStepThreads,
                 3 * of.features * sizeof(float), stream, call);
  return level::launched();
}

}  // namespace fastops::gpu
