// SPDX-License-Identifier: BSD-3-Clause
// The C interface of the optimizer steps: lists of tensors cut into blocks for the pool, strided tensors by small
// copies.
#include <atomic>
#include <cmath>
#include <cstring>

#include "core/checked.h"
#include "core/parallel.h"
#include "optim/optim_kernels.h"

namespace fastops {
namespace {

#define FASTOPS_LEVEL_TABLE(level) &level::kOptimKernels,
constexpr const OptimKernels* kTable[] = {FASTOPS_FOR_EACH_LEVEL(FASTOPS_LEVEL_TABLE)};
#undef FASTOPS_LEVEL_TABLE
const OptimKernels& kernels() noexcept { return *kTable[active_level()]; }

constexpr std::size_t kItemSize[kOptimTypes] = {2, 2, 4, 8};
// Elements of a block of work: large against the hand-over, small against the whole.
constexpr std::size_t kBlock = 32768;
// What a tensor costs beside its elements, counted in them.
constexpr std::size_t kTensorCost = 64;
// Blocks begin at multiples of this within a tensor: of every vector, and of the runs that share random bits.
constexpr std::size_t kGrain = 64;
// Elements that share random bits, two and two.
constexpr std::size_t kHashRun = 32;
// Bytes of the copies that a strided tensor is worked on in.
constexpr std::size_t kCopied = FASTOPS_MAX_ROLES * kHashRun * sizeof(double);
constexpr int kMaxDimensions = 64;
// Elements that one partial sum covers, whatever the number of threads.
constexpr std::size_t kSumRun = 16384;
constexpr double kNanosecondsPerByte = 0.1;

const fastops_poll kNoPoll{nullptr, nullptr};  // what has begun is finished: half a step would be worth nothing

// Where a block begins; it ends where the next one does.
struct Start {
  std::size_t tensor, offset;
};

// A list of tensors cut into blocks of about kBlock elements, small tensors together, whatever the number of threads.
class Blocks {
 public:
  bool cut(const fastops_tensor_list& list) noexcept {
    std::size_t cost = 0;
    for (std::size_t i = 0; i < list.count; ++i) cost += list.size[i] + kTensorCost;
    nanoseconds_ = static_cast<double>(cost) * 4.0 * static_cast<double>(list.roles) * kNanosecondsPerByte;
    // A block closes with less than this left in it.
    constexpr std::size_t least = kTensorCost + kGrain;
    if (!starts_.reserve({cost / (kBlock - least) + 2, sizeof(Start)})) return false;
    count_ = 0;
    std::size_t room = begin({0, 0});
    for (std::size_t i = 0; i < list.count; ++i) {
      std::size_t offset = 0;
      if (room < least) room = begin({i, 0});
      room -= kTensorCost;
      while (list.size[i] - offset > room) {
        offset += room / kGrain * kGrain;
        room = begin({i, offset});
      }
      room -= list.size[i] - offset;
    }
    end_ = {list.count, 0};
    return true;
  }
  std::size_t count() const noexcept { return count_; }
  double nanoseconds() const noexcept { return nanoseconds_; }
  Start start(std::size_t block) const noexcept { return block < count_ ? starts_.get<Start>()[block] : end_; }

 private:
  std::size_t begin(Start start) noexcept {
    starts_.get<Start>()[count_++] = start;
    return kBlock;
  }

  Workspace starts_;
  std::size_t count_ = 0;
  Start end_{};
  double nanoseconds_ = 0;
};

// Where the elements of a strided tensor lie in each role, in C order.
class Walk {
 public:
  Walk(const fastops_layout& layout, std::size_t roles, std::size_t first) noexcept : layout_(layout), roles_(roles) {
    const auto ndim = static_cast<std::size_t>(layout.ndim);
    for (std::size_t r = 0; r < roles; ++r) offset_[r] = 0;
    for (std::size_t axis = ndim; axis-- > 0;) {
      const auto length = static_cast<std::size_t>(layout.shape[axis]);
      index_[axis] = static_cast<std::ptrdiff_t>(first % length);
      first /= length;
      for (std::size_t r = 0; r < roles; ++r) offset_[r] += index_[axis] * layout.strides[r * ndim + axis];
    }
  }
  std::ptrdiff_t offset(std::size_t role) const noexcept { return offset_[role]; }
  void next() noexcept {
    const auto ndim = static_cast<std::size_t>(layout_.ndim);
    for (std::size_t axis = ndim; axis-- > 0;) {
      const bool carries = ++index_[axis] == layout_.shape[axis];
      const std::ptrdiff_t steps = carries ? 1 - layout_.shape[axis] : 1;
      for (std::size_t r = 0; r < roles_; ++r) offset_[r] += steps * layout_.strides[r * ndim + axis];
      if (!carries) return;
      index_[axis] = 0;
    }
  }

