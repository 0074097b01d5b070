// SPDX-License-Identifier: BSD-3-Clause
// Serial stand-in of the pool.
#include "core/parallel.h"

namespace fastops {
fastops_status parallel_run(std::size_t blocks, Body body, void* context, double, fastops_poll) noexcept {
  for (std::size_t i = 0; i < blocks; ++i) body(context, i, 0);
  return FASTOPS_OK;
}
unsigned worker_count() noexcept { return 1; }
}  // namespace fastops

unsigned fastops_get_num_threads(void) noexcept { return 1; }
fastops_status fastops_set_num_threads(unsigned count) noexcept { return count ? FASTOPS_OK : FASTOPS_INVALID; }
unsigned fastops_default_num_threads(void) noexcept { return 1; }
