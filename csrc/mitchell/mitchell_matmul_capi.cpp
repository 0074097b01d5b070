// SPDX-License-Identifier: BSD-3-Clause
// The C interface of the matrix products, convolutions and their gradients: workspaces, blocking, threads.
#include <cstring>
#include <new>

#include "core/checked.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "fastops/fastops.h"
#include "mitchell/mitchell_matmul.h"

namespace fastops {
namespace {

constexpr std::size_t min_of(std::size_t a, std::size_t b) { return a < b ? a : b; }
constexpr std::size_t max_of(std::size_t a, std::size_t b) { return a < b ? b : a; }
constexpr std::size_t ceil_div(std::size_t a, std::size_t b) { return a / b + (a % b != 0 ? 1 : 0); }

const MatmulLevel& matmul_level() noexcept {
  static const MatmulLevel* const kTable[] = {
#define FASTOPS_ENTRY(level) &level::kMatmulLevel,
      FASTOPS_FOR_EACH_LEVEL(FASTOPS_ENTRY)
#undef FASTOPS_ENTRY
  };
  return *kTable[active_level()];
}

template <class T> const MatmulKernels<T>& matmul_kernels() noexcept {
  if constexpr (sizeof(T) == 4)
    return matmul_level().single;
  else
    return matmul_level().wide;
}

// A thread's share of a second, in products: for the estimate of whether threads are worth waking.
constexpr double kNanosecondsPerProduct = 0.03;
// Matrices with fewer products are computed by one thread each, several matrices at once.
constexpr std::size_t kSmallProducts = std::size_t{1} << 22;
// Packed at once: depth in indices, elements of b by all threads and by one thread for its own small matrix.
constexpr std::size_t kPassDepth = 2048;
constexpr std::size_t kSharedElements = std::size_t{1} << 22;
constexpr std::size_t kOwnElements = std::size_t{1} << 18;
constexpr std::size_t kBlocksWanted = 8;
// Where a has no more rows, b is packed as it is used; so many columns at once: a is packed anew for each such block.
constexpr std::size_t kFreshRows = 120;
constexpr std::size_t kFreshCols = 1536;

// Elements of padded images, and of their results, that wait at once.
constexpr std::size_t kFlatElements = std::size_t{1} << 22;

// Of a table product, halved for more blocks down to this.
constexpr std::size_t kLutCols = 512;

// Where each matrix of a batch lies.
struct Pointers {
  const void* const* a;
  const void* const* b;
  const void* const* point;
  void* const* out;
};

// How a product of one shape is cut up. Nothing in it depends on the number of threads.
struct Plan {
  bool small;                          // one thread a matrix
  bool fresh;                          // b is packed panel by panel just before it is used
  bool direct;                         // accumulates in out itself
  std::size_t cols;                    // of a panel
  std::size_t depth;                   // indices of depth packed into a panel
  std::size_t panel;                   // elements of a packed panel
  std::size_t pass_depth, pass_cols;   // packed at once
  std::size_t block_rows, block_cols;  // computed at once
  std::size_t panels, panel_blocks;    // panels of a pass: across, down
  std::size_t scratch;                 // bytes of packed a
  std::size_t rows_kept;               // rows of accumulators, where out is not one itself
  std::size_t cols_kept;
};

// Rows of a block, some `rows`, so that two and four threads end together as nearly as may be: of nine blocks one of
// two threads has five.
std::size_t even_rows(std::size_t all, std::size_t rows, std::size_t across, const TileShape& shape) noexcept {
  const std::size_t down = ceil_div(all, rows);
  std::size_t best = rows, least = ~std::size_t{0};
  for (std::size_t d = max_of(down - 1, 1); d < down + 5; ++d) {
    const std::size_t block = ceil_div(ceil_div(all, d), shape.rows) * shape.rows;
    if (block > shape.block) continue;
    const std::size_t blocks = ceil_div(all, block) * across;
    // Rows that the thread with most of them takes, times the threads.
    const std::size_t longest = max_of(ceil_div(blocks, 2) * 2, ceil_div(blocks, 4) * 4) * block;
    if (longest < least) least = longest, best = block;
  }
  return best;
}

template <class T> Plan make_plan(const Product<T>& p) noexcept {
  const TileShape& shape = matmul_kernels<T>().shape[static_cast<int>(p.body)];
  const std::size_t steps = static_cast<std::size_t>(p.steps);
  Plan plan{};
  std::size_t products = 0;
  plan.small = checked_product({p.rows, p.cols, p.depth}, &products) && products < kSmallProducts;
  plan.direct = p.out_col_stride == 1 && p.out_dtype == (sizeof(T) == 4 ? FASTOPS_F32 : FASTOPS_F64);
  plan.cols = shape.cols;
  plan.depth = shape.depth / steps;
  plan.panel = shape.cols * min_of(shape.depth, p.depth * steps);
  plan.fresh = p.rows <= min_of(shape.block, kFreshRows);
  plan.pass_depth = plan.fresh ? p.depth : min_of(p.depth, kPassDepth / plan.depth * plan.depth);
  const std::size_t wanted = (plan.small ? kOwnElements : kSharedElements) / (plan.pass_depth * steps) / shape.cols;
  const std::size_t panels = ceil_div(p.cols, shape.cols);
  plan.panels = plan.fresh ? 1 : min_of(panels, max_of(1, wanted));
  plan.pass_cols = (plan.fresh ? panels : plan.panels) * shape.cols;
  plan.panel_blocks = plan.fresh ? 1 : ceil_div(plan.pass_depth, plan.depth);
  const std::size_t cols = min_of(p.cols, plan.pass_cols);
  plan.block_rows = min_of(shape.block, ceil_div(p.rows, shape.rows) * shape.rows);
  plan.block_cols = plan.fresh ? min_of(plan.pass_cols, kFreshCols / shape.cols * shape.cols) : plan.pass_cols;
  if (!plan.small) {
    const auto blocks = [&] { return ceil_div(p.rows, plan.block_rows) * ceil_div(cols, plan.block_cols); };
    const auto shrink = [&](std::size_t least_rows, std::size_t least_cols) {
      while (!plan.fresh && blocks() < kBlocksWanted && plan.block_rows / 2 >= least_rows)
        plan.block_rows = ceil_div(plan.block_rows / 2, shape.rows) * shape.rows;
      while (blocks() < kBlocksWanted && plan.block_cols / 2 >= least_cols)
        plan.block_cols = ceil_div(plan.block_cols / 2, shape.cols) * shape.cols;
    };
    shrink(shape.block / 2, 512);
    if (!plan.fresh) shrink(shape.block / 5, 128);
    plan.block_rows = even_rows(p.rows, plan.block_rows, ceil_div(cols, plan.block_cols), shape);
  }
  plan.scratch = ceil_div(shape.scratch, 64) * 64 + 64;
  if (!plan.direct) {
    const bool one_pass = plan.pass_depth == p.depth;
    plan.rows_kept = one_pass ? plan.block_rows : p.rows;
    plan.cols_kept = one_pass ? plan.block_cols : plan.pass_cols;
  }
  return plan;
}

// What one matrix needs at a time, `count` times over.
template <class T> class Buffers {
 public:
  bool reserve(const Plan& plan, std::size_t workers) noexcept {
    own_b_ = plan.small || plan.fresh;  // packed b is shared where the threads share a matrix
    const std::size_t own = own_b_ ? workers : 1;
    const bool kept_by_block = !plan.direct && plan.rows_kept == plan.block_rows && plan.cols_kept == plan.block_cols;
    const std::size_t kept = plan.direct ? 0 : kept_by_block ? workers : own;
    kept_by_block_ = kept_by_block;
    plan_ = &plan;
    return b_.reserve({own, plan.panels, plan.panel_blocks, plan.panel, sizeof(T)}) &&
           flags_.reserve({own, plan.panels, plan.panel_blocks}) && a_.reserve({workers, plan.scratch}) &&
           kept_.reserve({kept, plan.rows_kept, plan.cols_kept, sizeof(T)});
  }
  T* b(std::size_t i) const noexcept {
    return b_.get<T>() + (own_b_ ? i : 0) * plan_->panels * plan_->panel_blocks * plan_->panel;
  }
  unsigned char* flags(std::size_t i) const noexcept {
    return flags_.get<unsigned char>() + (own_b_ ? i : 0) * plan_->panels * plan_->panel_blocks;
  }
  void* a(std::size_t worker) const noexcept { return a_.get<unsigned char>() + worker * plan_->scratch; }
  T* kept(std::size_t worker) const noexcept {
    return kept_.get<T>() + (kept_by_block_ || plan_->small ? worker : 0) * plan_->rows_kept * plan_->cols_kept;
  }
  bool kept_by_block() const noexcept { return kept_by_block_; }

 private:
  const Plan* plan_ = nullptr;
  bool kept_by_block_ = false, own_b_ = false;
  Workspace a_, b_, flags_, kept_;
};

std::size_t item_size(fastops_dtype dtype) noexcept {
  return dtype == FASTOPS_F64 || dtype == FASTOPS_I64 ? 8 : dtype == FASTOPS_F32 || dtype == FASTOPS_I32 ? 4 : 2;
}

// An empty sum is zero, in every type.
void write_zeros(void* out, std::size_t size, std::size_t rows, std::size_t cols, std::ptrdiff_t row_stride,
                 std::ptrdiff_t col_stride) noexcept {
  char* bytes = static_cast<char*>(out);
  const std::ptrdiff_t step = static_cast<std::ptrdiff_t>(size);
  for (std::size_t i = 0; i < rows; ++i)
    for (std::size_t j = 0; j < cols; ++j)
      std::memset(
          bytes + (static_cast<std::ptrdiff_t>(i) * row_stride + static_cast<std::ptrdiff_t>(j) * col_stride) * step, 0,
          size);
}

// One matrix. `run(blocks, work, body)` runs body(block, worker) for every block, here or on all threads.
template <class T, class Run>
fastops_status multiply_one(const Plan& plan, const Product<T>& p, const Buffers<T>& buffers, std::size_t owner,
                            Run&& run) noexcept {
  const MatmulKernels<T>& kernels = matmul_kernels<T>();
  for (std::size_t col0 = 0; col0 < p.cols; col0 += plan.pass_cols) {
    const std::size_t col1 = min_of(p.cols, col0 + plan.pass_cols);
    const std::size_t panels = ceil_div(col1 - col0, plan.cols);
    for (std::size_t depth0 = 0; depth0 < p.depth; depth0 += plan.pass_depth) {
      const std::size_t depth1 = min_of(p.depth, depth0 + plan.pass_depth);
      const std::size_t panel_blocks = ceil_div(depth1 - depth0, plan.depth);
      const PackedB<T> packed{buffers.b(owner), buffers.flags(owner), panels, plan.panel, col0, depth0, false};
      const double elements = static_cast<double>(depth1 - depth0) * static_cast<double>(col1 - col0);
      fastops_status status = FASTOPS_OK;
      if (!plan.fresh)
        status = run(panels * panel_blocks, elements * 0.5, [&](std::size_t i, unsigned) noexcept {
          kernels.pack_b(p, packed, i % panels, i / panels, depth1);
        });
      if (status != FASTOPS_OK) return status;
      const std::size_t across = ceil_div(col1 - col0, plan.block_cols), down = ceil_div(p.rows, plan.block_rows);
      const double products = elements * static_cast<double>(p.rows) * static_cast<double>(p.steps);
      status = run(across * down, products * kNanosecondsPerProduct, [&](std::size_t i, unsigned worker) noexcept {
        const std::size_t row0 = i / across * plan.block_rows, first_col = col0 + i % across * plan.block_cols;
        const BlockRange range{row0,      min_of(p.rows, row0 + plan.block_rows),
                               first_col, min_of(col1, first_col + plan.block_cols),
                               depth0,    depth1};
        PackedB<T> b = packed;
        if (plan.fresh) b = {buffers.b(worker), buffers.flags(worker), 1, plan.panel, first_col, depth0, true};
        if (plan.direct) {
          T* c = static_cast<T*>(p.out) + static_cast<std::ptrdiff_t>(row0) * p.out_row_stride +
                 static_cast<std::ptrdiff_t>(first_col);
          kernels.multiply(p, b, range, buffers.a(worker), c, p.out_row_stride, depth0 == 0);
          return;
        }
        const std::ptrdiff_t ldc = static_cast<std::ptrdiff_t>(plan.cols_kept);
        T* c = buffers.kept(buffers.kept_by_block() ? worker : owner);
        if (!buffers.kept_by_block()) c += static_cast<std::ptrdiff_t>(row0) * ldc + (first_col - col0);
        kernels.multiply(p, b, range, buffers.a(worker), c, ldc, depth0 == 0);
        if (depth1 == p.depth) kernels.finish(p, range, c, ldc);
      });
      if (status != FASTOPS_OK) return status;
    }
  }
  return FASTOPS_OK;
}

template <class T> Product<T> member(const Product<T>& p, const Pointers& pointers, std::size_t i) noexcept {
  Product<T> one = p;
  one.a.data = pointers.a[i];
  one.b.data = pointers.b[i];
  if (pointers.point != nullptr) one.point.data = pointers.point[i];
  one.out = pointers.out[i];
  return one;
}

// Every matrix of a batch.
template <class T>
fastops_status multiply_batch(const Product<T>& p, std::size_t batch, const Pointers& pointers,
                              fastops_poll poll) noexcept {
  if (batch == 0 || p.rows == 0 || p.cols == 0) return FASTOPS_OK;
  if (p.depth == 0) {
    for (std::size_t i = 0; i < batch; ++i)
      write_zeros(pointers.out[i], item_size(p.out_dtype), p.rows, p.cols, p.out_row_stride, p.out_col_stride);
    return FASTOPS_OK;
  }
  const Plan plan = make_plan(p);
  const double products = static_cast<double>(p.rows) * static_cast<double>(p.cols) * static_cast<double>(p.depth) *
                          static_cast<double>(p.steps);
  // Groups of matrices worth a ticket.
  const std::size_t group = products >= 100000 ? 1 : min_of(batch, static_cast<std::size_t>(100000 / products) + 1);
  const std::size_t groups = plan.small ? ceil_div(batch, group) : 1;
  const bool alone = plan.small && groups == 1;
  const unsigned workers = alone ? 1 : worker_count();
  Buffers<T> buffers;
  if (!buffers.reserve(plan, workers)) return FASTOPS_NO_MEMORY;
  if (plan.small) {
    const auto matrices = [&](std::size_t g, unsigned worker) noexcept {
      for (std::size_t i = g * group; i < min_of(batch, (g + 1) * group); ++i) {
        multiply_one(plan, member(p, pointers, i), buffers, worker,
                     [&](std::size_t blocks, double, auto&& body) noexcept {
                       for (std::size_t block = 0; block < blocks; ++block) body(block, worker);
                       return FASTOPS_OK;
                     });
      }
    };
    return parallel_run(groups, matrices, products * static_cast<double>(batch) * kNanosecondsPerProduct, poll,
                        workers);
  }
  for (std::size_t i = 0; i < batch; ++i) {
    const fastops_status status = multiply_one(plan, member(p, pointers, i), buffers, 0,
                                               [&](std::size_t blocks, double work, auto&& body) noexcept {
                                                 return parallel_run(blocks, body, work, poll, workers);
                                               });
    if (status != FASTOPS_OK) return status;
  }
  return FASTOPS_OK;
}

// From a multiplier to a product.

template <class T>
const MitchellConstants<typename IntegerOf<T>::type>& constants(const fastops_mitchell* m,
                                                                fastops_dtype dtype) noexcept {
  if constexpr (sizeof(T) == 4)
    return m->single[dtype];
  else
    return m->wide;
}

template <class T> struct Table {
  typename IntegerOf<T>::type entries[256];  // 16 x 16, whatever the number of segments
};

template <class T>
void fill_table(const fastops_mitchell* m, fastops_dtype dtype, bool transposed, Table<T>* table) noexcept {
  const int n = m->params.segments, repeat = 16 / n;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      const int row = (transposed ? j : i) / repeat, col = (transposed ? i : j) / repeat;
      table->entries[i * 16 + j] = constants<T>(m, dtype).table[row * n + col];
    }
}

Operand matrix(fastops_dtype dtype, bool flush, std::ptrdiff_t row_stride, std::ptrdiff_t col_stride) noexcept {
  Operand x{};
  x.dtype = dtype;
  x.layout = Layout::kMatrix;
  x.flush = flush;
  x.row_stride = row_stride;
  x.col_stride = col_stride;
  return x;
}

enum class Kind {
  kForward,  // approximate products
  kExact,    // exact products
  kSlope,    // a times the slope in `point` at b
  kSlopeA,   // the slope in `point` at a, times b
};

// Fills in what the multiplier decides. `transposed`: point is the second operand of the multiplication.
template <class T>
void set_arithmetic(Product<T>* p, const fastops_mitchell* m, fastops_dtype dtype, Kind kind, bool transposed,
                    Table<T>* table) noexcept {
  p->steps = 1;
  p->keep = -1;
  p->out_dtype = dtype;
  p->body = TileBody::kExact;
  p->pack_a = p->pack_b = Pack::kRaw;
  p->poison = false;
  if (m == nullptr || kind == Kind::kExact) return;
  const fastops_mitchell_params& params = m->params;
  const auto& k = constants<T>(m, dtype);
  constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52;
  p->keep = k.mantissa_mask | ~((typename IntegerOf<T>::type{1} << kMantissa) - 1);
  p->c = k.c;
  p->corrections = params.corrections;
  const bool slope = kind == Kind::kSlope || kind == Kind::kSlopeA;
  p->poison = slope;
  if (params.form == FASTOPS_FORM_LOG) {
    if (params.segments != 0) {
      fill_table(m, dtype, transposed, table);
      p->table = table->entries;
      p->body = kind == Kind::kSlope    ? TileBody::kSlopeSegments
                : kind == Kind::kSlopeA ? TileBody::kSlopeASegments
                                        : TileBody::kSegments;
    } else {
      p->body = kind == Kind::kSlope ? TileBody::kSlope : kind == Kind::kSlopeA ? TileBody::kSlopeA : TileBody::kLog;
    }
  } else if (slope) {
    (kind == Kind::kSlopeA ? p->pack_a : p->pack_b) = params.form == FASTOPS_FORM_EQUATION ? Pack::kPower : Pack::kTop;
  } else {
    p->pack_a = p->pack_b = params.form == FASTOPS_FORM_EQUATION ? Pack::kEquation : Pack::kIterative;
    p->steps = 2;
  }
}

bool is_float(fastops_dtype dtype) noexcept {
  return dtype == FASTOPS_F16 || dtype == FASTOPS_BF16 || dtype == FASTOPS_F32 || dtype == FASTOPS_F64;
}

bool flushes(const fastops_mitchell* m) noexcept { return m != nullptr && m->params.flush != 0; }

template <class T>
fastops_status matmul(const fastops_mitchell* m, fastops_dtype dtype, std::size_t batch, const Pointers& pointers,
                      const fastops_matrix& a, const fastops_matrix& b, const fastops_matrix& out,
                      fastops_poll poll) noexcept {
  Product<T> p{};
  Table<T> table;
  set_arithmetic(&p, m, dtype, Kind::kForward, false, &table);
  p.rows = a.rows;
  p.depth = a.cols;
  p.cols = b.cols;
  p.a = matrix(dtype, flushes(m), a.row_stride, a.col_stride);
  p.b = matrix(dtype, flushes(m), b.row_stride, b.col_stride);
  p.out_row_stride = out.row_stride;
  p.out_col_stride = out.col_stride;
  return multiply_batch(p, batch, pointers, poll);
}

// grad (shaped like point) = left (rows x depth) times right (depth x cols), one of them dy, the other where the slopes
// in `point` are taken: right, or (`second`: point is the second operand of the multiplication) left.
template <class T>
fastops_status matmul_grad(const fastops_mitchell* m, fastops_gradient mode, fastops_dtype dtype, bool second,
                           std::size_t batch, const Pointers& pointers, const fastops_matrix& left,
                           const fastops_matrix& right, const fastops_matrix& point, const fastops_matrix& grad,
                           fastops_poll poll) noexcept {
  Product<T> p{};
  Table<T> table;
  const bool slope = mode == FASTOPS_GRADIENT_EXACT;
  set_arithmetic(&p, m, dtype,
                 slope && second                ? Kind::kSlopeA
                 : slope                        ? Kind::kSlope
                 : mode == FASTOPS_GRADIENT_STE ? Kind::kExact
                                                : Kind::kForward,
                 slope && second, &table);
  p.rows = left.rows;
  p.depth = left.cols;
  p.cols = right.cols;
  const bool flush = flushes(m) && mode != FASTOPS_GRADIENT_STE;
  p.a = matrix(dtype, flush && (second || !slope), left.row_stride, left.col_stride);
  p.b = matrix(dtype, flush && !(second && slope), right.row_stride, right.col_stride);
  p.point = matrix(dtype, flush, point.row_stride, point.col_stride);
  p.out_row_stride = grad.row_stride;
  p.out_col_stride = grad.col_stride;
  return multiply_batch(p, batch, pointers, poll);
}

fastops_matrix transpose(const fastops_matrix& x) noexcept { return {x.cols, x.rows, x.col_stride, x.row_stride}; }

// Convolution.

Patches patches_of(const fastops_conv2d& s) noexcept {
  Patches p{};
  p.channels = s.channels / s.groups;
  p.height = s.height;
  p.width = s.width;
  p.kernel_height = s.kernel_height;
  p.kernel_width = s.kernel_width;
  p.out_height = (s.height + 2 * s.padding_h - s.dilation_h * (s.kernel_height - 1) - 1) / s.stride_h + 1;
  p.out_width = (s.width + 2 * s.padding_w - s.dilation_w * (s.kernel_width - 1) - 1) / s.stride_w + 1;
  p.stride_h = s.stride_h;
  p.stride_w = s.stride_w;
  p.padding_h = s.padding_h;
  p.padding_w = s.padding_w;
  p.dilation_h = s.dilation_h;
  p.dilation_w = s.dilation_w;
  p.image_stride = static_cast<std::ptrdiff_t>(s.channels * s.height * s.width);
  return p;
}

bool conv_fits(const fastops_conv2d& s) noexcept {
  std::size_t size = 0;
  constexpr std::size_t most = static_cast<std::size_t>(-1) / 8;  // of a side: sums of a few cannot wrap
  for (const std::size_t side : {s.height, s.width, s.padding_h, s.padding_w})
    if (side > most) return false;
  if (!checked_product({s.dilation_h, s.kernel_height}, &size) ||
      !checked_product({s.dilation_w, s.kernel_width}, &size))
    return false;
  return s.groups != 0 && s.channels % s.groups == 0 && s.filters % s.groups == 0 && s.stride_h != 0 &&
         s.stride_w != 0 && s.dilation_h != 0 && s.dilation_w != 0 && s.kernel_height != 0 && s.kernel_width != 0 &&
         s.dilation_h * (s.kernel_height - 1) < s.height + 2 * s.padding_h &&
         s.dilation_w * (s.kernel_width - 1) < s.width + 2 * s.padding_w &&
         checked_product({s.batch, s.channels, s.height, s.width, 8}, &size) &&
         checked_product({s.filters, s.channels / s.groups, s.kernel_height, s.kernel_width, 8}, &size) &&
         checked_product({s.height + 2 * s.padding_h, s.width + 2 * s.padding_w}, &size) &&
         checked_product({s.batch, s.filters, patches_of(s).out_height, patches_of(s).out_width, 8}, &size);
}

const void* element_at(const void* data, fastops_dtype dtype, std::size_t index) noexcept {
  return static_cast<const char*>(data) + index * item_size(dtype);
}
void* element_at(void* data, fastops_dtype dtype, std::size_t index) noexcept {
  return static_cast<char*>(data) + index * item_size(dtype);
}

// In steps of one pixel each row of the patches of a padded image is that image from some element on, if positions
// behind the end of an image row are computed as well and thrown away.
struct FlatImage {
  std::size_t width, plane, cols;  // of a padded row, of a padded channel, of the product