 private:
  const fastops_layout& layout_;
  std::size_t roles_;
  std::ptrdiff_t index_[kMaxDimensions];
  std::ptrdiff_t offset_[FASTOPS_MAX_ROLES];
};

void copy_item(char* to, const char* from, std::size_t size) noexcept {
  if (size == 2)
    std::memcpy(to, from, 2);
  else if (size == 4)
    std::memcpy(to, from, 4);
  else
    std::memcpy(to, from, 8);
}

// Calls visit(piece, dtypes) for elements [first, first + n) of tensor i; strided ones go through copies, of which
// those of the roles in `written` (a mask) go back.
template <class Visit>
void visit_run(const fastops_tensor_list& list, std::size_t i, std::size_t first, std::size_t n, unsigned written,
               const Visit& visit) noexcept {
  const std::size_t roles = list.roles;
  void* const* const data = list.data + i * roles;
  const std::uint8_t* const dtype = list.dtype + i * roles;
  Piece piece;
  piece.tensor = i;
  piece.first = first;
  piece.n = n;
  if (list.layout == nullptr || list.layout[i] == nullptr) {
    for (std::size_t r = 0; r < roles; ++r) piece.at[r] = static_cast<char*>(data[r]) + first * kItemSize[dtype[r]];
    visit(piece, dtype);
    return;
  }
  alignas(64) char copies[kCopied];
  const std::size_t run = kCopied / (roles * sizeof(double)) / kHashRun * kHashRun;
  for (std::size_t r = 0; r < roles; ++r) piece.at[r] = copies + r * run * sizeof(double);
  Walk in(*list.layout[i], roles, first), out = in;
  for (; n != 0; piece.first += piece.n, n -= piece.n) {
    piece.n = n < run ? n : run;
    for (std::size_t e = 0; e < piece.n; ++e, in.next())
      for (std::size_t r = 0; r < roles; ++r) {
        const std::size_t size = kItemSize[dtype[r]];
        copy_item(piece.at[r] + e * size, static_cast<const char*>(data[r]) + in.offset(r), size);
      }
    visit(piece, dtype);
    for (std::size_t e = 0; e < piece.n; ++e, out.next())
      for (std::size_t r = 0; r < roles; ++r) {
        const std::size_t size = kItemSize[dtype[r]];
        if (written >> r & 1) copy_item(static_cast<char*>(data[r]) + out.offset(r), piece.at[r] + e * size, size);
      }
  }
}

template <class Visit>
fastops_status run(const fastops_tensor_list& list, const Blocks& blocks, unsigned written,
                   const Visit& visit) noexcept {
  const auto body = [&](std::size_t block, unsigned) noexcept {
    const Start end = blocks.start(block + 1);
    Start at = blocks.start(block);
    for (; at.tensor < end.tensor; at = {at.tensor + 1, 0})
      if (at.offset < list.size[at.tensor])
        visit_run(list, at.tensor, at.offset, list.size[at.tensor] - at.offset, written, visit);
    if (at.offset < end.offset) visit_run(list, at.tensor, at.offset, end.offset - at.offset, written, visit);
  };
  return parallel_run(blocks.count(), body, blocks.nanoseconds(), kNoPoll);
}
template <class Visit>
fastops_status run(const fastops_tensor_list& list, unsigned written, const Visit& visit) noexcept {
  Blocks blocks;
  return blocks.cut(list) ? run(list, blocks, written, visit) : FASTOPS_NO_MEMORY;
}

bool is_list(const fastops_tensor_list* list, std::size_t roles) noexcept {
  if (list == nullptr || list->roles != roles) return false;
  if (list->count == 0) return true;
  if (list->size == nullptr || list->data == nullptr || list->dtype == nullptr) return false;
  for (std::size_t i = 0; list->layout != nullptr && i < list->count; ++i)
    if (list->layout[i] != nullptr && (list->layout[i]->ndim < 0 || list->layout[i]->ndim > kMaxDimensions))
      return false;
  return true;
}

// Whether check(dtypes) holds for every tensor.
template <class Check> bool all(const fastops_tensor_list& list, const Check& check) noexcept {
  for (std::size_t i = 0; i < list.count; ++i) {
    const std::uint8_t* const dtype = list.dtype + i * list.roles;
    for (std::size_t r = 0; r < list.roles; ++r)
      if (dtype[r] >= kOptimTypes) return false;
    if (!check(dtype)) return false;
  }
  return true;
}

// A parameter of float32 or float64, its gradient the same (or a half type beside float32), every state as the
// parameter.
bool is_step(const fastops_tensor_list* list, std::size_t roles) noexcept {
  return is_list(list, roles) && all(*list, [roles](const std::uint8_t* dtype) {
           const std::uint8_t main = dtype[0];
           if (main < FASTOPS_F32 || (dtype[1] == FASTOPS_F64) != (main == FASTOPS_F64)) return false;
           for (std::size_t r = 2; r < roles; ++r)
             if (dtype[r] != main) return false;
           return true;
         });
}

bool in_unit(double x) noexcept { return x >= 0.0 && x <= 1.0; }

// Rows of tables, `rows[i]` of tensor i, cut into blocks.
class RowBlocks {
 public:
  bool cut(const fastops_tensor_list& list, const std::size_t* rows, const std::size_t* row_size) noexcept {
    std::size_t blocks = 0;
    for (std::size_t i = 0; i < list.count; ++i) {
      blocks += (rows[i] + share(row_size[i]) - 1) / share(row_size[i]);
      nanoseconds_ += static_cast<double>(rows[i]) * static_cast<double>(row_size[i]) * 28.0 * kNanosecondsPerByte;
    }
    if (!starts_.reserve({blocks, sizeof(Start)})) return false;
    for (std::size_t i = 0; i < list.count; ++i)
      for (std::size_t row = 0; row < rows[i]; row += share(row_size[i])) starts_.get<Start>()[count_++] = {i, row};
    return true;
  }
  template <class Visit>
  fastops_status run(const std::size_t* rows, const std::size_t* row_size, const Visit& visit) const noexcept {
    const auto body = [&](std::size_t block, unsigned) noexcept {
      const Start at = starts_.get<Start>()[block];
      const std::size_t end = at.offset + share(row_size[at.tensor]);
      for (std::size_t row = at.offset; row < end && row < rows[at.tensor]; ++row) visit(at.tensor, row);
    };
    return parallel_run(count_, body, nanoseconds_, kNoPoll);
  }

