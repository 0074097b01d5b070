// SPDX-License-Identifier: BSD-3-Clause
// The C interface of attention: heads and sequences as units of work, splits that no thread count changes, workspaces.
#include <atomic>
#include <type_traits>

#include "attention/attention_kernels.h"
#include "core/checked.h"
#include "core/parallel.h"

namespace fastops {
namespace {

#define FASTOPS_LINEAR_TABLE(level) level::kLinearKernels,
#define FASTOPS_GRADIENT_TABLE(level) level::kLinearGradientKernels,
#define FASTOPS_SOFTMAX_TABLE(level) level::kSoftmaxKernels,
constexpr const LinearKernels* kLinear[] = {FASTOPS_FOR_EACH_LEVEL(FASTOPS_LINEAR_TABLE)};
constexpr const LinearGradientKernels* kGradient[] = {FASTOPS_FOR_EACH_LEVEL(FASTOPS_GRADIENT_TABLE)};
constexpr const SoftmaxKernels* kSoftmax[] = {FASTOPS_FOR_EACH_LEVEL(FASTOPS_SOFTMAX_TABLE)};
#define FASTOPS_NYSTROM_TABLE(level) level::kNystromKernels,
#define FASTOPS_NYSTROM_GRADIENT_TABLE(level) level::kNystromGradientKernels,
constexpr const NystromKernels* kNystrom[] = {FASTOPS_FOR_EACH_LEVEL(FASTOPS_NYSTROM_TABLE)};
constexpr const NystromGradientKernels* kNystromGradient[] = {FASTOPS_FOR_EACH_LEVEL(FASTOPS_NYSTROM_GRADIENT_TABLE)};
#undef FASTOPS_NYSTROM_TABLE
#undef FASTOPS_NYSTROM_GRADIENT_TABLE
#undef FASTOPS_LINEAR_TABLE
#undef FASTOPS_GRADIENT_TABLE
#undef FASTOPS_SOFTMAX_TABLE

constexpr double kNanosecondsPerFlop = 0.02;
// Where heads are few, a causal one is cut along its tokens; each piece but the first begins with the state that the
// keys before it make, for this part of the work that their outputs would take.
constexpr std::size_t kMostPieces = 3;
constexpr double kStateWork = 0.45;
// Without causality the keys of a head are cut into parts, where heads are few: at most so many, of at least so many
// keys.
constexpr std::size_t kParts = 16, kPartKeys = 512;
// Parts of heads of Nystrom attention that wait to be added, for each thread.
constexpr std::size_t kPartsBytes = std::size_t{1} << 18;
// Parts of keys are whole blocks of its kernels, three at least, and the queries of one unit where heads are few two.
constexpr std::size_t kNystromBlocks = 3, kNystromQueries = 2 * kNystromBlock;
// Queries of one unit without causality.
constexpr std::size_t kPartQueries = 1024;

using Shape = fastops_linear_attention;
using Heads = fastops_heads;

bool is_double(const Shape& s) noexcept { return s.dtype == FASTOPS_F64; }
std::size_t item_size(int dtype) noexcept { return dtype == FASTOPS_F64 ? 8 : dtype == FASTOPS_F32 ? 4 : 2; }
std::size_t compute_size(const Shape& s) noexcept { return is_double(s) ? 8 : 4; }

// The result, the largest that is written in full: other arrays may have strides of 0.
bool fits_memory(std::size_t batch, std::size_t heads, std::size_t queries, std::size_t values) noexcept {
  std::size_t size = 0;
  return checked_product({batch, heads, queries, values, 8}, &size);
}
bool is_valid(const Shape& s, const int64_t* offsets, std::size_t sequences) noexcept {
  if (s.dtype < FASTOPS_F16 || s.dtype > FASTOPS_F64) return false;
  if (s.heads_kv == 0 ? s.heads_q != 0 : s.heads_q % s.heads_kv != 0) return false;
  if (!fits_memory(s.batch, s.heads_q, s.queries, s.values)) return false;
  if (offsets == nullptr) return true;
  if (s.batch != 1 || s.queries != s.keys || offsets[0] != 0) return false;
  for (std::size_t i = 0; i < sequences; ++i)
    if (offsets[i + 1] < offsets[i]) return false;
  return static_cast<std::size_t>(offsets[sequences]) == s.keys;
}
bool is_valid_linear(const Shape& s, const fastops_linear_options& o) noexcept {
  if (s.feature_map < FASTOPS_MAP_ELU || s.feature_map > FASTOPS_MAP_SOFTMAX) return false;
  if (s.feature_map == FASTOPS_MAP_FAVOR ? s.projection == nullptr
                                         : s.features != s.dim + (s.feature_map == FASTOPS_MAP_COSINE ? 1 : 0))
    return false;
  const bool exponents = s.feature_map >= FASTOPS_MAP_EXP;
  for (const auto* state : {&o.initial_state, &o.final_state})
    if (state->s != nullptr && (state->z == nullptr || (exponents && state->m == nullptr))) return false;
  if (o.decay.data != nullptr && !s.causal) return false;
  return is_valid(s, o.offsets, o.sequences);
}

const void* at(const Heads& h, std::size_t size, std::size_t b, std::size_t head, std::size_t row) noexcept {
  if (h.data == nullptr) return nullptr;
  const auto offset = static_cast<std::ptrdiff_t>(b) * h.batch + static_cast<std::ptrdiff_t>(head) * h.head +
                      static_cast<std::ptrdiff_t>(row) * h.row;
  return static_cast<const char*>(h.data) + offset * static_cast<std::ptrdiff_t>(size);
}
void* state_at(void* state, std::size_t size, std::size_t i, std::size_t items) noexcept {
  return state == nullptr ? nullptr : static_cast<char*>(state) + i * items * size;
}

LinearCall call_of(const Shape& s) noexcept {
  return {static_cast<fastops_feature_map>(s.feature_map),
          s.causal != 0,
          s.normalize != 0,
          static_cast<fastops_dtype>(s.dtype),
          s.dim,
          s.features,
          s.values,
          s.heads_kv == 0 ? 1 : s.heads_q / s.heads_kv,
          s.eps,
          s.kernel_eps,
          s.scale,
          s.projection,
          nullptr};
}

// The key heads of all sequences.
class HeadList {
 public:
  HeadList(const Shape& s, const Heads& q, const Heads& k, const Heads& v, const Heads& out,
           const fastops_linear_options& o) noexcept
      : s_(s), q_(q), k_(k), v_(v), out_(out), o_(o) {}
  std::size_t sequences() const noexcept { return o_.offsets != nullptr ? o_.sequences : s_.batch; }
  std::size_t count() const noexcept { return sequences() * s_.heads_kv; }
  std::size_t first(std::size_t i) const noexcept {
    return o_.offsets != nullptr ? static_cast<std::size_t>(o_.offsets[i / s_.heads_kv]) : 0;
  }
  LinearHead operator[](std::size_t i) const noexcept {
    const std::size_t sequence = i / s_.heads_kv, head = i % s_.heads_kv, b = o_.offsets != nullptr ? 0 : sequence;
    const std::size_t t = first(i), group = s_.heads_q / s_.heads_kv, size = item_size(s_.dtype);
    const std::size_t item = compute_size(s_), features = s_.features;
    LinearHead h;  // every field is set: zeros for all of them first cost as much as all divisions here
    h.q = {at(q_, size, b, head * group, t), q_.row};
    h.k = {at(k_, size, b, head, t), k_.row};
    h.v = {at(v_, size, b, head, t), v_.row};
    h.out = {at(out_, size, b, head * group, t), out_.row};
    h.q_head = q_.head;
    h.out_head = out_.head;
    h.queries = s_.queries;
    h.keys = s_.keys;
    if (o_.offsets != nullptr) h.queries = h.keys = static_cast<std::size_t>(o_.offsets[sequence + 1]) - t;
    h.first = 0;
    h.last = h.queries;
    h.mask = static_cast<const std::uint8_t*>(at(o_.key_mask, 1, b, head, t));
    h.mask_step = o_.key_mask.row;
    h.decay = at(o_.decay, item, b, head, t);
    h.decay_step = o_.decay.row;
    h.s_in = state_at(o_.initial_state.s, item, i, features * s_.values);
    h.z_in = state_at(o_.initial_state.z, item, i, features);
    h.m_in = state_at(o_.initial_state.m, item, i, features);
    h.s_out = state_at(o_.final_state.s, item, i, features * s_.values);
    h.z_out = state_at(o_.final_state.z, item, i, features);
    h.m_out = state_at(o_.final_state.m, item, i, features);
    h.worker = 0;
    return h;
  }

