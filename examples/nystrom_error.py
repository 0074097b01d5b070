# SPDX-License-Identifier: BSD-3-Clause
"""How far Nystrom attention is from exact attention, over the number of landmarks and of iterations, layer by layer.

    python nystrom_error.py --plot error.svg

A small encoder is trained here, in NumPy with fastops' AdamW step, to fill in bytes that are masked in a text (the modules of Python's own
standard library, or --text), and its queries, keys and values of a longer piece of that text are measured. Those of a model of your own
come in a file:

    python nystrom_error.py qkv.npz

of arrays (q k v, heads, tokens, numbers), one a layer. Printed are distances to the exact result over its size; 1 is as bad as zeros, and
"mean" is what the mean of v in every row would have. Needs matplotlib for --plot.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

# NumPy's BLAS reads it when it is loaded: matrices this small lose by threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt

import fastops

Array = npt.NDArray[Any]

HEADS, WIDTH, LAYERS = 4, 32, 2
SIZE = HEADS * WIDTH
# Bytes and what stands in the place of a masked one.
TOKENS = 257
# Of a step: windows, their bytes, and the share of those that is masked.
BATCH, WINDOW, MASKED = 4, 256, 0.2
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


def normalized(x: Array) -> tuple[Array, Array]:
    """Rows of mean 0 and variance 1, and their factors."""
    x = x - x.mean(axis=-1, keepdims=True)
    factor = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)
    return x * factor, factor


def normalized_gradient(dy: Array, y: Array, factor: Array) -> Array:
    """Back through it."""
    return np.asarray(factor * (dy - dy.mean(axis=-1, keepdims=True) - y * (dy * y).mean(axis=-1, keepdims=True)))


def softmax(x: Array) -> Array:
    """Of each row, in place."""
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True)
    return x


def neighbours(tokens: Array) -> list[Array]:
    """What is before each token, itself, and what is after it; a window is a circle."""
    return [np.roll(tokens, by, axis=1) for by in (1, 0, -1)]


class Encoder:
    """Layers of softmax attention and of a rectifier, both around what passes by, and their gradients."""

    def __init__(self, length: int, rng: np.random.Generator) -> None:
        # Embeddings of a byte by its place: before a token, at it, after it.
        shapes: list[tuple[int, ...]] = [(3, TOKENS, SIZE)]
        for _ in range(LAYERS):
            shapes += [(SIZE, 3 * SIZE), (SIZE, SIZE), (SIZE, 4 * SIZE), (4 * SIZE, SIZE)]
        shapes += [(SIZE, 256)]
        self.weights = [rng.standard_normal(shape, np.float32) * np.float32(shape[-2] ** -0.5) for shape in shapes]
        self.moments = [[np.zeros_like(w) for w in self.weights] for _ in range(2)]
        self.steps = 0
        angle = np.arange(length)[:, np.newaxis] * 1e4 ** -np.linspace(0, 1, SIZE // 2)
        self.places = np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32) / 16

    def layers(self, tokens: Array, first: Array) -> tuple[Array, list[tuple[Array, ...]]]:
        """The rows (B, N, SIZE) after all layers, of windows that begin at `first`, and what each layer's gradient needs."""
        b, n = tokens.shape
        x = sum(self.weights[0][i][near] for i, near in enumerate(neighbours(tokens)))
        x = x + self.places[first[:, np.newaxis] + np.arange(n)]
        kept = []
        for qkv, out, up, down in zip(*(self.weights[1 + i : -1 : 4] for i in range(4)), strict=True):
            y, factor = normalized(x)
            q, k, v = (y @ qkv).reshape(b, n, 3, HEADS, WIDTH).transpose(2, 0, 3, 1, 4)
            p = softmax(q @ k.swapaxes(-1, -2) * np.float32(WIDTH**-0.5))
            heads = (p @ v).swapaxes(1, 2).reshape(b, n, SIZE)
            x = x + heads @ out
            z, scale = normalized(x)
            h = np.maximum(z @ up, 0)
            x = x + h @ down
            kept.append((y, factor, q, k, v, p, heads, z, scale, h))
        return x, kept

    def learn(self, text: Array, rate: float, rng: np.random.Generator) -> float:
        """One step on windows of the text; bits a masked byte."""
        at = rng.integers(0, len(text) - WINDOW, BATCH)
        wanted = text[at[:, np.newaxis] + np.arange(WINDOW)].astype(np.int64)
        masked = rng.random(wanted.shape) < MASKED
        tokens = np.where(masked, TOKENS - 1, wanted)
        x, kept = self.layers(tokens, rng.integers(0, len(self.places) - WINDOW + 1, BATCH))
        y, factor = normalized(x)
        p = softmax(y[masked] @ self.weights[-1])
        right = np.arange(len(p)), wanted[masked]
        loss = -float(np.log2(p[right] + 1e-30).mean())
        p[right] -= 1
        p /= len(p)
        gradients = [np.zeros_like(w) for w in self.weights]
        gradients[-1] = y[masked].T @ p
        dy = np.zeros_like(y)
        dy[masked] = p @ self.weights[-1].T
        dx = normalized_gradient(dy, y, factor)
        for i in reversed(range(LAYERS)):
            dx = self.back(dx, kept[i], self.weights[1 + 4 * i : 5 + 4 * i], gradients, 1 + 4 * i)
        for i, near in enumerate(neighbours(tokens)):
            np.add.at(gradients[0][i], near, dx)
        self.steps += 1
        fastops.adamw_step_(self.weights, gradients, *self.moments, step=self.steps, lr=rate, weight_decay=0.01)
        return loss

    @staticmethod
    def back(dx: Array, kept: tuple[Array, ...], weights: list[Array], gradients: list[Array], at: int) -> Array:
        """Through one layer; the gradients of its weights go where `at` says."""
        y, factor, q, k, v, p, heads, z, scale, h = kept
        qkv, out, up, down = weights
        b, n, _ = dx.shape

        def of_weights(x: Array, d: Array) -> Array:
            return np.asarray(x.reshape(b * n, -1).T @ d.reshape(b * n, -1))

        gradients[at + 3] = of_weights(h, dx)
        dh = (dx @ down.T) * (h > 0)
        gradients[at + 2] = of_weights(z, dh)
        dx = dx + normalized_gradient(dh @ up.T, z, scale)
        gradients[at + 1] = of_weights(heads, dx)
        dheads = (dx @ out.T).reshape(b, n, HEADS, WIDTH).swapaxes(1, 2)
        dp = dheads @ v.swapaxes(-1, -2)
        dp -= (dp * p).sum(axis=-1, keepdims=True)
        ds = dp * p * np.float32(WIDTH**-0.5)
        parts = np.stack([ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dheads])
        d = parts.transpose(1, 3, 0, 2, 4).reshape(b, n, 3 * SIZE)
        gradients[at] = of_weights(y, d)
        return np.asarray(dx + normalized_gradient(d @ qkv.T, y, factor))


