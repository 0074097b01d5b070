# SPDX-License-Identifier: BSD-3-Clause
"""
Moving averages of weights
==========================

A regression by stochastic gradient descent whose step size is too large to settle: :class:`fastops.EMA` keeps averages of the
weights along the way, :func:`fastops.sgd_step_` moves weights and average in one pass, and :func:`fastops.posthoc_ema_weights`
makes further averages afterwards.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastops

rng = np.random.default_rng(0)
truth = rng.normal(size=32)
inputs = rng.normal(size=(4096, 32))
targets = inputs @ truth + rng.normal(size=4096)


def gradient(weights: np.ndarray) -> np.ndarray:
    """Slope of half the squared error of a batch of 8."""
    batch = rng.integers(0, len(inputs), 8)
    x = inputs[batch]
    return x.T @ (x @ weights - targets[batch]) / len(batch)


def distance(weights: np.ndarray) -> float:
    """Distance from the weights that made the data."""
    return float(np.linalg.norm(weights - truth))


# %%
# Averages with a constant decay (as it is, and debiased), with one that warms up, and the plain mean of all steps.

steps = 2000
weights = np.zeros(32)
averages = {
    "decay 0.99": fastops.EMA([weights], 0.99),
    "decay 0.99, debiased": fastops.EMA([weights], 0.99, debias=True),
    "decay 0.999, warmup": fastops.EMA([weights], 0.999, warmup="timm"),
    "equal weights": fastops.EMA([weights], "equal"),
}
power = fastops.EMA([weights], warmup="power", sigma=(0.05, 0.2))
curves: dict[str, list[float]] = {"raw weights": [], **{name: [] for name in averages}}
stored, stored_steps, stored_widths = [], [], []
for step in range(1, steps + 1):
    fastops.sgd_step_([weights], [gradient(weights)], None, lr=0.02)
    power.update()
    curves["raw weights"].append(distance(weights))
    for name, ema in averages.items():
        ema.update()
        with ema.average_parameters():
            curves[name].append(distance(weights))
    if step % 250 == 0:
        for width, (shadow,) in zip((0.05, 0.2), power.shadows, strict=True):
            stored.append(shadow.copy())
            stored_steps.append(step)
            stored_widths.append(width)

figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for name, curve in curves.items():
    axis.plot(np.arange(1, steps + 1), curve, label=name, color="0.7" if name == "raw weights" else None)
axis.set(xscale="log", yscale="log", xlabel="step", ylabel="distance from the true weights")
axis.legend()
plt.show()

# %%
# Power-function averages of two widths were stored eight times. From them, averages of any width between can be made after the
# training is over, and the best be chosen.

for sigma in (0.05, 0.1, 0.15, 0.2):
    mix = fastops.posthoc_ema_weights(stored_steps, stored_widths, steps, sigma)
    print(f"sigma {sigma:.2f}: distance {distance(np.tensordot(mix, stored, 1)):.4f}")
print(f"raw weights: distance {distance(weights):.4f}")

# %%
# The optimizer can move the average itself, in its own pass; the EMA counts the step when it has succeeded.

m = np.zeros(32)
weights[:] = 0
ema = fastops.EMA([weights], 0.99, warmup="timm")
for _ in range(200):
    g = gradient(weights)
    fastops.sgd_step_([weights], [g], [m], lr=0.01, momentum=0.9, ema=ema)
print(f"weights {distance(weights):.3f}, average {distance(ema.shadows[0]):.3f}")

# %%
# A state is a flat dict of numbers and arrays, which NumPy stores without pickle.

print({key: value if np.ndim(value) == 0 else value.shape for key, value in ema.state_dict().items()})