  FlatImage(const Patches& p) noexcept
      : width(p.width + 2 * p.padding_w),
        plane((p.height + 2 * p.padding_h) * width),
        cols((p.out_height - 1) * width + p.out_width) {}
  bool pays(const Patches& p, std::size_t filters) const noexcept {
    const std::size_t wanted = p.out_height * p.out_width;
    return p.stride_h == 1 && p.stride_w == 1 && plane / 2 <= p.height * p.width && cols <= wanted + wanted / 4 &&
           max_of(p.channels, 1) <= kFlatElements / plane && filters <= kFlatElements / cols;
  }
};
template <class T>
fastops_status conv2d_flat(Product<T> p, const Patches& patches, std::size_t count, const Pointers& pointers,
                           fastops_poll poll) noexcept {
  const FlatImage flat(patches);
  const std::size_t positions = p.cols, channels = patches.channels, kernel = p.depth / channels;
  p.cols = flat.cols;
  p.b.col_stride = 1;
  p.out_row_stride = static_cast<std::ptrdiff_t>(flat.cols);
  const std::size_t image = channels * flat.plane, result = p.rows * flat.cols;
  const std::size_t together = max_of(1, min_of(count, kFlatElements / max_of(image, result)));
  Workspace offsets, images, results, lists;
  if (!offsets.reserve({p.depth, sizeof(std::size_t)}) || !images.reserve({together, image, sizeof(T)}) ||
      !results.reserve({together, result, sizeof(T)}) || !lists.reserve({together, 2, sizeof(void*)}))
    return FASTOPS_NO_MEMORY;
  auto* const offset = offsets.get<std::size_t>();
  for (std::size_t k = 0; k < p.depth; ++k)
    offset[k] = k / kernel * flat.plane + k % kernel / patches.kernel_width * patches.dilation_h * flat.width +
                k % patches.kernel_width * patches.dilation_w;
  p.b.row_offsets = offset;
  const void** const bs = lists.get<const void*>();
  void** const outs = lists.get<void*>() + together;
  for (std::size_t i = 0; i < together; ++i) {
    bs[i] = images.get<T>() + i * image;
    outs[i] = results.get<T>() + i * result;
  }
  constexpr double kNanosecondsPerElement = 0.5;
  for (std::size_t first = 0; first < count; first += together) {
    const std::size_t some = min_of(together, count - first);
    const auto pad = [&](std::size_t unit, unsigned) noexcept {
      T* const to = images.get<T>() + unit * flat.plane;
      const T* const from =
          static_cast<const T*>(pointers.b[first + unit / channels]) + unit % channels * patches.height * patches.width;
      std::memset(static_cast<void*>(to), 0, flat.plane * sizeof(T));
      for (std::size_t y = 0; y < patches.height; ++y)
        std::memcpy(to + (y + patches.padding_h) * flat.width + patches.padding_w, from + y * patches.width,
                    patches.width * sizeof(T));
    };
    fastops_status status =
        parallel_run(some * channels, pad, static_cast<double>(some * image) * kNanosecondsPerElement, poll);
    if (status != FASTOPS_OK) return status;
    status = multiply_batch(p, some, {pointers.a + first, bs, nullptr, outs}, poll);
    if (status != FASTOPS_OK) return status;
    const auto crop = [&](std::size_t unit, unsigned) noexcept {
      const T* const from = results.get<T>() + unit * flat.cols;
      T* const to = static_cast<T*>(pointers.out[first + unit / p.rows]) + unit % p.rows * positions;
      for (std::size_t y = 0; y < patches.out_height; ++y)
        std::memcpy(to + y * patches.out_width, from + y * flat.width, patches.out_width * sizeof(T));
    };
    status = parallel_run(some * p.rows, crop, static_cast<double>(some * result) * kNanosecondsPerElement, poll);
    if (status != FASTOPS_OK) return status;
  }
  return FASTOPS_OK;
}

// For each image and group: w (filters of the group x depth) times patches (depth x positions).
template <class T>
fastops_status conv2d(const fastops_mitchell* m, fastops_dtype dtype, const fastops_conv2d& s, const void* x,
                      const void* w, void* out, fastops_poll poll) noexcept {
  const Patches patches = patches_of(s);
  Product<T> p{};
  Table<T> table;
  set_arithmetic(&p, m, dtype, Kind::kForward, false, &table);
  p.rows = s.filters / s.groups;
  p.depth = patches.channels * s.kernel_height * s.kernel_width;
  p.cols = patches.out_height * patches.out_width;
  p.a = matrix(dtype, flushes(m), static_cast<std::ptrdiff_t>(p.depth), 1);
  p.b = matrix(dtype, flushes(m), 0, 0);
  p.out_row_stride = static_cast<std::ptrdiff_t>(p.cols);
  p.out_col_stride = 1;
  const std::size_t count = s.batch * s.groups;
  Workspace memory;
  if (!memory.reserve({count, 3, sizeof(void*)})) return FASTOPS_NO_MEMORY;
  const void** const list = memory.get<const void*>();
  void** const outs = memory.get<void*>() + 2 * count;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t group = i % s.groups;
    list[i] = element_at(w, dtype, group * p.rows * p.depth);
    list[count + i] = element_at(x, dtype, i * patches.channels * s.height * s.width);
    outs[i] = element_at(out, dtype, i * p.rows * p.cols);
  }
  const Pointers pointers{list, list + count, nullptr, outs};
  if (s.kernel_height * s.kernel_width * s.stride_h * s.stride_w == 1 && s.padding_h + s.padding_w == 0) {
    // The patches are the image itself.
    p.b.row_stride = static_cast<std::ptrdiff_t>(p.cols);
    p.b.col_stride = 1;
  } else if (item_size(dtype) == sizeof(T) && count > 0 && p.rows > 0 && p.depth > 0 &&
             FlatImage(patches).pays(patches, p.rows)) {
    return conv2d_flat(p, patches, count, pointers, poll);
  } else {
    p.b.layout = Layout::kPatches;
    p.b.patches = &patches;
  }
  return multiply_batch(p, count, pointers, poll);
}

