# SPDX-License-Identifier: BSD-3-Clause
"""
Choosing a compensation constant
================================

A constant added to the sum of the logarithms takes the bias away and costs nothing. :class:`fastops.Multiplier` describes such
multipliers; :func:`fastops.optimal_offset` finds the constant for your own operands.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastops
from fastops import Multiplier

rng = np.random.default_rng(0)
a, b = rng.uniform(1, 2, (2, 100_000))

multipliers = {
    "none": Multiplier(),
    "min-mse": Multiplier("min-mse"),
    "minimax": Multiplier("minimax"),
    "L-Mul": Multiplier("lmul"),
    "4 x 4 segments": Multiplier(segments=4),
    "16 x 16 segments": Multiplier(segments=16),
    "1 correction": Multiplier(corrections=1),
}
errors = {name: m.mul(a, b) / (a * b) - 1 for name, m in multipliers.items()}
for name, error in errors.items():
    print(f"{name:17}  bias {error.mean():+.3%}  rms {np.sqrt(np.mean(error**2)):.3%}")

# %%
# The distribution of the error, over uniform mantissas.

figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for name in ("none", "min-mse", "16 x 16 segments"):
    axis.hist(100 * errors[name], bins=200, histtype="step", density=True, label=name)
axis.set(xlabel="relative error, %", ylabel="density", yscale="log")
axis.legend()
plt.show()

# %%
# Operands are seldom uniform. The best constant for *these* numbers, and what it leaves:

weights, activations = rng.normal(0, 0.05, 10_000), np.abs(rng.normal(0, 1, 10_000))
c = fastops.optimal_offset("mul", weights, activations, objective="mse")
own = Multiplier(float(c)).mul(weights, activations)
exact = weights * activations
print(f"c = {float(c):.5f}, rms error {np.sqrt(np.mean((own / exact - 1) ** 2)):.3%}")

# %%
# :func:`fastops.lmul` is L-Mul as a ufunc of its own, with the constant that its authors give for the dtype.

print(fastops.lmul(np.float32(1.5), np.float32(1.5)), Multiplier("lmul").mul(np.float32(1.5), np.float32(1.5)))