 private:
  static std::size_t share(std::size_t row_size) noexcept { return 1 + kBlock / (row_size + kTensorCost); }

  Workspace starts_;
  std::size_t count_ = 0;
  double nanoseconds_ = 0;
};

}  // namespace
}  // namespace fastops

using namespace fastops;

fastops_status fastops_ema_update(const fastops_tensor_list* tensors, const double* weights, int per_tensor,
                                  const std::uint64_t* seed) noexcept {
  if (tensors == nullptr || tensors->roles < 2 || tensors->roles > FASTOPS_MAX_ROLES ||
      !is_list(tensors, tensors->roles) || weights == nullptr)
    return FASTOPS_INVALID;
  const std::size_t profiles = tensors->roles - 1, stride = per_tensor ? tensors->count : 1;
  for (std::size_t k = 0; k < profiles * stride; ++k)
    if (!in_unit(weights[k])) return FASTOPS_INVALID;
  const OptimKernels& table = kernels();
  const bool fits = all(*tensors, [&](const std::uint8_t* dtype) {
    for (std::size_t k = 1; k <= profiles; ++k)
      if (table.ema[dtype[k]][dtype[0]] == nullptr || (dtype[k] == FASTOPS_BF16 && seed == nullptr)) return false;
    return true;
  });
  if (!fits) return FASTOPS_INVALID;
  const auto weight = [=](std::size_t k, std::size_t i) { return weights[per_tensor ? k * stride + i : k]; };
  if (profiles == 1)
    return run(*tensors, 2u, [&](const Piece& piece, const std::uint8_t* dtype) {
      table.ema[dtype[1]][dtype[0]](piece, weight(0, piece.tensor), seed);
    });
  return run(*tensors, ~1u, [&](const Piece& piece, const std::uint8_t* dtype) {
    Piece part = piece;
    for (std::size_t k = 0; k < profiles;) {
      // As many neighbours as one pass takes.
      double w[kProfilesAtOnce];
      std::size_t count = 0;
      for (; count < kProfilesAtOnce && k + count < profiles && dtype[1 + k + count] == FASTOPS_F32; ++count) {
        w[count] = weight(k + count, piece.tensor);
        if (w[count] == 0.0 || w[count] == 1.0) break;
        part.at[1 + count] = piece.at[1 + k + count];
      }
      if (count >= 2) {
        table.ema_profiles[count][dtype[0]](part, w);
        k += count;
      } else {
        part.at[1] = piece.at[1 + k];
        table.ema[dtype[1 + k]][dtype[0]](part, weight(k, piece.tensor), seed);
        ++k;
      }
    }
  });
}