 private:
  const Shape& s_;
  const Heads &q_, &k_, &v_, &out_;
  const fastops_linear_options& o_;
};

// Ends work under way: the calling thread asks the poll, the others see its answer. It says so once, to whoever asks:
// the runs of a call ask through poll(), which remembers.
class Stopper {
 public:
  explicit Stopper(fastops_poll poll) noexcept : poll_(poll) {}
  const Stop* stop() const noexcept { return &stop_; }
  fastops_poll poll() noexcept { return {poll_.function == nullptr ? nullptr : &Stopper::ask, this}; }
  fastops_status status(fastops_status of_run) const noexcept {
    return stopped_.load(std::memory_order_relaxed) ? FASTOPS_INTERRUPTED : of_run;
  }

 private:
  static int ask(void* self) noexcept {
    auto& stopper = *static_cast<Stopper*>(self);
    if (!stopper.stopped_.load(std::memory_order_relaxed) && stopper.poll_.function(stopper.poll_.context) != 0)
      stopper.stopped_.store(true, std::memory_order_relaxed);
    return stopper.stopped_.load(std::memory_order_relaxed) ? 1 : 0;
  }
  static bool asked(void* self, unsigned worker) noexcept {
    auto& stopper = *static_cast<Stopper*>(self);
    if (stopper.stopped_.load(std::memory_order_relaxed)) return true;
    // Not once more after that: polls are counted, and the run that is to end would never have its turn.
    return worker == 0 && interrupted(stopper.poll());
  }
  fastops_poll poll_;
  std::atomic<bool> stopped_{false};
  Stop stop_{asked, this};
};

double flops(const Shape& s) noexcept {
  return 4.0 * static_cast<double>(s.batch) * static_cast<double>(s.heads_q) *
         static_cast<double>(s.queries > s.keys ? s.queries : s.keys) *
         static_cast<double>(s.features + (s.projection != nullptr ? s.dim : 0)) * static_cast<double>(s.values + 1);
}

// FAVOR+'s projection as the kernels want it; true where there is none or it is there.
bool prepare(const LinearKernels& kernels, const Shape& s, LinearCall* call, Workspace* memory) noexcept {
  if (s.projection == nullptr) return true;
  if (!memory->reserve({kernels.projection_items(*call), compute_size(s)})) return false;
  kernels.project(*call, s.projection, memory->get<void>());
  call->projection = memory->get<void>();
  return true;
}

// One workspace for each worker, in whole cache lines.
class Workspaces {
 public:
  bool reserve(unsigned workers, std::size_t items, std::size_t size) noexcept {
    step_ = (items * size + 127) / 64 * 64;
    return memory_.reserve({workers, step_});
  }
  void* operator[](unsigned worker) const noexcept { return memory_.get<char>() + worker * step_; }

