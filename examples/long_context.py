# SPDX-License-Identifier: BSD-3-Clause
"""Time and memory of linear against softmax attention over a real long text.

Each byte of the text becomes a vector, with its place in the text mixed in by rotations; random matrices make queries, keys and values of
some heads from it, and both kinds of causal attention run over ever longer pieces. The program prints seconds, the memory beyond the
arguments, and how far the results of the two differ; --plot draws time and memory.

    python long_context.py --plot attention.svg book.txt

Without a file the text is the source of Python's own standard library. Needs matplotlib for --plot.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import fastops

Array = npt.NDArray[Any]

HEADS, WIDTH = 4, 64
# Softmax attention is not run where it would take longer than this.
PATIENCE = 20.0


@dataclass
class Measured:
    """One call: seconds, and MiB of memory at its peak (nan where the system does not say)."""

    length: int
    seconds: float
    mebibytes: float


def standard_library(size: int) -> bytes:
    """The first bytes of the standard library's modules, one after the other."""
    text = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return text[:size]


def embed(text: bytes, rng: np.random.Generator) -> Array:
    """(N, WIDTH) float32: a random vector for each byte, its pairs of numbers turned by angles that grow with the place."""
    table = rng.standard_normal((256, WIDTH // 2, 2), np.float32)
    x = table[np.frombuffer(text, np.uint8)]
    angle = np.arange(len(text))[:, np.newaxis] * 10_000.0 ** (-np.arange(WIDTH // 2) / (WIDTH // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b = x[..., 0], x[..., 1]
    turned = np.stack([cos * a - sin * b, sin * a + cos * b], axis=-1)
    return turned.reshape(len(text), WIDTH)


def heads_of(x: Array, rng: np.random.Generator) -> list[Array]:
    """Queries, keys and values, (HEADS, N, WIDTH) each, by random matrices."""
    matrices = rng.standard_normal((3, HEADS, WIDTH, WIDTH), np.float32) * np.float32(WIDTH**-0.5)
    return [np.matmul(x, matrix) for matrix in matrices]


def resident(name: str) -> float:
    """MiB of this process: now ("VmRSS") or at most since the last reset ("VmHWM"); nan where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return float("nan")


def measure(call: Callable[[], Array], length: int) -> tuple[Measured, Array]:
    """Time and memory of a call, and what it gives."""
    try:
        # The peak starts anew.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        known = True
    except OSError:
        known = False
    before = resident("VmRSS")
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    memory = resident("VmHWM") - before if known else float("nan")
    return Measured(length, seconds, max(memory, 0.0)), result


def plot(found: dict[str, list[Measured]], path: str) -> None:
    """Draw time and memory over the length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, points in found.items():
        lengths = [p.length for p in points]
        left.plot(lengths, [p.seconds for p in points], "o-", label=name)
        right.plot(lengths, [p.mebibytes for p in points], "o-", label=name)
    for axes, label in ((left, "seconds"), (right, "MiB beyond the arguments")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("bytes of text")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    left.legend()
    figure.savefig(path)


def run(text: bytes, seed: int, shortest: int) -> dict[str, list[Measured]]:
    """Print the table's rows; the measurements by kind of attention."""
    rng = np.random.default_rng(seed)
    q, k, v = heads_of(embed(text, rng), rng)
    found: dict[str, list[Measured]] = {"linear": [], "softmax": []}
    # Pools and compiled loops are made at first calls.
    warm = [x[:, :64] for x in (q, k, v)]
    fastops.linear_attention(*warm, causal=True)
    fastops.softmax_attention(*warm, causal=True)
    lengths = [shortest << i for i in range(32) if shortest << i < len(text)]
    for n in [*lengths, len(text)]:
        part = [x[:, :n] for x in (q, k, v)]
        one, near = measure(lambda part=part: fastops.linear_attention(*part, causal=True), n)  # type: ignore[misc]
        found["linear"].append(one)
        cells = [f"{n:>8}{one.seconds * 1e3:>10.1f}{one.mebibytes:>9.1f}"]
        last = found["softmax"][-1] if found["softmax"] else Measured(n, 0.0, 0.0)
        if last.seconds * (n / last.length) ** 2 < PATIENCE:
            two, exact = measure(lambda part=part: fastops.softmax_attention(*part, causal=True), n)  # type: ignore[misc]
            found["softmax"].append(two)
            apart = float(np.linalg.norm(near - exact) / np.linalg.norm(exact))
            cells.append(
                f"{two.seconds * 1e3:>11.1f}{two.mebibytes:>8.1f}{two.seconds / one.seconds:>8.1f}{apart:>9.2f}"
            )
        print("".join(cells), flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    """Read, run, print; the table goes to stdout."""
    parser = argparse.ArgumentParser(description="Linear and softmax attention over the bytes of a text.")
    parser.add_argument("text", nargs="?", help="a file (default: the source of the standard library)")
    parser.add_argument("--length", type=int, default=65536, help="bytes of it at most (default: 65536)")
    parser.add_argument("--shortest", type=int, default=1024, help="where to begin (default: 1024)")
    parser.add_argument("--seed", type=int, default=0, help="of the vectors and matrices (default: 0)")
    parser.add_argument("--plot", metavar="FILE", help="draw time and memory to an SVG or PNG file")
    options = parser.parse_args(argv)
    if options.length < 64 or options.shortest < 1:
        parser.error("--length must be at least 64, --shortest at least 1")
    if options.text and not os.path.isfile(options.text):
        parser.error(f"no file {options.text!r}")
    if options.text:
        with open(options.text, "rb") as file:
            text = file.read(options.length)
    else:
        text = standard_library(options.length)
    if len(text) < 64:
        parser.error("the text is shorter than 64 bytes")
    print(
        f"{len(text)} bytes, {HEADS} heads of {WIDTH}; ms, MiB beyond the arguments, distance of the results over their size"
    )
    print("   bytes linear ms      MiB softmax ms     MiB  faster    apart")
    found = run(text, options.seed, options.shortest)
    if options.plot:
        plot(found, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
