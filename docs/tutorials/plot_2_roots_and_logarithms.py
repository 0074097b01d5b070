# SPDX-License-Identifier: BSD-3-Clause
"""
Roots, reciprocals and logarithms
=================================

The unary operations over two octaves, each against the exact function: :func:`fastops.mitchell_square`,
:func:`fastops.mitchell_reciprocal`, :func:`fastops.mitchell_sqrt`, :func:`fastops.mitchell_rsqrt`,
:func:`fastops.mitchell_exp2` and :func:`fastops.mitchell_log2`.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastops

a = np.linspace(1, 4, 1000)
pairs = {
    "square": (fastops.mitchell_square(a), a * a),
    "reciprocal": (fastops.mitchell_reciprocal(a), 1 / a),
    "sqrt": (fastops.mitchell_sqrt(a), np.sqrt(a)),
    "rsqrt": (fastops.mitchell_rsqrt(a), 1 / np.sqrt(a)),
    "exp2": (fastops.mitchell_exp2(a), np.exp2(a)),
}

figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for name, (approximate, exact) in pairs.items():
    error = approximate / exact - 1
    print(f"{name:10}  {error.min():+.3%} to {error.max():+.3%}")
    axis.plot(a, 100 * error, label=name)
axis.set(xlabel="a", ylabel="relative error, %")
axis.legend()
plt.show()

# %%
# The logarithm's error is absolute. It is never positive and repeats in each octave.

error = fastops.mitchell_log2(a) - np.log2(a)
print(f"log2: {error.min():+.5f} to {error.max():+.5f}")

# %%
# The operations fit together: an approximate logarithm, halved, and raised again is the approximate root.

again = fastops.mitchell_exp2(fastops.mitchell_log2(a) / 2)
print(np.array_equal(again, fastops.mitchell_sqrt(a)))
