# SPDX-License-Identifier: BSD-3-Clause
"""How a network of handwritten digits fares when its multiplications are approximate.

A small network is trained with exact arithmetic in plain NumPy, on the digits that scikit-learn ships. Its test images
then go through the same weights with every product of the three layers made by another multiplier: Mitchell's, one with
the constant of least squared error, L-Mul, and an 8-bit multiplier given as a look-up table. The program prints accuracy
and time, and draws each multiplier's relative error over the mantissas of the two operands.

    python approximate_network.py --plot error.svg

Needs scikit-learn, and matplotlib for --plot.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# NumPy's BLAS reads it when it is loaded: exact and approximate products are compared on one thread each.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt

import fastops

Array = npt.NDArray[Any]
Product = Callable[[Array, Array], Array]
Layers = list[tuple[Array, Array]]

MULTIPLIERS = {
    "Mitchell": fastops.Multiplier(),
    "Mitchell, min-mse": fastops.Multiplier("min-mse"),
    "L-Mul": fastops.Multiplier("lmul"),
}


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    name: str
    accuracy: float
    seconds: float


def load_digits(seed: int) -> tuple[Array, Array, Array, Array]:
    """Training and test images (float32, 64 pixels in [0, 1]) with their labels, 500 of them for the test."""
    from sklearn.datasets import load_digits as sklearn_digits

    images, labels = sklearn_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order]
    return images[500:], labels[500:], images[:500], labels[:500]


def forward(layers: Layers, x: Array, product: Product) -> list[Array]:
    """The input of each layer and, last, the scores; ReLU between the layers."""
    values = [x]
    for depth, (weights, bias) in enumerate(layers):
        y = product(values[-1], weights) + bias
        values.append(y if depth == len(layers) - 1 else np.maximum(y, 0))
    return values


def train(images: Array, labels: Array, epochs: int, seed: int) -> Layers:
    """A 64-64-64-10 network by stochastic gradient descent with momentum on the cross entropy."""
    rng = np.random.default_rng(seed)
    sizes = (64, 64, 64, 10)
    layers: Layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        weights = rng.standard_normal((fan_in, fan_out), np.float32) * np.float32((2 / fan_in) ** 0.5)
        layers.append((weights, np.zeros(fan_out, np.float32)))
    speeds = [tuple(np.zeros_like(parameter) for parameter in layer) for layer in layers]
    for epoch in range(epochs):
        rate = np.float32(0.1 * (1 - epoch / epochs))
        for batch in np.array_split(rng.permutation(len(images)), max(1, len(images) // 32)):
            values = forward(layers, images[batch], np.matmul)
            scores = np.exp(values[-1] - values[-1].max(axis=1, keepdims=True))
            gradient = scores / scores.sum(axis=1, keepdims=True)
            gradient[np.arange(len(batch)), labels[batch]] -= 1
            gradient /= len(batch)
            for (weights, bias), speed, x in zip(layers[::-1], speeds[::-1], values[-2::-1], strict=True):
                back = (gradient @ weights.T) * (x > 0)
                for parameter, v, slope in zip((weights, bias), speed, (x.T @ gradient, gradient.sum(0)), strict=True):
                    v *= np.float32(0.9)
                    v -= rate * slope
                    parameter += v
                gradient = back
    return layers


def signed_table(multiplier: fastops.Multiplier) -> Array:
    """The (256, 256) products of an unsigned first byte and a signed second one, indexed by the raw bytes."""
    unsigned = multiplier.table(8).astype(np.int32)
    value = np.arange(256).astype(np.uint8).view(np.int8).astype(np.int32)
    table: Array = unsigned[:, np.abs(value)] * np.sign(value)
    return table


def lut_product(table: Array) -> Product:
    """A product that rounds activations to uint8 and weights to int8, each to its own largest value."""

    def product(x: Array, weights: Array) -> Array:
        scale_x = max(float(x.max()), 1e-30) / 255
        scale_w = max(float(np.abs(weights).max()), 1e-30) / 127
        bytes_x = np.rint(x / scale_x).astype(np.uint8)
        bytes_w = np.rint(weights / scale_w).astype(np.int8)
        sums: Array = fastops.lut_matmul(bytes_x, bytes_w, table)
        return (sums * np.float32(scale_x * scale_w)).astype(np.float32)

    return product


def products() -> dict[str, Product]:
    """Every way of multiplying that the table compares, exact first."""
    found: dict[str, Product] = {"exact": np.matmul}
    found |= {name: multiplier.matmul for name, multiplier in MULTIPLIERS.items()}
    found["8-bit table, exact"] = lut_product(np.outer(np.arange(256), np.arange(-128, 128)).take(_BYTE_ORDER, axis=1))
    found["8-bit table, Mitchell"] = lut_product(signed_table(fastops.Multiplier()))
    return found


# Column of each raw byte in a table whose columns run from -128 to 127.
_BYTE_ORDER = np.arange(256).astype(np.uint8).view(np.int8).astype(np.intp) + 128


def evaluate(layers: Layers, images: Array, labels: Array, repeats: int = 5) -> list[Result]:
    """Accuracy in percent and the median seconds of one pass over the images, the ways taking turns."""
    ways = products()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    accuracy = {}
    fastops.set_num_threads(1)
    for _ in range(repeats):
        for name, product in ways.items():
            start = time.perf_counter()
            scores = forward(layers, images, product)[-1]
            seconds[name].append(time.perf_counter() - start)
            accuracy[name] = 100 * float(np.mean(scores.argmax(axis=1) == labels))
    return [Result(name, accuracy[name], statistics.median(seconds[name])) for name in ways]


def error_surface(multiplier: fastops.Multiplier, points: int = 128) -> Array:
    """Relative error in percent over mantissas in [1, 2) of the first (rows) and the second operand."""
    mantissas = (1 + (np.arange(points) + 0.5) / points).astype(np.float32)
    exact = np.multiply.outer(mantissas, mantissas).astype(np.float64)
    # Broadcasting rather than .outer, which only the native backend's ufuncs have.
    approximate = multiplier.mul(mantissas[:, None], mantissas[None, :])
    surface: Array = 100 * (approximate / exact - 1)
    return surface


def plot(path: str) -> None:
    """Draw the error surfaces of the multipliers side by side, in one colour scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, len(MULTIPLIERS), sharey=True)
    for axes, (name, multiplier) in zip(panels, MULTIPLIERS.items(), strict=True):
        surface = error_surface(multiplier)
        image = axes.imshow(surface, cmap="RdBu_r", vmin=-11.2, vmax=11.2, origin="lower", extent=(1, 2, 1, 2))
        axes.contour(surface, levels=[-8, -4, -2, 0, 2, 4], colors="k", linewidths=0.5, extent=(1, 2, 1, 2))
        axes.set_title(f"{name}: {surface.min():+.1f} % to {surface.max():+.1f} %", fontsize=10)
        axes.set_xlabel("mantissa of b")
    panels[0].set_ylabel("mantissa of a")
    figure.colorbar(image, ax=panels, label="error in %")
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Train, compare, print; the table goes to stdout."""
    parser = argparse.ArgumentParser(description="Digits under approximate multiplication.")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the weights (default: 0)")
    parser.add_argument("--plot", metavar="FILE", help="draw the error surfaces to an SVG or PNG file")
    options = parser.parse_args(argv)
    images, labels, test_images, test_labels = load_digits(options.seed)
    layers = train(images, labels, options.epochs, options.seed)
    results = evaluate(layers, test_images, test_labels)
    exact = results[0]
    print(f"{'multiplication':<24}{'accuracy':>10}{'points':>9}{'time':>12}{'x exact':>10}")
    for result in results:
        points = f"{result.accuracy - exact.accuracy:+.1f}"
        cells = f"{result.accuracy:>8.1f} %{points:>9}{result.seconds * 1e3:>9.2f} ms"
        print(f"{result.name:<24}{cells}{result.seconds / exact.seconds:>10.2f}")
    if options.plot:
        plot(options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