 private:
  Workspace memory_;
  std::size_t step_ = 0;
};

// Tokens of the first `pieces` pieces of a head, the first one's as 1: each has so many fewer than the one before that
// its state and its outputs together take as long.
double causal_share(std::size_t pieces) noexcept {
  double share = 0, next = 1;
  for (std::size_t i = 0; i < pieces; ++i, next *= 1 - kStateWork) share += next;
  return share;
}

fastops_status causal(const LinearKernels& kernels, const Shape& s, const LinearCall& call, const HeadList& heads,
                      fastops_poll poll) noexcept {
  const unsigned workers = worker_count();
  // Keys before the first query are every piece's work.
  const bool cuts = heads.count() > 0 && s.keys <= s.queries + s.queries / 4;
  const std::size_t fair = cuts ? workers / heads.count() : 1;
  const std::size_t pieces = fair < 1 ? 1 : fair > kMostPieces ? kMostPieces : fair;
  Workspaces work;
  if (!work.reserve(workers, kernels.work_items(call), compute_size(s))) return FASTOPS_NO_MEMORY;
  return parallel_run(
      heads.count() * pieces,
      [&](std::size_t unit, unsigned worker) {
        LinearHead head = heads[unit / pieces];
        head.worker = worker;
        if (pieces > 1) {
          // Every piece goes through the same chunks, so the cuts change no bit.
          const std::size_t alone = head.queries > head.keys ? head.queries - head.keys : 0;
          const auto cut = [&](std::size_t piece) {
            const double part = causal_share(piece) / causal_share(pieces) * static_cast<double>(head.queries - alone);
            return piece == 0 ? 0 : piece == pieces ? head.queries : alone + static_cast<std::size_t>(part);
          };
          const std::size_t piece = unit % pieces;
          head.first = cut(piece);
          head.last = cut(piece + 1);
          if (head.first == head.last && (piece > 0 || head.queries > 0)) return;
        }
        kernels.causal(call, head, work[worker]);
      },
      flops(s) * kNanosecondsPerFlop, poll, workers);
}

fastops_status all_at_once(const LinearKernels& kernels, const Shape& s, const LinearCall& call, const HeadList& heads,
                           fastops_poll poll) noexcept {
  const unsigned workers = worker_count();
  const std::size_t item = compute_size(s), count = heads.count(), state = kernels.state_items(call);
  // The sums over the parts are taken in their order: a split by the shapes alone.
  std::size_t parts = count >= kParts ? 1 : s.keys / kPartKeys;
  if (parts > kParts) parts = kParts;
  if (parts < 1) parts = 1;
  const std::size_t blocks = s.queries / kPartQueries + 1;
  Workspaces work;
  Workspace states;
  if (!work.reserve(workers, kernels.work_items(call), item)) return FASTOPS_NO_MEMORY;
  if (parts > 1 && !states.reserve({count, parts, state, item})) return FASTOPS_NO_MEMORY;
  const auto state_of = [&](std::size_t head) { return states.get<char>() + head * parts * state * item; };
  if (parts == 1) {
    // Head by head: no state outlives its head.
    if (!states.reserve({workers, state, item})) return FASTOPS_NO_MEMORY;
    return parallel_run(
        count,
        [&](std::size_t unit, unsigned worker) {
          LinearHead head = heads[unit];
          head.worker = worker;
          void* const own = states.get<char>() + worker * state * item;
          kernels.absorb(call, head, 0, head.keys, true, own, work[worker]);
          kernels.merge(call, head, own, 1, work[worker]);
          kernels.emit(call, head, 0, head.queries, own, work[worker]);
        },
        flops(s) * kNanosecondsPerFlop, poll, workers);
  }
  const double work_ns = flops(s) * kNanosecondsPerFlop / 2;
  const auto absorb = [&](std::size_t unit, unsigned worker) {
    LinearHead head = heads[unit / parts];
    head.worker = worker;
    const std::size_t part = unit % parts, step = head.keys / parts + 1, first = part * step;
    const std::size_t last = first + step < head.keys ? first + step : head.keys;
    kernels.absorb(call, head, first, last, part == 0, state_of(unit / parts) + part * state * item, work[worker]);
  };
  fastops_status status = parallel_run(count * parts, absorb, work_ns, poll, workers);
  if (status != FASTOPS_OK) return status;
  const auto merge = [&](std::size_t unit, unsigned worker) {
    kernels.merge(call, heads[unit], state_of(unit), parts, work[worker]);
  };
  status = parallel_run(count, merge, 0, poll, workers);
  if (status != FASTOPS_OK) return status;
  const auto emit = [&](std::size_t unit, unsigned worker) {
    LinearHead head = heads[unit / blocks];
    head.worker = worker;
    const std::size_t first = unit % blocks * kPartQueries;
    if (first >= head.queries) return;
    const std::size_t last = first + kPartQueries < head.queries ? first + kPartQueries : head.queries;
    kernels.emit(call, head, first, last, state_of(unit / blocks), work[worker]);
  };
  return parallel_run(count * blocks, emit, work_ns, poll, workers);
}

// Nystrom attention: heads in phases, so that few heads are shared by many threads, or each by one thread.
struct NystromArrays {
  const fastops_nystrom_attention& s;
  Heads q, k, v, out, mask;
  const char *conv, *q_landmarks, *k_landmarks;
  char* info;

