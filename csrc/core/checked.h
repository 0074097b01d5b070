// SPDX-License-Identifier: BSD-3-Clause
// Size arithmetic that cannot wrap, and aligned memory that answers null in place of throwing.
#ifndef FASTOPS_CORE_CHECKED_H
#define FASTOPS_CORE_CHECKED_H

#include <cstddef>
#include <cstdlib>
#include <initializer_list>

namespace fastops {

// The product of the factors in `result`; false where it exceeds half the address space.
inline bool checked_product(std::initializer_list<std::size_t> factors, std::size_t* result) noexcept {
  std::size_t product = 1;
  bool fits = true;
  for (const std::size_t factor : factors) {
    if (factor == 0) {
      *result = 0;
      return true;
    }
    fits = !__builtin_mul_overflow(product, factor, &product) && fits;
  }
  *result = product;
  return fits && product <= static_cast<std::size_t>(-1) / 2;
}

// Memory on a 64-byte boundary (a cache line, a v4 vector) that ends with the object.
class Workspace {
 public:
  Workspace() noexcept = default;
  ~Workspace() { std::free(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Reserves the product of the factors in bytes; false, with nothing reserved, where there is no memory.
  bool reserve(std::initializer_list<std::size_t> factors) noexcept {
    std::size_t bytes = 0;
    std::free(memory_);
    memory_ = nullptr;
    if (!checked_product(factors, &bytes)) return false;
    memory_ = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
    return memory_ != nullptr;
  }
  template <class T> T* get() const noexcept { return static_cast<T*>(memory_); }

 private:
  void* memory_ = nullptr;
};

}  // namespace fastops
#endif
