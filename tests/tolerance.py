# SPDX-License-Identifier: BSD-3-Clause
"""The one place where a bound is written, each with its derivation. What is not here is compared bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Figures of the literature, printed to so many decimals: half a unit of the last one.


def printed(decimals: int) -> float:
    """Half a unit of the last printed decimal, and a hair for the figure's own way to binary."""
    return 0.5000001 * 10.0**-decimals


def unit(decimals: int) -> float:
    """One unit of the last printed decimal: for figures that were found on a grid of their own."""
    return 10.0**-decimals


# Enumerations over float16 mantissas are known to eight decimals of a per cent, which is 1e-9 and better as a fraction;
# sums of 2**20 terms in float64 add 2**20 * 2**-53 = 1e-10 at the very worst.
FIGURE = 1e-9

# The quotient of two float64 numbers that stand for the exact error: three roundings.
QUOTIENT = 4 * 2.0**-53

# A row of the benchmarks against the oracle. Its own check bounds it by 4 eps sqrt(terms); of few terms bfloat16's rounding, 2**-8
# of the result, is what shows. Rows of exact float32 products are right to 4 eps sqrt(8).
BENCH_ROW = 2e-2
BENCH_EXACT = 4 * 2.0**-23 * 8**0.5

# The following are in per cent. Extremes of the error sit on kinks, between grid points 2**-10 apart, where its slope
# is below 1; figures named "minimax" print one number for both ends, which differ by the constant's own rounding.
EXTREME = 0.03
# A mean over 2**5 or 2**10 strata in the middle of each, of a function with kinks of total slope 1: (2**-5)**2 / 4 at
# most, and the printed figure's own grid.
SAMPLED = 0.005
# Means over 2**10 mantissas from the lower ends of their intervals against an integral: half an interval times the
# slope, 2**-11 of some 20 per cent.
CONTINUUM = 0.02
# Results of 2**16 mantissas in float32: half a unit of it.
ENUMERATED = 1e-5

# Constants found on 2**18 or 2**16 mantissas against those printed from finer grids. The mean square is flat around its
# least value: a constant off by 3e-5 makes it worse by 1e-9. The extremes sit between grid points, 1/512 apart.
OFFSET = {"mse": 3e-5, "mean": 2e-6, "max": 3e-4}

_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
_TINY = {"float16": 2.0**-126, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}


# What the tensor cores keep of a float where they multiply TF32: 10 bits.
TF32 = 2.0**-10


def rounding(dtype: np.dtype[Any]) -> float:
    """Bound of a relative error beside the approximation's own: one rounding to the dtype, those of the measurement."""
    return _EPS[dtype.name]