  std::size_t count() const noexcept { return s.batch * s.heads_q; }
  NystromHead operator[](std::size_t i) const noexcept {
    const std::size_t size = item_size(s.dtype), item = s.dtype == FASTOPS_F64 ? 8 : 4;
    const std::size_t b = i / s.heads_q, head = i % s.heads_q, from = head / (s.heads_q / s.heads_kv);
    NystromHead h{};
    h.q = {at(q, size, b, head, 0), q.row};
    h.k = {at(k, size, b, from, 0), k.row};
    h.v = {at(v, size, b, from, 0), v.row};
    h.out = {at(out, size, b, head, 0), out.row};
    h.queries = s.queries;
    h.keys = s.keys;
    h.mask = static_cast<const std::uint8_t*>(at(mask, 1, b, 0, 0));
    h.mask_step = mask.row;
    h.mask_queries = h.mask != nullptr && s.queries == s.keys;
    if (conv != nullptr) h.conv = conv + head * s.taps * item;
    if (q_landmarks != nullptr) {
      h.q_landmarks = q_landmarks + i * s.landmarks * s.dim * item;
      h.k_landmarks = k_landmarks + (b * s.heads_kv + from) * s.landmarks * s.dim * item;
    }
    if (info != nullptr) h.info = info + 4 * i * item;
    return h;
  }
};
bool is_valid_nystrom(const fastops_nystrom_attention& s, const void* conv, const void* q_landmarks,
                      const void* k_landmarks) noexcept {
  if (s.dtype < FASTOPS_F16 || s.dtype > FASTOPS_F64 || s.landmarks == 0 || s.landmarks > 65536) return false;
  if (s.iterations > std::size_t{1} << 31) return false;
  if (s.heads_kv == 0 ? s.heads_q != 0 : s.heads_q % s.heads_kv != 0) return false;
  if (!fits_memory(s.batch, s.heads_q, s.queries, s.values)) return false;
  if ((conv != nullptr) && (s.taps % 2 == 0 || s.queries != s.keys)) return false;
  return (q_landmarks == nullptr) == (k_landmarks == nullptr);
}
NystromCall nystrom_call(const fastops_nystrom_attention& s, const Stopper& stopper) noexcept {
  return {static_cast<fastops_dtype>(s.dtype),
          s.dim,
          s.values,
          s.landmarks,
          s.iterations,
          s.taps,
          s.ridge_solve != 0,
          s.normalize != 0,
          s.ridge,
          s.scale,
          0,
          stopper.stop()};
}
double nystrom_ns(const fastops_nystrom_attention& s) noexcept {
  const double m = static_cast<double>(s.landmarks);
  return static_cast<double>(s.batch * s.heads_q) * kNanosecondsPerFlop *
         (2 * m * static_cast<double>(s.queries + s.keys) * static_cast<double>(s.dim + s.values) +
          (s.ridge_solve ? 6 : 8.0 * static_cast<double>(s.iterations)) * m * m * m);
}

// The keys of a head are cut by their number alone, and the parts added in their order: so many keys a part.
std::size_t nystrom_step(std::size_t keys) noexcept {
  const std::size_t blocks = (keys + kNystromBlock - 1) / kNystromBlock, step = (blocks + kParts - 1) / kParts;
  return (step < kNystromBlocks ? kNystromBlocks : step) * kNystromBlock;
}

fastops_status nystrom(const NystromKernels& kernels, const NystromArrays& arrays, NystromCall call,
                       fastops_poll poll) noexcept {
  const fastops_nystrom_attention& s = arrays.s;
  const unsigned workers = worker_count();
  const std::size_t item = s.dtype == FASTOPS_F64 ? 8 : 4, count = arrays.count();
  const std::size_t middle = (kernels.middle_items(call) + 15) / 16 * 16;
  const std::size_t partial = (kernels.partial_items(call) + 15) / 16 * 16;
  const std::size_t step = nystrom_step(s.keys), parts = s.keys > step ? (s.keys + step - 1) / step : 1;
  const auto end = [&](std::size_t part) { return (part + 1) * step < s.keys ? (part + 1) * step : s.keys; };
  const double ns = nystrom_ns(s);
  const bool phases = s.batch_init || (workers > 1 && count < 2 * workers);
  Workspaces work;
  if (!work.reserve(workers, kernels.work_items(call) + (phases ? 0 : middle + 2 * partial), item))
    return FASTOPS_NO_MEMORY;
  if (!phases)
    return parallel_run(
        count,
        [&](std::size_t unit, unsigned worker) {
          NystromHead head = arrays[unit];
          head.worker = worker;
          char* const own = static_cast<char*>(work[worker]);
          char* const first = own + middle * item;
          char* const other = first + partial * item;
          void* const rest = other + partial * item;
          if (kernels.prepare(call, head, nullptr, own, rest) != 0) {
            kernels.invert(call, head, own, rest);
            for (std::size_t part = 0; part < parts; ++part) {
              kernels.absorb(call, head, part * step, end(part), own, part == 0 ? first : other, rest);
              if (part > 0) kernels.merge(call, first, other);
            }
            kernels.solve(call, head, own, first, rest);
          }
          kernels.emit(call, head, 0, s.queries, own, rest);
        },
        ns, poll, workers);

  // Some heads at a time, so that their parts together stay small; each head's first part, to which the others are
  // added, stays.
  std::size_t together = workers * kPartsBytes / (parts * partial * item);
  together = parts == 1 || together > count ? count : together < 1 ? 1 : together;
  // The landmarks, as long as they are needed, have the room of the parts.
  const std::size_t of_head = kernels.landmark_items(call);
  std::size_t landmarks = 0, waiting = 0;
  Workspace middles, firsts, others, norms;
  if (!checked_product({count, of_head, item}, &landmarks) ||
      !checked_product({together, parts - 1, partial, item}, &waiting) || !middles.reserve({count, middle, item}) ||
      !firsts.reserve({count, partial, item}) || !others.reserve({landmarks > waiting ? landmarks : waiting}) ||
      !norms.reserve({count, sizeof(double)}))
    return FASTOPS_NO_MEMORY;
  const auto head_of = [&](std::size_t i, unsigned worker) {
    NystromHead head = arrays[i];
    head.worker = worker;
    return head;
  };
  const auto middle_of = [&](std::size_t i) { return middles.get<char>() + i * middle * item; };
  const auto partial_of = [&](std::size_t i, std::size_t part) {
    if (part == 0) return firsts.get<char>() + i * partial * item;
    return others.get<char>() + (i % together * (parts - 1) + part - 1) * partial * item;
  };
  auto* const norm = norms.get<double>();
  const std::size_t pieces = parts < s.landmarks ? parts : s.landmarks;
  const auto landmarks_of = [&](std::size_t i) { return others.get<char>() + i * of_head * item; };
  fastops_status status = parallel_run(
      count * 2 * pieces,
      [&](std::size_t unit, unsigned worker) {
        const std::size_t i = unit / (2 * pieces), piece = unit % pieces;
        kernels.means(call, head_of(i, worker), unit / pieces % 2 == 0, piece * s.landmarks / pieces,
                      (piece + 1) * s.landmarks / pieces, landmarks_of(i), work[worker]);
      },
      ns, poll, workers);
  if (status != FASTOPS_OK) return status;
  status = parallel_run(
      count,
      [&](std::size_t i, unsigned worker) {
        norm[i] = kernels.prepare(call, head_of(i, worker), landmarks_of(i), middle_of(i), work[worker]);
      },
      ns, poll, workers);
  if (status != FASTOPS_OK) return status;
  if (s.batch_init) {
    double largest = 0;
    for (std::size_t i = 0; i < count; ++i)
      if (norm[i] > largest) largest = norm[i];
    call.coefficient = largest > 0 ? 1 / largest : 0;
  }
  for (std::size_t from = 0; from < count; from += together) {
    const std::size_t heads = count - from < together ? count - from : together;
    // The longest units first.
    status = parallel_run(
        heads * (1 + parts),
        [&](std::size_t unit, unsigned worker) {
          const bool inverts = unit < heads;
          const std::size_t i = from + (inverts ? unit : (unit - heads) / parts), part = (unit - heads) % parts;
          if (norm[i] == 0) return;
          if (inverts)
            kernels.invert(call, head_of(i, worker), middle_of(i), work[worker]);
          else
            kernels.absorb(call, head_of(i, worker), part * step, end(part), middle_of(i), partial_of(i, part),
                           work[worker]);
        },
        ns, poll, workers);
    if (status != FASTOPS_OK) return status;
    status = parallel_run(
        heads,
        [&](std::size_t unit, unsigned) {
          const std::size_t i = from + unit;
          for (std::size_t part = 1; part < parts && norm[i] != 0; ++part)
            kernels.merge(call, partial_of(i, 0), partial_of(i, part));
        },
        0, poll, workers);
    if (status != FASTOPS_OK) return status;
  }
  status = parallel_run(
      count,
      [&](std::size_t i, unsigned worker) {
        if (norm[i] != 0) kernels.solve(call, head_of(i, worker), middle_of(i), partial_of(i, 0), work[worker]);
      },
      ns, poll, workers);
  if (status != FASTOPS_OK) return status;
  // Whole heads where their row sums are asked for.
  const std::size_t rows = arrays.info != nullptr ? (s.queries > 0 ? s.queries : 1) : kNystromQueries;
  const std::size_t blocks = s.queries == 0 ? 1 : (s.queries + rows - 1) / rows;
  return parallel_run(
      count * blocks,
      [&](std::size_t unit, unsigned worker) {
        const std::size_t i = unit / blocks, first = unit % blocks * rows;
        const std::size_t last = first + rows < s.queries ? first + rows : s.queries;
        kernels.emit(call, head_of(i, worker), first, last, middle_of(i), work[worker]);
      },
      ns, poll, workers);
}

}  // namespace
}  // namespace fastops