Kind gradient_kind(fastops_gradient mode) noexcept {
  return mode == FASTOPS_GRADIENT_EXACT ? Kind::kSlopeA : mode == FASTOPS_GRADIENT_STE ? Kind::kExact : Kind::kForward;
}

// dw transposed: for each group, patches (depth x images and positions) times dy transposed. Patches are read along
// their rows, where the image lies together.
template <class T>
fastops_status conv2d_grad_w(const fastops_mitchell* m, fastops_gradient mode, fastops_dtype dtype,
                             const fastops_conv2d& s, const void* x, const void* w, const void* dy, void* dw,
                             fastops_poll poll) noexcept {
  const Patches patches = patches_of(s);
  const std::size_t positions = patches.out_height * patches.out_width;
  Product<T> p{};
  Table<T> table;
  const bool slope = mode == FASTOPS_GRADIENT_EXACT, flush = flushes(m) && mode != FASTOPS_GRADIENT_STE;
  // "mimic" multiplies dy by the patch, in this order; the slope is taken in the first operand.
  set_arithmetic(&p, m, dtype, gradient_kind(mode), !slope, &table);
  p.rows = patches.channels * s.kernel_height * s.kernel_width;
  p.depth = s.batch * positions;
  p.cols = s.filters / s.groups;
  p.a = matrix(dtype, flush, 0, 0);
  p.a.layout = Layout::kPatches;
  p.a.patches = &patches;
  p.b = matrix(dtype, flush && !slope, 1, static_cast<std::ptrdiff_t>(positions));
  p.b.row_inner = positions;
  p.b.row_outer_stride = static_cast<std::ptrdiff_t>(s.filters * positions);
  p.point = matrix(dtype, flush, 1, static_cast<std::ptrdiff_t>(p.rows));
  p.out_row_stride = 1;
  p.out_col_stride = static_cast<std::ptrdiff_t>(p.rows);
  Workspace memory;
  if (!memory.reserve({s.groups, 4, sizeof(void*)})) return FASTOPS_NO_MEMORY;
  const void** const list = memory.get<const void*>();
  void** const outs = memory.get<void*>() + 3 * s.groups;
  for (std::size_t i = 0; i < s.groups; ++i) {
    list[i] = element_at(x, dtype, i * patches.channels * s.height * s.width);
    list[s.groups + i] = element_at(dy, dtype, i * p.cols * positions);
    list[2 * s.groups + i] = element_at(w, dtype, i * p.cols * p.rows);
    outs[i] = element_at(dw, dtype, i * p.cols * p.rows);
  }
  return multiply_batch(p, s.groups, {list, list + s.groups, list + 2 * s.groups, outs}, poll);
}

