// SPDX-License-Identifier: BSD-3-Clause
// What all handlers for XLA share: its buffers as the C interface takes them, samples of vmap, statuses as errors.
#ifndef FASTOPS_JAX_CALL_H
#define FASTOPS_JAX_CALL_H

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fastops/fastops.h"
#include "xla/ffi/api/ffi.h"

namespace fastops {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using Result = ffi::Result<AnyBuffer>;
using Dimensions = AnyBuffer::Dimensions;

// No poll: XLA's threads do not hear Ctrl-C.
constexpr fastops_poll kNoPoll{nullptr, nullptr};

inline ffi::Error invalid(std::string text) { return ffi::Error::InvalidArgument(std::move(text)); }

inline ffi::Error error_of(fastops_status status) {
  if (status == FASTOPS_OK) return ffi::Error::Success();
  if (status == FASTOPS_NO_MEMORY) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "fastops: out of memory");
  return invalid("fastops: arguments do not fit each other");
}

// A handler's function that no exception leaves: not every XLA catches them, and none takes one for a lack of memory.
template <auto kFunction> struct Guarded;
template <class... Args, ffi::Error (*kFunction)(Args...)> struct Guarded<kFunction> {
  static ffi::Error call(Args... args) {
    try {
      return kFunction(std::move(args)...);
    } catch (const std::bad_alloc&) {
      return error_of(FASTOPS_NO_MEMORY);
    } catch (const std::length_error&) {  // a std::vector that no memory could hold
      return error_of(FASTOPS_NO_MEMORY);
    } catch (const std::exception& error) {
      return ffi::Error(ffi::ErrorCode::kInternal, std::string("fastops: ") + error.what());
    }
  }
};
template <auto kFunction> inline constexpr auto guarded = &Guarded<kFunction>::call;

// The binding of a handler, of its function's own parameters: buffers, results, what is left of these, and attributes
// as one struct.
template <class T, class Binding> auto bind_one(Binding&& binding) {
  if constexpr (std::is_same_v<T, AnyBuffer>)
    return std::move(binding).template Arg<AnyBuffer>();
  else if constexpr (std::is_same_v<T, Result>)
    return std::move(binding).template Ret<AnyBuffer>();
  else if constexpr (std::is_same_v<T, ffi::RemainingRets>)
    return std::move(binding).RemainingRets();
  else
    return std::move(binding).template Attrs<T>();
}
template <class T, class... Rest, class Binding> auto bind_all(Binding&& binding) {
  if constexpr (sizeof...(Rest) == 0)
    return bind_one<T>(std::move(binding));
  else
    return bind_all<Rest...>(bind_one<T>(std::move(binding)));
}
template <class... Args> auto binding_of(ffi::Error (*)(Args...)) { return bind_all<Args...>(ffi::Ffi::Bind()); }

// -1 for a type that no kernel has.
inline int dtype_of(const AnyBuffer& x) {
  switch (x.element_type()) {
    case ffi::DataType::F16:
      return FASTOPS_F16;
    case ffi::DataType::BF16:
      return FASTOPS_BF16;
    case ffi::DataType::F32:
      return FASTOPS_F32;
    case ffi::DataType::F64:
      return FASTOPS_F64;
    default:
      return -1;
  }
}
inline std::size_t item_size(int dtype) { return dtype == FASTOPS_F64 ? 8 : dtype == FASTOPS_F32 ? 4 : 2; }
inline int compute_dtype(int dtype) { return dtype == FASTOPS_F64 ? FASTOPS_F64 : FASTOPS_F32; }

inline std::size_t rank_of(const AnyBuffer& x) { return x.dimensions().size(); }
inline std::size_t length(const AnyBuffer& x, std::size_t axis) {
  return static_cast<std::size_t>(x.dimensions()[axis]);
}

// XLA maps memory of this size anew for every call, which costs a fault a page: asks for large pages, as NumPy does for
// its arrays. Without it 10^7 products took four times as long.
inline void want_large_pages(const AnyBuffer& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kFrom = std::uintptr_t{4} << 20, kPage = 4096;
  const std::size_t size = x.size_bytes();
  if (size < kFrom) return;
  const auto address = reinterpret_cast<std::uintptr_t>(x.untyped_data());
  const std::uintptr_t first = (address + kPage - 1) / kPage * kPage, last = (address + size) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(x);
#endif
}

// The product of the axes from `first` on.
inline std::size_t count_from(const Dimensions& dims, std::size_t first) {
  std::size_t n = 1;
  for (std::size_t i = first; i < dims.size(); ++i) n *= static_cast<std::size_t>(dims[i]);
  return n;
}

// Where the parts of a buffer begin, in elements, for every place of the first axes of a result, along which the buffer
// is as long or of length 1; empty where it is neither.
inline std::vector<std::size_t> parts_of(const Dimensions& x, const Dimensions& result, std::size_t axes) {
  std::vector<std::size_t> starts;
  if (x.size() < axes || result.size() < axes) return starts;
  std::vector<std::size_t> strides(axes, 0);
  std::size_t step = count_from(x, axes), total = 1;
  for (std::size_t i = axes; i-- > 0;) {
    if (x[i] == result[i])
      strides[i] = step;
    else if (x[i] != 1)
      return starts;
    step *= static_cast<std::size_t>(x[i]);
    total *= static_cast<std::size_t>(result[i]);
  }
  starts.reserve(total);
  std::vector<std::int64_t> at(axes, 0);
  std::size_t offset = 0;
  for (std::size_t n = 0; n < total; ++n) {
    starts.push_back(offset);
    for (std::size_t i = axes; i-- > 0;) {
      offset += strides[i];
      if (++at[i] < result[i]) break;
      offset -= strides[i] * static_cast<std::size_t>(result[i]);
      at[i] = 0;
    }
  }
  return starts;
}

}  // namespace fastops
#endif
