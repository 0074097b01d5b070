# SPDX-License-Identifier: BSD-3-Clause
"""
Matrix products, convolutions, tables, gradients
================================================

What a network needs: :func:`fastops.mitchell_matmul`, :func:`fastops.mitchell_conv2d`, :func:`fastops.lut_matmul`, and their
gradients :func:`fastops.mitchell_matmul_grad`, :func:`fastops.mitchell_conv2d_grad`, :func:`fastops.mitchell_mul_grad` and
:func:`fastops.mitchell_div_grad`.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastops

rng = np.random.default_rng(1)
a = rng.normal(size=(64, 128)).astype(np.float32)
b = rng.normal(size=(128, 32)).astype(np.float32)
exact = a @ b


def rms_error(result: np.ndarray) -> float:
    """Root mean square error, relative to the root mean square of the exact product."""
    return float(np.sqrt(np.mean((result - exact) ** 2) / np.mean(exact**2)))


for multiplier in (fastops.Multiplier(), fastops.Multiplier("min-mse"), fastops.Multiplier(segments=16)):
    print(f"{multiplier!r:32} rms error {rms_error(fastops.mitchell_matmul(a, b, multiplier=multiplier)):.3%}")

# %%
# A table holds any 8-bit multiplier. This one is Mitchell's on unsigned bytes, so it equals the sum of integer products.

left = rng.integers(0, 256, (8, 16), dtype=np.uint8)
right = rng.integers(0, 256, (16, 4), dtype=np.uint8)
through_table = fastops.lut_matmul(left, right, fastops.Multiplier().table(8))
by_hand = fastops.mitchell_mul(left[:, :, None], right[None]).sum(axis=1, dtype=np.int64)
print(np.array_equal(through_table, by_hand))

# %%
# An edge filter, exact and approximate, on a picture of a disc.

yy, xx = np.mgrid[-1:1:96j, -1:1:96j]
picture = (1.5 - np.hypot(xx, yy)).clip(0, 1).astype(np.float32)[None, None]
sobel = np.array([[[[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]]], np.float32)
edges = fastops.mitchell_conv2d(picture, sobel, padding=1)
figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
for axis, image, title in zip(axes, (picture, edges), ("picture", "mitchell_conv2d"), strict=True):
    axis.imshow(image[0, 0], cmap="gray")
    axis.set(title=title, xticks=[], yticks=[])
plt.show()

# %%
# Gradients in the three modes. The exact one is the slope of the piecewise linear product, a power of two.

one, two, dy = np.float32([1.5]), np.float32([2.75]), np.float32([1.0])
for mode in ("exact", "ste", "mimic"):
    mul = fastops.mitchell_mul_grad(one, two, dy, mode=mode)
    div = fastops.mitchell_div_grad(one, two, dy, mode=mode)
    print(f"{mode:6} product {mul[0][0]:.3f} {mul[1][0]:.3f}   quotient {div[0][0]:.4f} {div[1][0]:.4f}")

da, db = fastops.mitchell_matmul_grad(a, b, np.ones_like(exact))
dx, dw = fastops.mitchell_conv2d_grad(picture, sobel, np.ones_like(edges), padding=1)
print(da.shape, db.shape, dx.shape, dw.shape)