// Adds rows of patches (channel and kernel position x positions [first, first + count)) to an image.
template <class T>
void add_patches(const Patches& p, std::size_t channels, std::size_t first, std::size_t count, const T* rows,
                 T* image) noexcept {
  for (std::size_t c = 0; c < channels; ++c, image += p.height * p.width)
    for (std::size_t kh = 0; kh < p.kernel_height; ++kh)
      for (std::size_t kw = 0; kw < p.kernel_width; ++kw, rows += count) {
        std::size_t oy = first / p.out_width, ox = first % p.out_width;
        for (std::size_t done = 0; done < count; ox = 0, ++oy) {
          const std::size_t run = min_of(count - done, p.out_width - ox);
          const std::size_t y = oy * p.stride_h + kh * p.dilation_h - p.padding_h;  // wraps in the padding
          const T* from = rows + done;
          done += run;
          if (y >= p.height) continue;
          T* line = image + y * p.width;
          std::size_t at = ox * p.stride_w + kw * p.dilation_w - p.padding_w;
          for (std::size_t i = 0; i < run; ++i, at += p.stride_w)
            if (at < p.width) line[at] += from[i];
        }
      }
}

// dx: for each image, group and range of channels, the gradient of the patches (depth x positions), block by block of
// positions, summed into the image.
template <class T>
fastops_status conv2d_grad_x(const fastops_mitchell* m, fastops_gradient mode, fastops_dtype dtype,
                             const fastops_conv2d& s, const void* x, const void* w, const void* dy, void* dx,
                             fastops_poll poll) noexcept {
  const Patches patches = patches_of(s);
  const std::size_t positions = patches.out_height * patches.out_width, filters = s.filters / s.groups;
  const std::size_t kernel = s.kernel_height * s.kernel_width, plane = s.height * s.width;
  const std::size_t depth = patches.channels * kernel;
  const std::size_t images = s.batch * s.groups;
  if (images == 0 || patches.channels == 0 || plane == 0) return FASTOPS_OK;
  if (filters == 0) {
    std::memset(dx, 0, images * patches.channels * plane * item_size(dtype));
    return FASTOPS_OK;
  }
  Product<T> p{};
  Table<T> table;
  const bool slope = mode == FASTOPS_GRADIENT_EXACT, flush = flushes(m) && mode != FASTOPS_GRADIENT_STE;
  // The slope is taken in the second operand; "mimic" multiplies w by dy, in this order.
  set_arithmetic(&p, m, dtype, gradient_kind(mode), slope, &table);
  const std::size_t wanted = images >= kBlocksWanted ? 1 : ceil_div(kBlocksWanted, images);
  const std::size_t channels = ceil_div(patches.channels, min_of(patches.channels, wanted));
  const std::size_t ranges = ceil_div(patches.channels, channels);
  constexpr std::size_t kPositions = 480;
  const std::size_t block = min_of(positions, kPositions);
  p.rows = channels * kernel;
  p.depth = filters;
  p.cols = block;
  p.a = matrix(dtype, flush, 1, static_cast<std::ptrdiff_t>(depth));
  p.b = matrix(dtype, flush && !slope, static_cast<std::ptrdiff_t>(positions), 1);
  p.point = matrix(dtype, flush, 0, 0);
  p.point.layout = Layout::kPatches;
  p.point.patches = &patches;
  p.out_row_stride = static_cast<std::ptrdiff_t>(p.cols);
  p.out_col_stride = 1;
  p.out_dtype = sizeof(T) == 4 ? FASTOPS_F32 : FASTOPS_F64;
  Plan plan = make_plan(p);
  // Each worker packs for itself, as for a small matrix.
  if (!plan.small) {
    plan.small = true;
    if (!plan.fresh) {
      const std::size_t own = kOwnElements / (plan.pass_depth * static_cast<std::size_t>(p.steps)) / plan.cols;
      plan.panels = min_of(plan.panels, max_of(1, own));
      plan.pass_cols = plan.panels * plan.cols;
    }
    plan.block_cols = plan.pass_cols;
  }
  const unsigned workers = worker_count();
  Buffers<T> buffers;
  Workspace parts, sums;
  if (!buffers.reserve(plan, workers) || !parts.reserve({workers, p.rows, block, sizeof(T)}) ||
      !sums.reserve({workers, channels, plane, sizeof(T)}))
    return FASTOPS_NO_MEMORY;
  const MatmulKernels<T>& kernels = matmul_kernels<T>();
  const auto body = [&](std::size_t i, unsigned worker) noexcept {
    const std::size_t image = i / ranges, channel = i % ranges * channels, group = image % s.groups;
    const std::size_t count = min_of(channels, patches.channels - channel);
    T* const sum = sums.get<T>() + worker * channels * plane;
    T* const part = parts.get<T>() + worker * p.rows * block;
    std::memset(static_cast<void*>(sum), 0, count * plane * sizeof(T));
    Product<T> one = p;
    one.rows = count * kernel;
    one.out = part;
    one.a.data = element_at(w, dtype, group * filters * depth + channel * kernel);
    one.point.data = element_at(x, dtype, (image * patches.channels + channel) * plane);
    for (std::size_t first = 0; first < positions && filters != 0; first += block) {
      one.cols = min_of(block, positions - first);
      one.out_row_stride = static_cast<std::ptrdiff_t>(one.cols);
      one.b.data = element_at(dy, dtype, image * filters * positions + first);
      one.point.first_col = first;
      multiply_one(plan, one, buffers, worker, [&](std::size_t blocks, double, auto&& work) noexcept {
        for (std::size_t b = 0; b < blocks; ++b) work(b, worker);
        return FASTOPS_OK;
      });
      add_patches(patches, count, first, one.cols, part, sum);
    }
    Product<T> result{};
    result.out = element_at(dx, dtype, (image * patches.channels + channel) * plane);
    result.out_dtype = dtype;
    result.out_row_stride = static_cast<std::ptrdiff_t>(plane);
    result.out_col_stride = 1;
    kernels.finish(result, {0, count, 0, plane, 0, 0}, sum, static_cast<std::ptrdiff_t>(plane));
  };
  const double work = static_cast<double>(images) * static_cast<double>(positions) * static_cast<double>(depth) *
                      (static_cast<double>(filters) * p.steps * kNanosecondsPerProduct + 1);
  return parallel_run(images * ranges, body, work, poll, workers);
}