def matmul(magnitude: NDArray[Any], terms: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Bound of |product - oracle|, element by element; `magnitude` is the oracle's sum of |products|, `terms` is K.

    A sum of K terms in any order is off by at most (K - 1) u sum |p| (Higham 2002, 4.4), u = eps / 2 of the
    accumulator; signs of roundings being as good as random, sqrt(K) in place of K is exceeded with negligible
    probability when multiplied by 8. The oracle in float64 has the same bound for float64. Rounding to the dtype adds
    half an eps of it, and each product that is flushed to zero adds the smallest normal number of the accumulator.
    """
    accumulator = "float64" if dtype == np.float64 else "float32"
    accumulated = 8.0 * np.sqrt(max(terms, 1)) * _EPS[accumulator] * magnitude
    rounded = 0.5 * _EPS[dtype.name] * (magnitude + accumulated)
    smallest = {"float16": 2.0**-24, "bfloat16": 2.0**-133}.get(dtype.name, 0.0)
    return np.asarray(accumulated + rounded + terms * _TINY[dtype.name] + smallest)


def gradient(magnitude: NDArray[Any], terms: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Bound of a gradient against the oracle's: a sum of `terms` products of dy with slopes.

    As `matmul`, with one more rounding a term, where dy times a slope that is no power of two is rounded before it is
    added.
    """
    return np.asarray(
        matmul(magnitude, terms, dtype) + _EPS["float64" if dtype == np.float64 else "float32"] * magnitude
    )


# A central difference of step h inside a linear piece: rounding of two float64 function values of size s over 2 h.
STEP = 2.0**-20


def finite_difference(size: float, terms: int) -> float:
    """Bound of the difference quotient of a sum of `terms` terms of total size `size`, step `STEP`, in float64."""
    return 4.0 * terms * 2.0**-52 * size / STEP


# Accuracy of the digits example: within 1.5 points of exact arithmetic; five seeds spread by 0.6.
ACCURACY_POINTS = 1.5

# Constants for 2**16 random mantissas: the mean error of a sample is 0.05 / 2**8 off.
OFFSET_SAMPLED = 1e-3


def average(updates: int, size: float, dtype: np.dtype[Any]) -> float:
    """Bound of |shadow - exact average| after `updates` updates with numbers of at most `size`.

    An update is right to 2 eps max(|s|, |p|) of the shadow's dtype where there is no FMA (two roundings of p - s, one of the
    sum), and later updates shrink what it added.
    """
    return 2.0 * _EPS[dtype.name] * size * max(updates, 1)


# An average in float64 that is divided by the sum of its weights: three roundings more than the average itself.
DEBIASED = 16 * 2.0**-52

# Solutions of 4 equations whose matrix has a condition number of some 1e3, printed to nine digits.
POSTHOC = 1e-8

# Averages of a random walk of 2**12 steps, made from 16 stored pairs: the fit of the profile is good to half a per cent.
POSTHOC_FIT = 5e-3


def stochastic_mean(decay: float, elements: int) -> float:
    """Bound of the mean error of bfloat16 shadows in [1/2, 1) that round stochastically, over many updates.

    One rounding has a standard deviation of at most half a unit, 2**-9; what an update adds decays, so the variances sum to
    1 / (1 - decay^2) of it; elements are independent. Six deviations.
    """
    return float(6.0 * 2.0**-9 / np.sqrt((1.0 - decay**2) * elements))


# Points of accuracy by which the average of the digits example beats the raw weights over the later half of 12 epochs; five seeds
# gave 1.1 to 2.7.
AVERAGE_GAIN = 0.5

# Moving averages and optimizer steps: u = eps / 2 is the error of one rounding, M the sum of the magnitudes of the terms.


def lerp(s: NDArray[Any], p: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Bound of |s + w (p - s) - oracle| in `dtype`: 2 eps max(|s|, |p|), what is promised without FMA.

    From the nearer end, with weight w <= 1/2: w, the difference (at most 2 M) and the product are rounded, 3 u 2 w M; the
    sum u M: 4 u M. A parameter wider than the shadow is rounded first (u |p|), and the oracle rounds its result (u M).
    """
    largest = np.maximum(np.abs(s), np.abs(p))
    rounded = 0.5 * largest + (0.5 * np.abs(p) if p.dtype.itemsize > dtype.itemsize else 0.0)
    return np.asarray(_EPS[dtype.name] * (2.0 * largest + rounded) + 2.0**-149)


# Roundings on the longest path to a result, each u of M: momentum with weight decay and nesterov has 12; AdamW has the moments'
# 6 and 5 (with l2 3 more, doubled by the square), the root's half and 3 of the denominator's, division, step size, sum: 22 at
# most; the adaptive gradient has 11. In eps, with what is left for products of errors and for the oracle's own rounding.
SGD = 8.0
ADAM = 14.0
ADAPTIVE = 8.0


def step(magnitude: NDArray[Any], roundings: float, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Bound of a step's result whose terms have this sum of magnitudes; subnormal products lose some units more."""
    return np.asarray(roundings * _EPS[dtype.name] * magnitude + 8.0 * _TINY[dtype.name] * _EPS[dtype.name])


def exponential(result: NDArray[Any], exponent: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Bound of p exp(x): x has two roundings, u |x| each; exp 1.3 units without FMA, the oracle's 1; two products 1 eps."""
    return np.asarray(_EPS[dtype.name] * (3.5 + np.abs(exponent)) * np.abs(result) + 2.0**-149)


# Mean of n stochastic roundings of one value: each is off by at most one unit of bfloat16, with standard deviation at most
# half a unit; 5 standard deviations of the mean.
def rounding_mean(unit: float, n: int) -> float:
    """Bound of the mean's error over n roundings to multiples of `unit`."""
    return 5.0 * 0.5 * unit / n**0.5


# Stochastic roundings in float32 and from the float64 oracle take different ways where the cut-off part equals the random
# number up to the float32 result's own error of some units: of 2**16 cases about one or two.
RANDOM_DIFFERENT = 1e-3


def long_average(unit: float, n: int) -> float:
    """Bound of the mean over n elements of a stochastically rounded average whose parameter is at most 1/2 away.

    A step moves by at most w / 2, so it rounds away with probability at most w / (2 unit) and variance w unit / 2; variances
    are forgotten with (1 - w)^2: in all unit / 4, for each element. 5 standard deviations of the mean.
    """
    return 5.0 * (unit / 4.0 / n) ** 0.5


# Some dozens of operations in double, 2**-53 each, and a printed vector whose unit vectors had a small constant in them.
DOUBLE = 5e-13
# 0.99**2000 is 2e-9; in float32 the average stops where half a unit is 1 % of the distance: 50 units of 2**-22 below 3.
ARRIVED = 1e-5
# Of 999 fair coins the number of heads has a standard deviation of 16.
COINS = 80

# Attention: u = eps / 2 of the compute dtype (float32, or float64 for float64), M the sum of the magnitudes behind an element.


def attention(magnitude: NDArray[Any], result: NDArray[Any], exponent: float, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Bound of |row - definition| for features with exponents of at most `exponent`.

    Each feature has some 4 roundings (exp within 2 units), and the rounding of an exponent is one of |e| u. Sums over
    features, keys, blocks and states of N <= 2**14 tokens are walks of sqrt(N) / 4 roundings, of both factors' sums. In all 32 u
    M, which for positive weights is 2 x 32 u max|v| = 4e-6 max|v| in float32. The definition in float64 has the same for float64.
    The result is rounded to the dtype; below the normal numbers lose units.
    """
    u = 0.5 * _EPS["float64" if dtype == np.float64 else "float32"]
    smallest = {"float16": 2.0**-24, "bfloat16": 2.0**-133}.get(dtype.name, _TINY[dtype.name])
    accumulated = (32.0 + 2.0 * exponent) * u * magnitude * (2.0 if dtype == np.float64 else 1.0)
    return np.asarray(accumulated + 0.5 * _EPS[dtype.name] * (np.abs(result) + accumulated) + 8.0 * smallest)


def running_sum(additions: int, equal: bool = False) -> float:
    """Bound of the relative error of a sum of positive terms in float32, added to it one after another.

    Each addition errs by at most half a unit of the sum so far: a walk of sqrt(additions) of 2**-25 on average, 8 times that at
    most; of equal terms all may err to one side.
    """
    return 2.0**-25 * (additions if equal else 8.0 * additions**0.5)


def attention_on_tensor_cores(
    magnitude: NDArray[Any], result: NDArray[Any], exponent: float, dtype: np.dtype[Any], fraction: float
) -> NDArray[Any]:
    """The same where products take numbers of `fraction`: f(q), f(k), weights and sums are rounded to it.

    A term has three such roundings in the numerator (f(q), f(k), and the weight or the sum), and two in the denominator; a sixth for
    their products with each other.
    """
    return np.asarray(attention(magnitude, result, exponent, dtype) + 6.0 * 0.5 * fraction * magnitude)


def gradient_on_tensor_cores(size: float, fraction: float) -> float:
    """What the roundings of tensor cores add to `attention_gradient`.

    Five roundings of a term (f(q), f(k), dy / denominator, a weight, a sum), and those of the denominator, which enters squared.
    """
    return 9.0 * 0.5 * fraction * size


# What is promised of "elu" in float32, relative to max |v|.
ATTENTION = 4e-6

# exp by a polynomial: its last sum and product, the rest of log(2) and the series' own error, 2.5 half units; of eps = two halves.
EXPONENTIAL_UNITS = 2.0

# Of three draws of random features, far from normal in distribution, against a mean of three others.
FAVOR_SPREAD = (0.6, 1.7)

# The relative error of 1024 random features against softmax attention at entries of standard deviation 1/4: 3 % are expected of
# averages over keys, where the family's measurement of single weights found 6 % with 256.
FAVOR = 0.06

# A central difference of attention in float64, relative to the loss and the gradient: rounding 64 eps / (2 step) and the third
# derivative step**2 / 6 of features of size 10, each below.
CENTRAL_STEP = 2.0**-18
CENTRAL = 2e-7


def attention_gradient(size: float, exponent: float, dtype: np.dtype[Any], operands: np.dtype[Any]) -> float:
    """Bound of a gradient of attention against float64's; `size` is what it would be without cancelling.

    The errors of the forward, twice over (the denominator's enters squared, through dy.y too): 64 roundings more, and two of
    the exponent. The result y comes rounded to the operands' dtype, and so does the gradient.
    """
    u = 0.5 * _EPS["float64" if operands == np.float64 else "float32"]
    smallest = {"float16": 2.0**-24, "bfloat16": 2.0**-133}.get(dtype.name, 0.0)
    return float(((128.0 + 4.0 * exponent) * u + 2.0 * _EPS[operands.name]) * size + 8.0 * smallest)


def softmax_attention(
    magnitude: NDArray[Any], result: NDArray[Any], logit: float, d: int, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Bound of |row - definition| with logits whose terms add up to `logit` in magnitude.

    A logit is a sum of d products, off by (sqrt(d) / 2 + 2) u of their magnitudes' sum, and its error is a relative one of the
    weight; the rest is as in `attention`.
    """
    return attention(magnitude, result, (0.5 * np.sqrt(d) + 2.0) * logit, dtype)


# Mean entropies of 200 rows against those of other random numbers: rows spread by 0.05 at 64 keys, and all share their keys.
ENTROPY = 0.05

# Nystrom attention: distances in Frobenius norm relative to the result's. The sums are as in `attention`, 2e-7 of float32; A's own
# roundings come back through Z, whose norm six steps hold below 34 (a singular value grows 3.25 times a step, up to 1 / 0.03), times
# sqrt(m) u / 4 of independent ones, where rows of P1 pick out few of them: 1e-6 in all. Landmarks' means have segments of some
# hundred rows, walks of 10 roundings. Half precision rounds the result once, by u / sqrt(3) of each element on average.
NYSTROM = {"float64": 1e-13, "float32": 2e-6, "float16": 1e-3, "bfloat16": 6e-3}


# Elements rounded to TF32: by u / sqrt(3) of each on average, as float16 does, and logits by the root of the sum of their products'
# squares: 1.0 of logits with a deviation of 2, twice for q and k. Most measured: 7e-4.
NYSTROM_TF32 = 2e-3


def nystrom(dtype: np.dtype[Any]) -> float:
    """Bound of the relative distance between a result and its definition."""
    return NYSTROM[dtype.name]


def nystrom_gradient(dtype: np.dtype[Any]) -> float:
    """Of a gradient: through each step back as through the step, and Z twice, so 34 times its error at most, half of it seen."""
    return 16.0 * NYSTROM["float64" if dtype == np.float64 else "float32"] + (
        NYSTROM[dtype.name] if dtype.itemsize == 2 else 0.0
    )


# A float32 result of more steps than six: small singular values, and with them the errors of A, grow on; ten times.
NYSTROM_LONG = 2e-5
# A single number, as the sum of one row's weights, beside the average over all elements that a norm is.
NYSTROM_TOLD = 10.0
# The family's figures on learned q, k and v have three digits; what the issue asks.
NYSTROM_FIGURES = 0.02
# A float32 result that is 5e-7 off falls on another side of the middle of two float16 numbers, 1e-3 apart, 1 in 1000 times.
NYSTROM_ROUNDED_OTHERWISE = 5e-3
# Of 64 landmarks for 512 rows on a path that turns once; and of noise, where the mean of v is the yardstick: what to expect.
NYSTROM_SMOOTH = 0.05
NYSTROM_NOISE = 0.8

# A central difference of a loss of some nats over steps of 1e-4 of weights of about 1, in float32 in part (the places).
EXAMPLE_SLOPE = 1e-3

# A layer of Keras against the same sums in another order: rows of some 10 products on both sides of an attention, numbers of size 1.
KERAS_LAYER = 1e-5
# In bfloat16: inputs, weights, projections and the result each rounded by 2**-9, relative to the largest element.
KERAS_HALF = 0.05