using namespace fastops;

fastops_status fastops_linear_attention_forward(const fastops_linear_attention* shape, fastops_heads q, fastops_heads k,
                                                fastops_heads v, fastops_heads out,
                                                const fastops_linear_options* options, fastops_poll poll) noexcept {
  if (shape == nullptr || options == nullptr || !is_valid_linear(*shape, *options)) return FASTOPS_INVALID;
  const LinearKernels& kernels = kLinear[active_level()][is_double(*shape)];
  LinearCall call = call_of(*shape);
  Workspace projection;
  if (!prepare(kernels, *shape, &call, &projection)) return FASTOPS_NO_MEMORY;
  const HeadList heads(*shape, q, k, v, out, *options);
  if (heads.count() == 0 || (shape->queries == 0 && options->final_state.s == nullptr)) return FASTOPS_OK;
  Stopper stopper(poll);
  poll = stopper.poll();
  call.stop = stopper.stop();
  return stopper.status(call.causal ? causal(kernels, *shape, call, heads, poll)
                                    : all_at_once(kernels, *shape, call, heads, poll));
}

fastops_status fastops_linear_attention_step(const fastops_linear_attention* shape, fastops_heads q, fastops_heads k,
                                             fastops_heads v, fastops_heads out,
                                             const fastops_linear_options* options) noexcept {
  if (shape == nullptr || options == nullptr || !is_valid_linear(*shape, *options)) return FASTOPS_INVALID;
  if (options->final_state.s == nullptr || options->offsets != nullptr || shape->queries != 1 || shape->keys != 1)
    return FASTOPS_INVALID;
  const LinearKernels& kernels = kLinear[active_level()][is_double(*shape)];
  LinearCall call = call_of(*shape);
  Workspace projection;
  if (!prepare(kernels, *shape, &call, &projection)) return FASTOPS_NO_MEMORY;
  const HeadList heads(*shape, q, k, v, out, *options);
  const unsigned workers = worker_count();
  const std::size_t count = heads.count();
  Workspaces work;
  if (!work.reserve(workers, kernels.step_items(call), compute_size(*shape))) return FASTOPS_NO_MEMORY;
  // A step that has begun is finished: half a state would be worth nothing.
  return parallel_run(
      count, [&](std::size_t unit, unsigned worker) { kernels.step(call, heads[unit], work[worker]); },
      2 * flops(*shape) * kNanosecondsPerFlop, {nullptr, nullptr}, workers);
}