// Tables.

const LutKernels& lut_kernels() noexcept {
  static const LutKernels* const kTable[] = {
#define FASTOPS_ENTRY(level) &level::kLutKernels,
      FASTOPS_FOR_EACH_LEVEL(FASTOPS_ENTRY)
#undef FASTOPS_ENTRY
  };
  return *kTable[active_level()];
}

// Sums straight from the table: for products too small to rearrange it.
template <class Entry, class Out> void lut_plain(const LutProduct& p, const Entry* table) noexcept {
  for (std::size_t i = 0; i < p.rows; ++i) {
    Out* out = static_cast<Out*>(p.out) + static_cast<std::ptrdiff_t>(i) * p.out_row_stride;
    for (std::size_t j = 0; j < p.cols; ++j) {
      const std::uint8_t* a = p.a + static_cast<std::ptrdiff_t>(i) * p.a_row_stride;
      const std::uint8_t* b = p.b + static_cast<std::ptrdiff_t>(j) * p.b_col_stride;
      std::uint64_t sum = 0;
      for (std::size_t k = 0; k < p.depth; ++k, a += p.a_col_stride, b += p.b_row_stride)
        sum += static_cast<std::uint64_t>(static_cast<std::int64_t>(table[*a * 256 + *b]));
      out[static_cast<std::ptrdiff_t>(j) * p.out_col_stride] = static_cast<Out>(sum);
    }
  }
}

