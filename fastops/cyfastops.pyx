# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, freethreading_compatible=True, binding=False
"""C functions for other Cython modules (`cimport fastops.cyfastops`); there is nothing here for Python."""

from cython cimport floating
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from libc.string cimport memset


cdef extern from "fastops/fastops.h" nogil:
    enum:
        FASTOPS_OK
        FASTOPS_NO_MEMORY
    ctypedef enum fastops_dtype:
        FASTOPS_F32
        FASTOPS_F64
    ctypedef enum fastops_mitchell_op:
        FASTOPS_MUL
        FASTOPS_DIV
    ctypedef int fastops_status
    ctypedef struct fastops_poll:
        int (*function)(void*)
        void* context
    ctypedef struct fastops_mitchell:
        pass
    ctypedef struct fastops_mitchell_params:
        int32_t form
    ctypedef struct fastops_matrix:
        size_t rows, cols
        ptrdiff_t row_stride, col_stride
    ctypedef struct fastops_layout:
        pass
    ctypedef struct fastops_tensor_list:
        size_t count, roles
        const size_t* size
        void** data
        const uint8_t* dtype
        const fastops_layout** layout
    ctypedef struct fastops_linear_attention:
        int32_t feature_map, causal, normalize, dtype
        size_t batch, heads_q, heads_kv, queries, keys, dim, features, values
        double eps, kernel_eps, scale
        const void* projection
    ctypedef struct fastops_heads:
        const void* data
        ptrdiff_t batch, head, row
    ctypedef struct fastops_linear_options:
        size_t sequences
    fastops_status fastops_mitchell_create(const fastops_mitchell_params*, fastops_mitchell**)
    fastops_status fastops_mitchell_apply(
        const fastops_mitchell*, fastops_mitchell_op, fastops_dtype, const void*, ptrdiff_t, const void*, ptrdiff_t, void*,
        ptrdiff_t, size_t)
    fastops_status fastops_mitchell_matmul_flat(
        const fastops_mitchell*, fastops_dtype, size_t, const void**, const fastops_matrix*, const void**,
        const fastops_matrix*, void**, const fastops_matrix*)
    fastops_status fastops_linear_attention_forward(
        const fastops_linear_attention*, fastops_heads, fastops_heads, fastops_heads, fastops_heads,
        const fastops_linear_options*, fastops_poll)
    fastops_status fastops_ema_update(const fastops_tensor_list*, const double*, int, const uint64_t*)
    float fastops_mitchell_mul_f32(float, float)
    double fastops_mitchell_mul_f64(double, double)
    float fastops_mitchell_div_f32(float, float)
    double fastops_mitchell_div_f64(double, double)
    float fastops_mitchell_square_f32(float)
    double fastops_mitchell_square_f64(double)
    float fastops_mitchell_reciprocal_f32(float)
    double fastops_mitchell_reciprocal_f64(double)
    float fastops_mitchell_sqrt_f32(float)
    double fastops_mitchell_sqrt_f64(double)
    float fastops_mitchell_rsqrt_f32(float)
    double fastops_mitchell_rsqrt_f64(double)
    float fastops_mitchell_log2_f32(float)
    double fastops_mitchell_log2_f64(double)
    float fastops_mitchell_exp2_f32(float)
    double fastops_mitchell_exp2_f64(double)
    float fastops_lmul_f32(float, float)
    double fastops_lmul_f64(double, double)
    const char* fastops_get_target()
    fastops_status fastops_set_target(const char*)
    unsigned fastops_get_num_threads()
    fastops_status fastops_set_num_threads(unsigned)


cdef fastops_mitchell* _plain = NULL
cdef fastops_mitchell_params _params
memset(&_params, 0, sizeof(_params))
if fastops_mitchell_create(&_params, &_plain) != FASTOPS_OK:
    raise MemoryError


cdef floating mitchell_mul(floating a, floating b) noexcept nogil:
    return fastops_mitchell_mul_f32(a, b) if floating is float else fastops_mitchell_mul_f64(a, b)


cdef floating mitchell_div(floating a, floating b) noexcept nogil:
    return fastops_mitchell_div_f32(a, b) if floating is float else fastops_mitchell_div_f64(a, b)


cdef floating mitchell_square(floating a) noexcept nogil:
    return fastops_mitchell_square_f32(a) if floating is float else fastops_mitchell_square_f64(a)


cdef floating mitchell_reciprocal(floating a) noexcept nogil:
    return fastops_mitchell_reciprocal_f32(a) if floating is float else fastops_mitchell_reciprocal_f64(a)


cdef floating mitchell_sqrt(floating a) noexcept nogil:
    return fastops_mitchell_sqrt_f32(a) if floating is float else fastops_mitchell_sqrt_f64(a)