fastops_status fastops_linear_attention_backward(const fastops_linear_attention* shape, fastops_heads dy,
                                                 fastops_heads q, fastops_heads k, fastops_heads v, fastops_heads y,
                                                 void* dq, void* dk, void* dv, const fastops_linear_options* options,
                                                 const fastops_linear_state* d_final,
                                                 const fastops_linear_state* d_initial, fastops_poll poll) noexcept {
  if (shape == nullptr || options == nullptr || !is_valid_linear(*shape, *options)) return FASTOPS_INVALID;
  for (const auto* state : {d_final, d_initial})
    if (state != nullptr && state->s != nullptr && state->z == nullptr) return FASTOPS_INVALID;
  const Shape& s = *shape;
  const LinearKernels& kernels = kLinear[active_level()][is_double(s)];
  const LinearGradientKernels& gradients = kGradient[active_level()][is_double(s)];
  LinearCall call = call_of(s);
  Workspace projection;
  if (!prepare(kernels, s, &call, &projection)) return FASTOPS_NO_MEMORY;
  if (s.queries == 0 && s.keys == 0 && (d_initial == nullptr || d_initial->s == nullptr)) return FASTOPS_OK;
  const HeadList heads(s, q, k, v, y, *options);
  const unsigned workers = worker_count();
  const std::size_t size = item_size(s.dtype), item = compute_size(s), group = call.group;
  Workspaces work;
  if (!work.reserve(workers, gradients.work_items(call, s.queries, s.keys), item)) return FASTOPS_NO_MEMORY;
  Stopper stopper(poll);
  poll = stopper.poll();
  call.stop = stopper.stop();
  return stopper.status(parallel_run(
      heads.count(),
      [&](std::size_t unit, unsigned worker) {
        const std::size_t b = options->offsets != nullptr ? 0 : unit / s.heads_kv, head = unit % s.heads_kv;
        const std::size_t first = heads.first(unit);
        const std::size_t key = (b * s.heads_kv + head) * s.keys + first;
        const std::size_t query = (b * s.heads_q + head * group) * s.queries + first;
        const auto part = [&](const fastops_linear_state* state, bool z) -> void* {
          if (state == nullptr) return nullptr;
          return z ? state_at(state->z, item, unit, s.features) : state_at(state->s, item, unit, s.features * s.values);
        };
        LinearGradient g{};
        g.dy = {at(dy, size, b, head * group, first), dy.row};
        g.dy_head = dy.head;
        g.dq = static_cast<char*>(dq) + query * s.dim * size;
        g.dq_head = static_cast<std::ptrdiff_t>(s.queries * s.dim);
        g.dk = static_cast<char*>(dk) + key * s.dim * size;
        g.dv = static_cast<char*>(dv) + key * s.values * size;
        g.ds = part(d_final, false);
        g.dz = part(d_final, true);
        g.ds_in = part(d_initial, false);
        g.dz_in = part(d_initial, true);
        LinearHead of_unit = heads[unit];
        of_unit.worker = worker;
        gradients.run(call, of_unit, g, work[worker]);
      },
      3 * flops(s) * kNanosecondsPerFlop, poll, workers));
}