template <class Entry> struct Range {
  Entry low, high;
};
template <class Entry> Range<Entry> range_of(const Entry* table) noexcept {
  Range<Entry> r{table[0], table[0]};
  for (std::size_t i = 1; i < 65536; ++i) {
    r.low = table[i] < r.low ? table[i] : r.low;
    r.high = table[i] > r.high ? table[i] : r.high;
  }
  return r;
}

template <class To, class From> void copy_table(const From* from, bool transposed, std::int64_t bias, To* to) noexcept {
  for (std::size_t i = 0; i < 256; ++i)
    for (std::size_t j = 0; j < 256; ++j)
      to[i * 256 + j] = static_cast<To>(from[transposed ? j * 256 + i : i * 256 + j] - bias);
}

template <class Entry>
fastops_status lut_matmul(std::size_t batch, const std::uint8_t* const* a, const fastops_matrix& sa,
                          const std::uint8_t* const* b, const fastops_matrix& sb, const Entry* table, void* const* out,
                          const fastops_matrix& so, bool wide_out, fastops_poll poll) noexcept {
  LutProduct p{};
  p.rows = sa.rows;
  p.cols = sb.cols;
  p.depth = sa.cols;
  p.a_row_stride = sa.row_stride;
  p.a_col_stride = sa.col_stride;
  p.b_row_stride = sb.row_stride;
  p.b_col_stride = sb.col_stride;
  p.out_row_stride = so.row_stride;
  p.out_col_stride = so.col_stride;
  p.wide_out = wide_out;
  if (batch == 0 || p.rows == 0 || p.cols == 0) return FASTOPS_OK;
  const double products = static_cast<double>(p.rows) * static_cast<double>(p.cols) * static_cast<double>(p.depth);
  // Rearranging the table costs 256 entries for each row and k, so the other side must be long.
  if (max_of(p.rows, p.cols) < 32 || products * static_cast<double>(batch) < 1e5) {
    const std::size_t group =
        products >= 1e5
            ? 1
            : min_of(batch, static_cast<std::size_t>(1e5 / max_of(1, static_cast<std::size_t>(products))) + 1);
    return parallel_run(
        ceil_div(batch, group),
        [&](std::size_t g, unsigned) noexcept {
          LutProduct one = p;
          for (std::size_t i = g * group; i < min_of(batch, (g + 1) * group); ++i) {
            one.a = a[i];
            one.b = b[i];
            one.out = out[i];
            if (wide_out)
              lut_plain<Entry, std::int64_t>(one, table);
            else
              lut_plain<Entry, std::int32_t>(one, table);
          }
        },
        products * static_cast<double>(batch), poll);
  }
  const bool swapped = p.rows > p.cols;
  if (swapped) {
    p.rows = sb.cols;
    p.cols = sa.rows;
    p.a_row_stride = sb.col_stride;
    p.a_col_stride = sb.row_stride;
    p.b_row_stride = sa.col_stride;
    p.b_col_stride = sa.row_stride;
    p.out_row_stride = so.col_stride;
    p.out_col_stride = so.row_stride;
  }
  const LutKernels& kernels = lut_kernels();
  const Range<Entry> range = range_of(table);
  std::uint64_t spread = 0, largest = 0;
  spread = static_cast<std::uint64_t>(range.high) - static_cast<std::uint64_t>(range.low);
  largest = range.high < 0 ? 0 : static_cast<std::uint64_t>(range.high);
  if (range.low < 0) largest = max_of(largest, 0 - static_cast<std::uint64_t>(range.low));
  if (spread <= 65535) {
    p.width = 2;
    p.bias = range.low + 32768;
    p.chunk = 65532;
  } else if (largest <= (std::uint64_t{1} << 31) / 64) {
    p.width = 4;
    p.chunk = ((std::uint64_t{1} << 31) - 1) / largest / 4 * 4;
  } else if (!wide_out) {
    p.width = 4;  // the caller has ruled overflow out
    p.chunk = static_cast<std::size_t>(-1) / 2;
  } else {
    p.width = 8;
    p.chunk = static_cast<std::size_t>(-1) / 2;
  }
  const std::size_t down_size = kernels.rows[p.width == 2 ? 0 : p.width == 4 ? 1 : 2];
  const std::size_t down = ceil_div(p.rows, down_size);
  std::size_t across_size = min_of(p.cols, kernels.cols);
  std::size_t blocks = 0;
  while (across_size > kLutCols && checked_product({batch, down, ceil_div(p.cols, across_size)}, &blocks) &&
         blocks < kBlocksWanted)
    across_size = ceil_div(across_size, 2);
  across_size = ceil_div(p.cols, ceil_div(p.cols, across_size));
  const std::size_t across = ceil_div(p.cols, across_size);
  if (!checked_product({batch, down, across}, &blocks)) return FASTOPS_INVALID;
  const unsigned workers = worker_count();
  Workspace own_table, scratch;
  if (!own_table.reserve({65536, static_cast<std::size_t>(p.width)}) || !scratch.reserve({workers, kernels.scratch}))
    return FASTOPS_NO_MEMORY;
  if (p.width == 2)
    copy_table(table, swapped, p.bias, own_table.get<std::int16_t>());
  else if (p.width == 4)
    copy_table(table, swapped, 0, own_table.get<std::int32_t>());
  else
    copy_table(table, swapped, 0, own_table.get<std::int64_t>());
  p.table = own_table.get<void>();
  return parallel_run(
      blocks,
      [&](std::size_t block, unsigned worker) noexcept {
        LutProduct one = p;
        const std::size_t matrix = block / (down * across), row = block / across % down * down_size;
        const std::size_t col = block % across * across_size;
        one.a = (swapped ? b : a)[matrix];
        one.b = (swapped ? a : b)[matrix];
        one.out = out[matrix];
        kernels.multiply(one, row, min_of(p.rows, row + down_size), col, min_of(p.cols, col + across_size),
                         scratch.get<unsigned char>() + worker * kernels.scratch);
      },
      products * static_cast<double>(batch) * 0.1, poll, workers);
}

}  // namespace
}  // namespace fastops

