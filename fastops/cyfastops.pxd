# SPDX-License-Identifier: BSD-3-Clause
# What other Cython modules cimport; `floating` is float or double. No header, no library and no compiler flag is needed to
# use it. The functions that return int return a fastops_status, 0 where all is well; arrays are in C order.

from cython cimport floating

# One element: the bits of the ufunc of that name.
cdef floating mitchell_mul(floating a, floating b) noexcept nogil
cdef floating mitchell_div(floating a, floating b) noexcept nogil
cdef floating mitchell_square(floating a) noexcept nogil
cdef floating mitchell_reciprocal(floating a) noexcept nogil
cdef floating mitchell_sqrt(floating a) noexcept nogil
cdef floating mitchell_rsqrt(floating a) noexcept nogil
cdef floating mitchell_log2(floating a) noexcept nogil
cdef floating mitchell_exp2(floating a) noexcept nogil
cdef floating lmul(floating a, floating b) noexcept nogil

# out[i] = a[i] b[i], and a[i] / b[i]; `out` may be an operand.
cdef int mitchell_mul_array(const floating* a, const floating* b, floating* out, size_t n) noexcept nogil
cdef int mitchell_div_array(const floating* a, const floating* b, floating* out, size_t n) noexcept nogil

# out (m, n) = a (m, k) b (k, n).
cdef int mitchell_matmul(
    const floating* a, const floating* b, floating* out, size_t m, size_t k, size_t n
) noexcept nogil

# out (batch, heads, queries, values) from q (batch, heads, queries, dim), k (batch, heads, keys, dim) and v (batch, heads,
# keys, values), with the feature map elu(x) + 1.
cdef int linear_attention(
    const floating* q, const floating* k, const floating* v, floating* out, size_t batch, size_t heads, size_t queries,
    size_t keys, size_t dim, size_t values, bint causal
) noexcept nogil

# shadow += (1 - decay) (param - shadow).
cdef int ema_update(floating* shadow, const floating* param, size_t n, double decay) noexcept nogil

# One state for the whole process: Python, C and Cython see the same.
cdef const char* get_target() noexcept nogil
cdef int set_target(const char* name) noexcept nogil
cdef unsigned get_num_threads() noexcept nogil
cdef int set_num_threads(unsigned count) noexcept nogil
