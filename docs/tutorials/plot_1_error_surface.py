# SPDX-License-Identifier: BSD-3-Clause
"""
The error of a product
======================

Mitchell's product is exact where an operand is a power of two and at most one ninth too small elsewhere. The relative error
depends on the two mantissas alone, so one picture shows all of it. :func:`fastops.mitchell_div` errs the other way.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastops

mantissas = np.linspace(1, 2, 256, endpoint=False, dtype=np.float32)
x, y = np.meshgrid(mantissas, mantissas)

product = fastops.mitchell_mul(x, y) / (x * y) - 1
quotient = fastops.mitchell_div(x, y) / (x / y) - 1
print(f"product:  {product.min():+.4%} to {product.max():+.4%}, mean {product.mean():+.3%}")
print(f"quotient: {quotient.min():+.4%} to {quotient.max():+.4%}, mean {quotient.mean():+.3%}")

# %%
# The ridge in the first picture is where the mantissas' sum carries into the exponent.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for axis, error, title in zip(axes, (product, quotient), ("mitchell_mul", "mitchell_div"), strict=True):
    image = axis.imshow(100 * error, origin="lower", extent=(1, 2, 1, 2), cmap="RdBu", vmin=-13, vmax=13)
    axis.set(title=title, xlabel="mantissa of a", ylabel="mantissa of b")
figure.colorbar(image, ax=axes, label="relative error, %")
plt.show()