fastops_status fastops_sgd_step(const fastops_tensor_list* tensors, const fastops_sgd* step) noexcept {
  if (step == nullptr || !in_unit(step->ema_weight)) return FASTOPS_INVALID;
  const std::size_t states = (step->has_momentum != 0) + (step->has_ema != 0);
  if (!is_step(tensors, 2 + states)) return FASTOPS_INVALID;
  const OptimKernels& table = kernels();
  const unsigned written = (step->moves ? 1u : 0u) | (step->zero_grad ? 2u : 0u) | ~3u;
  return run(*tensors, written,
             [&](const Piece& piece, const std::uint8_t* dtype) { table.sgd[dtype[1]](piece, *step); });
}

fastops_status fastops_adamw_step(const fastops_tensor_list* tensors, const fastops_adamw* step) noexcept {
  if (step == nullptr || !in_unit(step->ema_weight) || !is_step(tensors, step->has_ema ? 5 : 4)) return FASTOPS_INVALID;
  const OptimKernels& table = kernels();
  const unsigned written = step->zero_grad ? ~0u : ~2u;
  return run(*tensors, written,
             [&](const Piece& piece, const std::uint8_t* dtype) { table.adamw[dtype[1]](piece, *step); });
}

fastops_status fastops_lazy_adamw_rows(const fastops_tensor_list* tensors, const size_t* row_size,
                                       const int64_t* const* rows, const size_t* row_count, const uint8_t* const* live,
                                       int decays, const fastops_adamw* step) noexcept {
  if (step == nullptr || step->has_ema || step->zero_grad || !is_step(tensors, 4)) return FASTOPS_INVALID;
  if (tensors->count == 0) return FASTOPS_OK;
  if (row_size == nullptr || (rows != nullptr && row_count == nullptr)) return FASTOPS_INVALID;
  const fastops_tensor_list& list = *tensors;
  const OptimKernels& table = kernels();
  // Row `at` of p, m and v, row `gradient` of g.
  const auto piece_of = [&](std::size_t i, std::size_t at, std::size_t gradient) {
    Piece piece{};
    piece.n = row_size[i];
    piece.tensor = i;
    for (std::size_t r = 0; r < 4; ++r)
      piece.at[r] = static_cast<char*>(list.data[i * 4 + r]) +
                    (r == 1 ? gradient : at) * row_size[i] * kItemSize[list.dtype[i * 4 + r]];
    return piece;
  };
  Workspace counts;
  if (!counts.reserve({list.count, sizeof(std::size_t)})) return FASTOPS_NO_MEMORY;
  auto* const all_rows = counts.get<std::size_t>();
  for (std::size_t i = 0; i < list.count; ++i) all_rows[i] = row_size[i] == 0 ? 0 : list.size[i] / row_size[i];
  RowBlocks whole, chosen;
  if (!whole.cut(list, all_rows, row_size) || (rows != nullptr && !chosen.cut(list, row_count, row_size)))
    return FASTOPS_NO_MEMORY;
  if (rows == nullptr)
    return whole.run(all_rows, row_size, [&](std::size_t i, std::size_t row) {
      const Piece piece = piece_of(i, row, row);
      const std::uint8_t dtype = list.dtype[i * 4 + 1];
      if (!table.all_zero[dtype](piece.at[1], piece.n))
        table.adamw[dtype](piece, *step);
      else if (decays)
        table.decay_moments[list.dtype[i * 4]](piece, *step);
    });
  if (live != nullptr)
    whole.run(all_rows, row_size, [&](std::size_t i, std::size_t row) {
      if (!live[i][row]) table.decay_moments[list.dtype[i * 4]](piece_of(i, row, 0), *step);
    });
  return chosen.run(row_count, row_size, [&](std::size_t i, std::size_t row) {
    table.adamw[list.dtype[i * 4 + 1]](piece_of(i, static_cast<std::size_t>(rows[i][row]), row), *step);
  });
}