def trained(text: Array, length: int, steps: int, rng: np.random.Generator) -> dict[str, Array]:
    """(q k v, HEADS, N, WIDTH) of each layer, of the last `length` bytes, which are not learned from."""
    model = Encoder(length, rng)
    seen, tail = text[:-length], text[-length:]
    losses = []
    for i in range(steps):
        # Up over the first tenth, then down to zero.
        rate = 4e-3 * min((i + 1) / (0.1 * steps + 1), 1.1 * (1 - i / steps))
        losses.append(model.learn(seen, rate, rng))
    if losses:
        part = max(steps // 10, 1)
        first, last = np.mean(losses[:part]), np.mean(losses[-part:])
        print(f"{steps} steps on {len(seen)} bytes: from {first:.2f} to {last:.2f} bits a masked byte")
    _, kept = model.layers(tail[np.newaxis].astype(np.int64), np.zeros(1, np.int64))
    return {f"layer {i}": np.stack([x[0] for x in layer[2:5]]) for i, layer in enumerate(kept)}


def read(path: str, length: int) -> dict[str, Array]:
    """The layers of a file, at most `length` tokens of each; ValueError says what else it holds."""
    wanted = f"{path} must be an .npz of arrays (3, heads, tokens, numbers) of floats"
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in sorted(file.files)}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{wanted}, got another kind of file") from None
    if not arrays:
        raise ValueError(f"{wanted}, got none")
    for name, x in arrays.items():
        if x.ndim != 4 or x.shape[0] != 3 or not x.size or x.dtype.kind != "f":
            raise ValueError(f"{wanted}, got {name!r} of shape {x.shape} and dtype {x.dtype}")
    return {name: x[:, :, :length].astype(np.float32) for name, x in arrays.items()}


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
    parser.add_argument(
        "file", nargs="?", help="an .npz of arrays (q k v, heads, tokens, numbers) in place of the training"
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens at most (default: 1024)")
    parser.add_argument("--text", metavar="FILE", help="what is learned (default: modules of the standard library)")
    parser.add_argument("--steps", type=int, default=250, help="of the training (default: 250)")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    parser.add_argument("--plot", metavar="FILE", help="draw the errors to an SVG or PNG file")
    options = parser.parse_args(argv)
    if options.length < WINDOW:
        parser.error(f"--length must be at least {WINDOW}")
    if options.steps < 0:
        parser.error("--steps must be at least 0")
    for path in (options.file, options.text):
        if path and not os.path.isfile(path):
            parser.error(f"no file {path!r}")
    if options.file:
        try:
            layers = read(options.file, options.length)
        except ValueError as error:
            parser.error(str(error))
        print(f"q, k and v of {options.file}")
    else:
        text = np.fromfile(options.text, np.uint8) if options.text else bytes_of_modules(500_000)
        if len(text) <= options.length + WINDOW:
            parser.error(f"--text must have more than {options.length + WINDOW} bytes")
        layers = trained(text, options.length, options.steps, np.random.default_rng(options.seed))
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