using namespace fastops;

namespace {

// f(T{}), T what the dtype is computed in.
template <class F> fastops_status compute(fastops_dtype dtype, F&& f) noexcept {
  return dtype == FASTOPS_F64 ? f(double{}) : f(float{});
}

// Of the three only the result must be that large in memory: operands may have strides of 0.
bool multiply_to(const fastops_matrix& a, const fastops_matrix& b, const fastops_matrix& out) noexcept {
  std::size_t size = 0;
  return a.cols == b.rows && out.rows == a.rows && out.cols == b.cols &&
         checked_product({out.rows, out.cols, 8}, &size);
}
bool is_gradient(fastops_gradient mode) noexcept { return static_cast<unsigned>(mode) <= FASTOPS_GRADIENT_MIMIC; }
bool same_size(const fastops_matrix& a, const fastops_matrix& b) noexcept {
  return a.rows == b.rows && a.cols == b.cols;
}

}  // namespace

fastops_status fastops_mitchell_matmul(const fastops_mitchell* m, fastops_dtype dtype, size_t batch,
                                       const void* const* a, fastops_matrix shape_a, const void* const* b,
                                       fastops_matrix shape_b, void* const* out, fastops_matrix shape_out,
                                       fastops_poll poll) noexcept {
  if (!is_float(dtype) || !multiply_to(shape_a, shape_b, shape_out)) return FASTOPS_INVALID;
  const Pointers pointers{a, b, nullptr, out};
  return compute(
      dtype, [&](auto t) { return matmul<decltype(t)>(m, dtype, batch, pointers, shape_a, shape_b, shape_out, poll); });
}

