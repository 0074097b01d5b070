# SPDX-License-Identifier: BSD-3-Clause
"""How far Nystrom attention is from exact attention, over the number of landmarks and of iterations, layer by layer.

    python nystrom_error.py --plot error.svg learned_qkv.npz

The file holds arrays (q k v, heads, tokens, numbers), one a layer, as a trained model has them. Without one, ../shared/data is looked in
beside the source tree, and else a stack is made here: bytes of Python's own standard library as vectors, and layers that attend with random
matrices and mix each token with its neighbours, so that deeper ones are smoother, as they are in trained encoders. Printed are distances to
the exact result over its size; 1 is as bad as zeros, and "mean" is what the mean of v in every row would have. Needs matplotlib for --plot.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import fastops

Array = npt.NDArray[Any]

LEARNED = Path(__file__).resolve().parents[2] / "shared" / "data" / "learned_qkv.npz"
HEADS, WIDTH, LAYERS = 4, 64, 3
LANDMARKS = (8, 16, 32, 64, 128)
ITERATIONS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24)
AT = 64


def bytes_of_modules(size: int) -> Array:
    """The first bytes of the standard library's modules, one after the other."""
    text = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return np.frombuffer(text[:size], np.uint8)


def normalized(x: Array) -> Array:
    """Rows of mean 0 and variance 1."""
    x = x - x.mean(axis=1, keepdims=True)
    return np.asarray(x / np.sqrt((x * x).mean(axis=1, keepdims=True)))


def stack(length: int, rng: np.random.Generator) -> dict[str, Array]:
    """(q k v, HEADS, N, WIDTH) of each of some layers of an untrained encoder."""
    size = HEADS * WIDTH
    x: Array = rng.standard_normal((256, size), np.float32)[bytes_of_modules(length)]
    layers = {}
    for layer in range(LAYERS):
        for _ in range(2 + 4 * layer):
            # Each token a little of what is before and after it.
            x = (x + np.roll(x, 1, axis=0) + np.roll(x, -1, axis=0)) / 3
        x = normalized(x)
        matrices = rng.standard_normal((3, HEADS, size, WIDTH), np.float32) * np.float32(size**-0.5)
        # Keys like queries, so that a token finds those that resemble it, as heads often learn to.
        matrices[1] = 0.7 * matrices[0] + 0.3 * matrices[1]
        q, k, v = (np.matmul(x, matrix) for matrix in matrices)
        layers[f"layer {layer}"] = np.stack([1.5 * q, 1.5 * k, v])
        y = fastops.softmax_attention(1.5 * q, 1.5 * k, v)
        x = x + y.swapaxes(0, 1).reshape(length, size)
    return layers


def distance(y: Array, exact: Array) -> float:
    """Of a result to the exact one, over its size."""
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def errors(qkv: Array) -> tuple[float, list[float], list[float], list[float]]:
    """The mean of v; over landmarks by six steps and by the ridge; over iterations at `AT` landmarks."""
    q, k, v = qkv
    exact = fastops.softmax_attention(q, k, v)
    mean = distance(np.broadcast_to(v.mean(axis=1, keepdims=True), v.shape), exact)
    newton, ridge = (
        [distance(fastops.nystrom_attention(q, k, v, num_landmarks=m, pinv=pinv), exact) for m in LANDMARKS]
        for pinv in ("newton", "ridge")
    )
    steps = [distance(fastops.nystrom_attention(q, k, v, num_landmarks=AT, iterations=i), exact) for i in ITERATIONS]
    return mean, newton, ridge, steps


def plot(found: dict[str, tuple[float, list[float], list[float], list[float]]], path: str) -> None:
    """Draw both dependences, and the mean of v as a dashed line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (name, (mean, newton, _, steps)) in enumerate(found.items()):
        left.plot(LANDMARKS, newton, "o-", color=f"C{i}", label=name)
        right.plot(ITERATIONS, steps, "o-", color=f"C{i}", label=name)
        for axes in (left, right):
            axes.axhline(mean, color=f"C{i}", linestyle="--", linewidth=0.8)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xlabel("landmarks (6 iterations)")
    right.set_xlabel(f"iterations ({AT} landmarks)")
    left.set_ylabel("distance to exact attention")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(title="dashed: the mean of v")
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Read or make the layers, measure, print; the table goes to stdout."""
    parser = argparse.ArgumentParser(description="Nystrom against exact attention.")
    parser.add_argument("file", nargs="?", help="an .npz of arrays (q k v, heads, tokens, numbers)")
    parser.add_argument("--length", type=int, default=1024, help="tokens at most (default: 1024)")
    parser.add_argument("--made", action="store_true", help="the stack that is made here, whatever file there is")
    parser.add_argument("--seed", type=int, default=0, help="of the stack that is made here (default: 0)")
    parser.add_argument("--plot", metavar="FILE", help="draw the errors to an SVG or PNG file")
    options = parser.parse_args(argv)
    if options.length < 256:
        parser.error("--length must be at least 256")
    path = options.file or (str(LEARNED) if LEARNED.exists() else None)
    if options.file and not os.path.isfile(options.file):
        parser.error(f"no file {options.file!r}")
    if path and not options.made:
        with np.load(path) as arrays:
            layers = {name: arrays[name][:, :, : options.length].astype(np.float32) for name in sorted(arrays.files)}
        print(f"learned q, k and v of {path}")
    else:
        layers = stack(options.length, np.random.default_rng(options.seed))
        print(f"{options.length} bytes through a stack of random layers")
    print(
        f"{'':<12}{'mean':>6} |"
        + "".join(f"{f'm={m}':>7}" for m in LANDMARKS)
        + " |"
        + "".join(f"{f'it={i}':>7}" for i in ITERATIONS)
    )
    found = {}
    for name, qkv in layers.items():
        found[name] = mean, newton, ridge, steps = errors(qkv)
        print(
            f"{name:<12}{mean:>6.3f} |"
            + "".join(f"{e:>7.3f}" for e in newton)
            + " |"
            + "".join(f"{e:>7.3f}" for e in steps)
        )
        print(f"{'  ridge':<18} |" + "".join(f"{e:>7.3f}" for e in ridge) + " |", flush=True)
    if options.plot:
        plot(found, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
