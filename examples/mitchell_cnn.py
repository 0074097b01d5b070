# SPDX-License-Identifier: BSD-3-Clause
"""A trained convolutional network of torch, converted to Mitchell arithmetic and trained on.

The network learns the digits that scikit-learn ships, in exact arithmetic. `fastops.torch.approximate` then turns every convolution and
linear layer into one whose products are sums of approximate logarithms; the weights stay. The program prints the accuracy on test images
before the conversion, after it, and after some epochs of training in the approximate arithmetic, for several multipliers of
less and less precision. --plot draws the test loss of each along the retraining.

    python mitchell_cnn.py --plot retraining.svg

Needs torch and scikit-learn, and matplotlib for --plot.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastops
import fastops.torch as ft

MULTIPLIERS = {
    "Mitchell": fastops.Multiplier(),
    "Mitchell, min-mse": fastops.Multiplier("min-mse"),
    "Mitchell, 2-bit mantissas": fastops.Multiplier(mantissa_bits=2),
    "Mitchell, 1-bit mantissas": fastops.Multiplier(mantissa_bits=1),
}
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def load_digits(seed: int) -> Data:
    """Training and test images (N, 1, 8, 8), pixels in [0, 1], with their labels, 500 of them for the test."""
    from sklearn.datasets import load_digits as sklearn_digits

    images, labels = sklearn_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    x = torch.from_numpy((images[order] / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels[order].astype(np.int64))
    return x[500:], y[500:], x[:500], y[:500]


def network() -> nn.Module:
    """Two convolutions and two linear layers, 9802 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


@torch.no_grad()
def tested(model: nn.Module, data: Data) -> tuple[float, float]:
    """Accuracy in percent and loss on the test images."""
    logits = model(data[2])
    loss = nn.functional.cross_entropy(logits, data[3])
    return 100 * float((logits.argmax(1) == data[3]).float().mean()), float(loss)


def train(model: nn.Module, data: Data, epochs: int, lr: float, seed: int) -> list[float]:
    """The test loss before the first epoch and after each."""
    optimizer = ft.AdamW(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    losses = [tested(model, data)[1]]
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0]), generator=generator).split(64):
            loss = nn.functional.cross_entropy(model(data[0][rows]), data[1][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(tested(model, data)[1])
    return losses


def plot(curves: dict[str, list[float]], exact: float, path: str) -> None:
    """Draw the losses along the retraining."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, losses in curves.items():
        axes.plot(range(len(losses)), losses, "o-", label=name)
    axes.axhline(exact, color="black", linestyle="--", label="exact")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epochs of retraining")
    axes.set_ylabel("test loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=12, help="in exact arithmetic")
    parser.add_argument("--retrain", type=int, default=4, help="epochs in approximate arithmetic")
    parser.add_argument(
        "--mode", choices=("exact", "ste", "mimic"), default="exact", help="the gradient of the retraining"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    data = load_digits(arguments.seed)
    trained: Any = network()
    train(trained, data, arguments.epochs, 4e-3, arguments.seed)
    accuracy, loss = tested(trained, data)
    print(f"exact arithmetic: accuracy {accuracy:.1f} %, test loss {loss:.4f}")
    print(f"{'multiplier':26} {'converted':>9} {'loss':>8} {'retrained':>9} {'loss':>8}")
    curves = {}
    for name, multiplier in MULTIPLIERS.items():
        model = ft.approximate(copy.deepcopy(trained), multiplier, mode=arguments.mode)
        before, first = tested(model, data)
        curves[name] = train(model, data, arguments.retrain, 1e-3, arguments.seed)
        after, last = tested(model, data)
        print(f"{name:26} {before:9.1f} {first:8.4f} {after:9.1f} {last:8.4f}", flush=True)
    if arguments.plot:
        plot(curves, loss, arguments.plot)


if __name__ == "__main__":
    main()
