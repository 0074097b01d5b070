# SPDX-License-Identifier: BSD-3-Clause
# cython: boundscheck=False
"""A Cython module over fastops: loops without Python, on float and double."""

from cython cimport floating

cimport fastops.cyfastops as cf


def dot(floating[::1] a, floating[::1] b):
    """The sum of the approximate products."""
    cdef floating total = 0
    cdef Py_ssize_t i
    with nogil:
        for i in range(a.shape[0]):
            total += cf.mitchell_mul(a[i], b[i])
    return total


def unary(double x):
    """Every function of one element."""
    return (
        cf.mitchell_square(x), cf.mitchell_reciprocal(x), cf.mitchell_sqrt(x), cf.mitchell_rsqrt(x), cf.mitchell_log2(x),
        cf.mitchell_exp2(x), cf.mitchell_div(x, 3.0), cf.lmul(x, 3.0),
    )


def multiply(floating[::1] a, floating[::1] b, floating[::1] out):
    """out = a b, by the kernels for arrays."""
    return cf.mitchell_mul_array(&a[0], &b[0], &out[0], a.shape[0])


def matmul(floating[:, ::1] a, floating[:, ::1] b, floating[:, ::1] out):
    """out = a @ b."""
    return cf.mitchell_matmul(&a[0, 0], &b[0, 0], &out[0, 0], a.shape[0], a.shape[1], b.shape[1])


def attention(floating[:, :, :, ::1] q, floating[:, :, :, ::1] k, floating[:, :, :, ::1] v, floating[:, :, :, ::1] out):
    """Causal linear attention."""
    return cf.linear_attention(
        &q[0, 0, 0, 0], &k[0, 0, 0, 0], &v[0, 0, 0, 0], &out[0, 0, 0, 0], q.shape[0], q.shape[1], q.shape[2], k.shape[2],
        q.shape[3], v.shape[3], True
    )


def average(floating[::1] shadow, floating[::1] param, double decay):
    """shadow += (1 - decay) (param - shadow)."""
    return cf.ema_update(&shadow[0], &param[0], shadow.shape[0], decay)


def get_target():
    """The level that is in force."""
    return cf.get_target().decode()


def set_target(str name):
    """A fastops_status."""
    return cf.set_target(name.encode())


def get_num_threads():
    """Threads of the pool."""
    return cf.get_num_threads()


def set_num_threads(unsigned count):
    """A fastops_status."""
    return cf.set_num_threads(count)


def repeat(double x, Py_ssize_t n):
    """For a measurement: n products, each with the result of the one before."""
    cdef double total = 0
    cdef Py_ssize_t i
    with nogil:
        for i in range(n):
            total = cf.mitchell_mul(x, total + 1.0) * 1e-3
    return total