fastops_status fastops_softmax_attention(const fastops_linear_attention* shape, fastops_heads q, fastops_heads k,
                                         fastops_heads v, fastops_heads out, fastops_heads key_mask,
                                         fastops_heads factor, const int64_t* offsets, size_t sequences,
                                         fastops_poll poll) noexcept {
  if (shape == nullptr || !is_valid(*shape, offsets, sequences)) return FASTOPS_INVALID;
  const Shape& s = *shape;
  const SoftmaxKernels& kernels = kSoftmax[active_level()][is_double(s)];
  Stopper stopper(poll);
  poll = stopper.poll();
  const SoftmaxCall call{
      s.causal != 0, static_cast<fastops_dtype>(s.dtype), static_cast<fastops_dtype>(s.dtype), s.dim, s.values, s.scale,
      stopper.stop()};
  const unsigned workers = worker_count();
  const std::size_t size = item_size(s.dtype), item = compute_size(s),
                    group = s.heads_kv == 0 ? 1 : s.heads_q / s.heads_kv;
  const std::size_t count = (offsets != nullptr ? sequences : s.batch) * s.heads_q;
  // Of packed sequences the longest one says how many blocks each may have.
  std::size_t longest = s.queries;
  if (offsets != nullptr) {
    longest = 0;
    for (std::size_t i = 0; i < sequences; ++i) {
      const auto length = static_cast<std::size_t>(offsets[i + 1] - offsets[i]);
      longest = length > longest ? length : longest;
    }
  }
  const std::size_t blocks = (longest + kSoftmaxRows - 1) / kSoftmaxRows;
  std::size_t units = 0;
  if (!checked_product({count, blocks}, &units)) return FASTOPS_NO_MEMORY;
  Workspaces work;
  if (!work.reserve(workers, kernels.work_items(call), item)) return FASTOPS_NO_MEMORY;
  return stopper.status(parallel_run(
      units,
      [&](std::size_t unit, unsigned worker) {
        const std::size_t i = unit / blocks, head = i % s.heads_q, sequence = i / s.heads_q;
        const std::size_t b = offsets != nullptr ? 0 : sequence;
        const auto t = offsets != nullptr ? static_cast<std::size_t>(offsets[sequence]) : 0;
        SoftmaxHead h{};
        h.worker = worker;
        h.queries = s.queries;
        h.keys = s.keys;
        if (offsets != nullptr) h.queries = h.keys = static_cast<std::size_t>(offsets[sequence + 1]) - t;
        h.first = unit % blocks * kSoftmaxRows;
        if (h.first >= h.queries) return;
        h.last = h.first + kSoftmaxRows < h.queries ? h.first + kSoftmaxRows : h.queries;
        h.q = {at(q, size, b, head, t), q.row};
        h.k = {at(k, size, b, head / group, t), k.row};
        h.v = {at(v, size, b, head / group, t), v.row};
        h.out = {at(out, size, b, head, t), out.row};
        h.mask = static_cast<const std::uint8_t*>(at(key_mask, 1, b, head / group, t));
        h.mask_step = key_mask.row;
        h.factor = at(factor, item, b, head, t);
        h.factor_step = factor.row;
        kernels.run(call, h, work[worker]);
      },
      static_cast<double>(count) * static_cast<double>(s.queries) * static_cast<double>(s.keys) *
          static_cast<double>(2 * (s.dim + s.values)) * kNanosecondsPerFlop,
      poll, workers));
}

fastops_status fastops_nystrom_attention_forward(const fastops_nystrom_attention* shape, fastops_heads q,
                                                 fastops_heads k, fastops_heads v, fastops_heads out,
                                                 fastops_heads key_mask, const void* conv, const void* q_landmarks,
                                                 const void* k_landmarks, void* info, fastops_poll poll) noexcept {
  if (shape == nullptr || !is_valid_nystrom(*shape, conv, q_landmarks, k_landmarks)) return FASTOPS_INVALID;
  const fastops_nystrom_attention& s = *shape;
  const NystromArrays arrays{s,
                             q,
                             k,
                             v,
                             out,
                             key_mask,
                             static_cast<const char*>(conv),
                             static_cast<const char*>(q_landmarks),
                             static_cast<const char*>(k_landmarks),
                             static_cast<char*>(info)};
  if (arrays.count() == 0 || (s.queries == 0 && info == nullptr)) return FASTOPS_OK;
  Stopper stopper(poll);
  poll = stopper.poll();
  NystromCall call = nystrom_call(s, stopper);
  call.informs = info != nullptr;
  return stopper.status(nystrom(kNystrom[active_level()][s.dtype == FASTOPS_F64], arrays, call, poll));
}

