# SPDX-License-Identifier: BSD-3-Clause
"""What a moving average of the weights does for a network that is trained with a large step size.

A small network learns the digits that scikit-learn ships, in plain NumPy, with small batches and a learning rate so large that
its weights jump about the minimum without ever settling. `fastops.sgd_step_` moves the weights and the average of them in one
pass. The program prints, along training, the accuracy on test images of the raw weights and of the average, and the spread of
both over the last epochs.

    python moving_average.py --plot accuracy.svg

Needs scikit-learn, and matplotlib for --plot.
"""

from __future__ import annotations

import argparse
import itertools
import os
from dataclasses import dataclass, field
from typing import Any

# NumPy's BLAS reads it when it is loaded: matrices this small lose by threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt

import fastops

Array = npt.NDArray[Any]

SIZES = (64, 64, 10)
BATCH = 8


@dataclass
class History:
    """Accuracy in percent after each epoch."""

    raw: list[float] = field(default_factory=list)
    average: list[float] = field(default_factory=list)


def load_digits(seed: int) -> tuple[Array, Array, Array, Array]:
    """Training and test images (float32, 64 pixels in [0, 1]) with their labels, 500 of them for the test."""
    from sklearn.datasets import load_digits as sklearn_digits

    images, labels = sklearn_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order]
    return images[500:], labels[500:], images[:500], labels[:500]


def initial(rng: np.random.Generator) -> list[Array]:
    """Weights and biases, layer by layer."""
    params: list[Array] = []
    for fan_in, fan_out in itertools.pairwise(SIZES):
        weights = rng.standard_normal((fan_in, fan_out), np.float32) * np.float32((2 / fan_in) ** 0.5)
        params += [weights, np.zeros(fan_out, np.float32)]
    return params


def forward(params: list[Array], x: Array) -> list[Array]:
    """The input of each layer and, last, the scores; ReLU between the layers."""
    values = [x]
    for depth in range(0, len(params), 2):
        y = values[-1] @ params[depth] + params[depth + 1]
        values.append(y if depth + 2 == len(params) else np.maximum(y, 0))
    return values


def gradients(params: list[Array], images: Array, labels: Array) -> list[Array]:
    """Gradient of the mean cross entropy, in the order of the parameters."""
    values = forward(params, images)
    scores = np.exp(values[-1] - values[-1].max(axis=1, keepdims=True))
    slope = scores / scores.sum(axis=1, keepdims=True)
    slope[np.arange(len(labels)), labels] -= 1
    slope /= np.float32(len(labels))
    grads: list[Array] = []
    for depth in range(len(params) - 2, -1, -2):
        x = values[depth // 2]
        grads = [x.T @ slope, slope.sum(axis=0), *grads]
        slope = (slope @ params[depth].T) * (x > 0)
    return grads


def accuracy(params: list[Array], images: Array, labels: Array) -> float:
    """Percent of images whose largest score is that of their label."""
    return 100 * float(np.mean(forward(params, images)[-1].argmax(axis=1) == labels))


def train(epochs: int, rate: float, decay: float, seed: int) -> History:
    """Train; the accuracy of both kinds of weights after every epoch."""
    images, labels, test_images, test_labels = load_digits(seed)
    rng = np.random.default_rng(seed)
    params = initial(rng)
    momentum = [np.zeros_like(p) for p in params]
    # The ramp of "tf" lets the average forget the untrained weights quickly.
    ema = fastops.EMA(params, decay, warmup="tf")
    history = History()
    for _ in range(epochs):
        for batch in np.array_split(rng.permutation(len(images)), len(images) // BATCH):
            grads = gradients(params, images[batch], labels[batch])
            fastops.sgd_step_(params, grads, momentum, lr=rate, momentum=0.9, ema=ema)
        history.raw.append(accuracy(params, test_images, test_labels))
        with ema.average_parameters():
            history.average.append(accuracy(params, test_images, test_labels))
    return history


def plot(history: History, path: str) -> None:
    """Draw both accuracies along training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    epochs = np.arange(1, len(history.raw) + 1)
    axes.plot(epochs, history.raw, "o-", label="raw weights", color="tab:gray", markersize=3)
    axes.plot(epochs, history.average, "o-", label="moving average", color="tab:blue", markersize=3)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy in %")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Train, compare, print; the table goes to stdout."""
    parser = argparse.ArgumentParser(description="Digits with and without a moving average of the weights.")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training images (default: 15)")
    parser.add_argument("--rate", type=float, default=0.08, help="learning rate (default: 0.08)")
    parser.add_argument("--decay", type=float, default=0.998, help="of the moving average (default: 0.998)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the weights (default: 0)")
    parser.add_argument("--plot", metavar="FILE", help="draw the accuracies to an SVG or PNG file")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    history = train(options.epochs, options.rate, options.decay, options.seed)
    print(f"{'epoch':>5}{'raw':>12}{'average':>12}")
    shown = sorted({*range(1, 6), *range(10, options.epochs, 5), options.epochs})
    for epoch in (e for e in shown if e <= options.epochs):
        print(f"{epoch:>5}{history.raw[epoch - 1]:>10.1f} %{history.average[epoch - 1]:>10.1f} %")
    last = slice(options.epochs // 2, None)
    for name, values in (("raw weights", history.raw[last]), ("moving average", history.average[last])):
        spread = f"{min(values):.1f} to {max(values):.1f} %"
        print(f"{name}: {np.mean(values):.1f} % in the mean of the last {len(values)} epochs, {spread}")
    if options.plot:
        plot(history, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