fastops_status fastops_lookahead_sync(const fastops_tensor_list* tensors, double alpha) noexcept {
  const OptimKernels& table = kernels();
  if (!in_unit(alpha) || !is_list(tensors, 2) ||
      !all(*tensors, [&](const std::uint8_t* dtype) { return dtype[0] >= FASTOPS_F32 && dtype[0] == dtype[1]; }))
    return FASTOPS_INVALID;
  return run(*tensors, 3u,
             [&](const Piece& piece, const std::uint8_t* dtype) { table.lookahead[dtype[0]](piece, alpha); });
}

fastops_status fastops_eg_step(const fastops_tensor_list* tensors, double lr) noexcept {
  if (!is_step(tensors, 2)) return FASTOPS_INVALID;
  const OptimKernels& table = kernels();
  return run(*tensors, 1u, [&](const Piece& piece, const std::uint8_t* dtype) { table.eg[dtype[1]](piece, lr); });
}

fastops_status fastops_adaptive_eg_step(const fastops_tensor_list* tensors, double* scales,
                                        const fastops_adaptive_eg* step) noexcept {
  if (step == nullptr || scales == nullptr || !is_step(tensors, 5)) return FASTOPS_INVALID;
  const fastops_tensor_list& list = *tensors;
  const OptimKernels& table = kernels();
  std::size_t count = 0;
  for (std::size_t i = 0; i < list.count; ++i) count += (list.size[i] + kSumRun - 1) / kSumRun;
  Blocks blocks;
  Workspace memory;
  if (!blocks.cut(list) || !memory.reserve({count, sizeof(Start) + sizeof(Angle)})) return FASTOPS_NO_MEMORY;
  auto* const sums = memory.get<Angle>();
  auto* const starts = reinterpret_cast<Start*>(sums + count);
  std::size_t next = 0;
  for (std::size_t i = 0; i < list.count; ++i)
    for (std::size_t offset = 0; offset < list.size[i]; offset += kSumRun) starts[next++] = {i, offset};
  constexpr std::size_t share = 16;  // sums of a block
  const auto body = [&](std::size_t block, unsigned) noexcept {
    for (std::size_t k = block * share; k < count && k < (block + 1) * share; ++k) {
      const std::size_t i = starts[k].tensor, left = list.size[i] - starts[k].offset;
      sums[k] = {};
      visit_run(list, i, starts[k].offset, left < kSumRun ? left : kSumRun, 0,
                [&](const Piece& piece, const std::uint8_t* dtype) { table.angle[dtype[1]](piece, &sums[k]); });
    }
  };
  parallel_run((count + share - 1) / share, body, static_cast<double>(count * kSumRun) * 8.0 * kNanosecondsPerByte,
               kNoPoll);
  std::size_t k = 0;
  for (std::size_t i = 0; i < list.count; ++i) {
    double dot = 0.0, update = 0.0, gradient = 0.0;
    for (; k < count && starts[k].tensor == i; ++k)
      for (std::size_t chain = 0; chain < kSumChains; ++chain) {
        dot += sums[k].dot[chain];
        update += sums[k].update[chain];
        gradient += sums[k].gradient[chain];
      }
    const double cosine = dot / (std::sqrt(update) * std::sqrt(gradient));
    if (!std::isfinite(cosine)) continue;  // no direction yet, or none that a number tells
    const double scale = scales[i] * std::exp(step->scale_lr * cosine);
    scales[i] = std::fmin(std::fmax(scale, step->scale_low), step->scale_high);
  }
  return run(list, blocks, ~2u, [&](const Piece& piece, const std::uint8_t* dtype) {
    table.adaptive_eg[dtype[1]](piece, *step, scales[piece.tensor]);
  });
}

fastops_status fastops_all_finite(const fastops_tensor_list* tensors, int* answer) noexcept {
  if (answer == nullptr || !is_list(tensors, 1) || !all(*tensors, [](const std::uint8_t*) { return true; }))
    return FASTOPS_INVALID;
  const OptimKernels& table = kernels();
  std::atomic<bool> finite{true};
  const fastops_status status = run(*tensors, 0u, [&](const Piece& piece, const std::uint8_t* dtype) {
    if (finite.load(std::memory_order_relaxed) && !table.all_finite[dtype[0]](piece.at[0], piece.n))
      finite.store(false, std::memory_order_relaxed);
  });
  *answer = finite.load() ? 1 : 0;
  return status;
}