fastops_status fastops_nystrom_attention_backward(const fastops_nystrom_attention* shape, fastops_heads dy,
                                                  fastops_heads q, fastops_heads k, fastops_heads v, void* dq, void* dk,
                                                  void* dv, fastops_heads key_mask, const void* conv, void* d_conv,
                                                  const void* q_landmarks, const void* k_landmarks, void* d_q_landmarks,
                                                  void* d_k_landmarks, fastops_poll poll) noexcept {
  if (shape == nullptr || !is_valid_nystrom(*shape, conv, q_landmarks, k_landmarks)) return FASTOPS_INVALID;
  const fastops_nystrom_attention& s = *shape;
  const NystromGradientKernels& kernels = kNystromGradient[active_level()][s.dtype == FASTOPS_F64];
  const NystromArrays arrays{s,
                             q,
                             k,
                             v,
                             {},
                             key_mask,
                             static_cast<const char*>(conv),
                             static_cast<const char*>(q_landmarks),
                             static_cast<const char*>(k_landmarks),
                             nullptr};
  if (arrays.count() == 0 || (s.queries == 0 && s.keys == 0 && d_conv == nullptr && d_q_landmarks == nullptr))
    return FASTOPS_OK;
  Stopper stopper(poll);
  poll = stopper.poll();
  NystromCall call = nystrom_call(s, stopper);
  const std::size_t size = item_size(s.dtype), item = s.dtype == FASTOPS_F64 ? 8 : 4, group = s.heads_q / s.heads_kv;
  if (s.batch_init) {
    // The matrices of all heads come first: their coefficient is a constant of the gradient.
    const NystromKernels& forward = kNystrom[active_level()][s.dtype == FASTOPS_F64];
    Workspace middle, room;
    if (!middle.reserve({forward.middle_items(call), item}) || !room.reserve({forward.work_items(call), item}))
      return FASTOPS_NO_MEMORY;
    double largest = 0;
    const fastops_status status = parallel_run(
        arrays.count(),
        [&](std::size_t i, unsigned worker) {
          NystromHead head = arrays[i];
          head.worker = worker;
          const double norm = forward.prepare(call, head, nullptr, middle.get<void>(), room.get<void>());
          if (norm > largest) largest = norm;
        },
        0, poll, 1);
    if (status != FASTOPS_OK) return status;
    call.coefficient = largest > 0 ? 1 / largest : 0;
  }
  const unsigned workers = worker_count();
  Workspaces work;
  Workspace of_samples;  // the convolution's gradient, which samples share
  // Every step's Z is kept; the other sizes are those of arrays that there are.
  std::size_t kept = 0;
  if (!s.ridge_solve && !checked_product({s.iterations + 1, s.landmarks + 15, s.landmarks + 15, 16}, &kept))
    return FASTOPS_NO_MEMORY;
  const std::size_t taps = d_conv == nullptr ? 0 : s.heads_q * s.taps;
  if (!work.reserve(workers, kernels.work_items(call, s.queries, s.keys, group), item) ||
      !of_samples.reserve({s.batch, taps, item}))
    return FASTOPS_NO_MEMORY;
  const auto part = [](void* data, std::size_t offset) {
    return data == nullptr ? nullptr : static_cast<char*>(data) + offset;
  };
  const fastops_status status = stopper.status(parallel_run(
      s.batch * s.heads_kv,
      [&](std::size_t unit, unsigned worker) {
        const std::size_t b = unit / s.heads_kv, from = unit % s.heads_kv, first = b * s.heads_q + from * group;
        NystromHead head = arrays[first];
        head.worker = worker;
        NystromGradient g{};
        g.dy = {at(dy, size, b, from * group, 0), dy.row};
        g.dy_head = dy.head;
        g.q_head = q.head;
        g.dq_head = static_cast<std::ptrdiff_t>(s.queries * s.dim);
        g.group = group;
        g.dq = part(dq, first * s.queries * s.dim * size);
        g.dk = part(dk, unit * s.keys * s.dim * size);
        g.dv = part(dv, unit * s.keys * s.values * size);
        if (taps != 0) g.d_conv = of_samples.get<char>() + first * s.taps * item;
        g.d_q_landmarks = part(d_q_landmarks, first * s.landmarks * s.dim * item);
        g.d_k_landmarks = part(d_k_landmarks, unit * s.landmarks * s.dim * item);
        kernels.run(call, head, g, work[worker]);
      },
      4 * nystrom_ns(s), poll, workers));
  if (status != FASTOPS_OK) return status;
  const auto add_up = [&](auto* to) {
    const auto* const from = of_samples.get<std::remove_pointer_t<decltype(to)>>();
    for (std::size_t t = 0; t < taps; ++t) {
      to[t] = 0;
      for (std::size_t b = 0; b < s.batch; ++b) to[t] += from[b * taps + t];
    }
  };
  if (s.dtype == FASTOPS_F64)
    add_up(static_cast<double*>(d_conv));
  else
    add_up(static_cast<float*>(d_conv));
  return status;
}