fastops_status fastops_mitchell_matmul_flat(const fastops_mitchell* m, fastops_dtype dtype, size_t batch,
                                            const void* const* a, const fastops_matrix* shape_a, const void* const* b,
                                            const fastops_matrix* shape_b, void* const* out,
                                            const fastops_matrix* shape_out) noexcept {
  if (shape_a == nullptr || shape_b == nullptr || shape_out == nullptr) return FASTOPS_INVALID;
  return fastops_mitchell_matmul(m, dtype, batch, a, *shape_a, b, *shape_b, out, *shape_out, {nullptr, nullptr});
}

fastops_status fastops_mitchell_matmul_grad_a(const fastops_mitchell* m, fastops_gradient mode, fastops_dtype dtype,
                                              size_t batch, const void* const* a, fastops_matrix shape_a,
                                              const void* const* b, fastops_matrix shape_b, const void* const* dy,
                                              fastops_matrix shape_dy, void* const* da, fastops_matrix shape_da,
                                              fastops_poll poll) noexcept {
  if (!is_gradient(mode) || !is_float(dtype) || !multiply_to(shape_a, shape_b, shape_dy) ||
      !same_size(shape_a, shape_da))
    return FASTOPS_INVALID;
  const Pointers pointers{dy, b, a, da};
  const fastops_matrix right = transpose(shape_b);
  return compute(dtype, [&](auto t) {
    return matmul_grad<decltype(t)>(m, mode, dtype, false, batch, pointers, shape_dy, right, shape_a, shape_da, poll);
  });
}

fastops_status fastops_mitchell_matmul_grad_b(const fastops_mitchell* m, fastops_gradient mode, fastops_dtype dtype,
                                              size_t batch, const void* const* a, fastops_matrix shape_a,
                                              const void* const* b, fastops_matrix shape_b, const void* const* dy,
                                              fastops_matrix shape_dy, void* const* db, fastops_matrix shape_db,
                                              fastops_poll poll) noexcept {
  if (!is_gradient(mode) || !is_float(dtype) || !multiply_to(shape_a, shape_b, shape_dy) ||
      !same_size(shape_b, shape_db))
    return FASTOPS_INVALID;
  // "mimic" multiplies a's elements by dy's, in this order.
  const Pointers pointers{a, dy, b, db};
  const fastops_matrix left = transpose(shape_a);
  return compute(dtype, [&](auto t) {
    return matmul_grad<decltype(t)>(m, mode, dtype, true, batch, pointers, left, shape_dy, shape_b, shape_db, poll);
  });
}

fastops_status fastops_mitchell_conv2d(const fastops_mitchell* m, fastops_dtype dtype, const fastops_conv2d* shape,
                                       const void* x, const void* w, void* out, fastops_poll poll) noexcept {
  if (shape == nullptr || !is_float(dtype) || !conv_fits(*shape)) return FASTOPS_INVALID;
  return compute(dtype, [&](auto t) { return conv2d<decltype(t)>(m, dtype, *shape, x, w, out, poll); });
}

fastops_status fastops_mitchell_conv2d_grad(const fastops_mitchell* m, fastops_gradient mode, fastops_dtype dtype,
                                            const fastops_conv2d* shape, const void* x, const void* w, const void* dy,
                                            void* dx, void* dw, fastops_poll poll) noexcept {
  if (shape == nullptr || !is_gradient(mode) || !is_float(dtype) || !conv_fits(*shape)) return FASTOPS_INVALID;
  return compute(dtype, [&](auto t) {
    using T = decltype(t);
    fastops_status status = FASTOPS_OK;
    if (dx != nullptr) status = conv2d_grad_x<T>(m, mode, dtype, *shape, x, w, dy, dx, poll);
    if (status == FASTOPS_OK && dw != nullptr) status = conv2d_grad_w<T>(m, mode, dtype, *shape, x, w, dy, dw, poll);
    return status;
  });
}

fastops_status fastops_lut_matmul(size_t batch, const uint8_t* const* a, fastops_matrix shape_a,
                                  const uint8_t* const* b, fastops_matrix shape_b, const void* table, int wide_table,
                                  void* const* out, fastops_matrix shape_out, int wide_out,
                                  fastops_poll poll) noexcept {
  if (!multiply_to(shape_a, shape_b, shape_out)) return FASTOPS_INVALID;
  return wide_table ? lut_matmul(batch, a, shape_a, b, shape_b, static_cast<const std::int64_t*>(table), out, shape_out,
                                 wide_out != 0, poll)
                    : lut_matmul(batch, a, shape_a, b, shape_b, static_cast<const std::int32_t*>(table), out, shape_out,
                                 wide_out != 0, poll);
}