cdef floating mitchell_rsqrt(floating a) noexcept nogil:
    return fastops_mitchell_rsqrt_f32(a) if floating is float else fastops_mitchell_rsqrt_f64(a)


cdef floating mitchell_log2(floating a) noexcept nogil:
    return fastops_mitchell_log2_f32(a) if floating is float else fastops_mitchell_log2_f64(a)


cdef floating mitchell_exp2(floating a) noexcept nogil:
    return fastops_mitchell_exp2_f32(a) if floating is float else fastops_mitchell_exp2_f64(a)


cdef floating lmul(floating a, floating b) noexcept nogil:
    return fastops_lmul_f32(a, b) if floating is float else fastops_lmul_f64(a, b)


cdef inline fastops_dtype _dtype(const floating* like) noexcept nogil:
    return FASTOPS_F32 if floating is float else FASTOPS_F64


cdef int mitchell_mul_array(const floating* a, const floating* b, floating* out, size_t n) noexcept nogil:
    return fastops_mitchell_apply(
        _plain, FASTOPS_MUL, _dtype(a), a, sizeof(floating), b, sizeof(floating), out, sizeof(floating), n)


cdef int mitchell_div_array(const floating* a, const floating* b, floating* out, size_t n) noexcept nogil:
    return fastops_mitchell_apply(
        _plain, FASTOPS_DIV, _dtype(a), a, sizeof(floating), b, sizeof(floating), out, sizeof(floating), n)


cdef inline fastops_matrix _matrix(size_t rows, size_t cols) noexcept nogil:
    cdef fastops_matrix shape
    shape.rows = rows
    shape.cols = cols
    shape.row_stride = <ptrdiff_t>cols
    shape.col_stride = 1
    return shape


cdef int mitchell_matmul(
    const floating* a, const floating* b, floating* out, size_t m, size_t k, size_t n
) noexcept nogil:
    cdef fastops_matrix shape_a = _matrix(m, k), shape_b = _matrix(k, n), shape_out = _matrix(m, n)
    cdef const void* left = a
    cdef const void* right = b
    cdef void* to = out
    return fastops_mitchell_matmul_flat(
        _plain, _dtype(a), 1, &left, &shape_a, &right, &shape_b, &to, &shape_out)


cdef inline fastops_heads _heads(const void* data, size_t heads, size_t rows, size_t width) noexcept nogil:
    cdef fastops_heads result
    result.data = data
    result.batch = <ptrdiff_t>(heads * rows * width)
    result.head = <ptrdiff_t>(rows * width)
    result.row = <ptrdiff_t>width
    return result


cdef int linear_attention(
    const floating* q, const floating* k, const floating* v, floating* out, size_t batch, size_t heads, size_t queries,
    size_t keys, size_t dim, size_t values, bint causal
) noexcept nogil:
    cdef fastops_linear_attention shape
    cdef fastops_linear_options options
    cdef fastops_poll poll
    memset(&shape, 0, sizeof(shape))
    memset(&options, 0, sizeof(options))
    memset(&poll, 0, sizeof(poll))
    shape.causal = causal
    shape.normalize = 1
    shape.dtype = _dtype(q)
    shape.batch = batch
    shape.heads_q = shape.heads_kv = heads
    shape.queries = queries
    shape.keys = keys
    shape.dim = shape.features = dim
    shape.values = values
    shape.scale = 1.0
    return fastops_linear_attention_forward(
        &shape, _heads(q, heads, queries, dim), _heads(k, heads, keys, dim), _heads(v, heads, keys, values),
        _heads(out, heads, queries, values), &options, poll)


cdef int ema_update(floating* shadow, const floating* param, size_t n, double decay) noexcept nogil:
    cdef fastops_tensor_list tensors
    cdef void* data[2]
    cdef uint8_t dtype[2]
    cdef double weight = 1.0 - decay
    data[0] = <void*>param
    data[1] = shadow
    dtype[0] = dtype[1] = <uint8_t>_dtype(param)
    memset(&tensors, 0, sizeof(tensors))
    tensors.count = 1
    tensors.roles = 2
    tensors.size = &n
    tensors.data = data
    tensors.dtype = dtype
    return fastops_ema_update(&tensors, &weight, 0, NULL)


cdef const char* get_target() noexcept nogil:
    return fastops_get_target()


cdef int set_target(const char* name) noexcept nogil:
    return fastops_set_target(name)


cdef unsigned get_num_threads() noexcept nogil:
    return fastops_get_num_threads()


cdef int set_num_threads(unsigned count) noexcept nogil:
    return fastops_set_num_threads(count)
