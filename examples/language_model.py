# SPDX-License-Identifier: BSD-3-Clause
"""A small language model in torch, with fastops' linear attention, AdamW and averaged weights, trained on a real text.

The model reads and predicts bytes. Its attention costs as much a byte in a long text as in a short one; every head forgets at a rate
of its own. `fastops.torch.AdamW` moves the weights and their average in one pass; the program prints, along training, the bits a byte
that the raw and the averaged weights need for a part of the text that is held out, then continues a line of it byte by byte, from a
state that does not grow. --plot draws the curves.

    python language_model.py --steps 300 --plot curve.svg book.txt

Without a file the text is the source of Python's own standard library. Needs torch, and matplotlib for --plot.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastops.torch as ft

# Logarithms of what a head remembers from byte to byte: about 2, 8, 50 and all.
DECAY = (-0.5, -0.125, -0.02, 0.0)
HELD_OUT = 16


@dataclass
class History:
    """Bits a byte of the part that is held out."""

    steps: list[int] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)
    average: list[float] = field(default_factory=list)


class Block(nn.Module):
    """Attention and a feed-forward network, each on normalised rows and added to them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = ft.LinearAttention(width, len(DECAY), causal=True, decay=DECAY)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.network(self.between(x))

    def step(self, x: Tensor, state: Any) -> Tensor:
        x = x + self.attention.step(self.before(x), state)
        return x + self.network(self.between(x))


class LanguageModel(nn.Module):
    """Logits of the next byte for each byte."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embedding.weight.t()

    @torch.no_grad()
    def continued(self, text: bytes, count: int, generator: torch.Generator) -> bytes:
        """`count` bytes more, drawn one by one, each at the cost of the first."""
        states = [block.attention.new_state(1) for block in self.blocks]
        written = list(text)
        for i in range(len(text) + count - 1):
            x = self.embedding(torch.tensor([written[i]]))
            for block, state in zip(self.blocks, states, strict=True):
                x = block.step(x, state)
            if i + 1 >= len(text):
                chances = torch.softmax(self.norm(x) @ self.embedding.weight.t() / 0.7, -1)
                written.append(int(torch.multinomial(chances, 1, generator=generator)))
        return bytes(written[len(text) :])


def standard_library(size: int) -> bytes:
    """The first bytes of the standard library's modules, one after the other."""
    text = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return text[:size]


def windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """(len(starts), length + 1) bytes: an input and, one further, what it should give."""
    return text[starts[:, None] + torch.arange(length + 1)]


def bits(model: nn.Module, batch: Tensor) -> Tensor:
    """Bits a byte of the last half of each window, where there is something to look back at."""
    logits = model(batch[:, :-1])
    half = logits.shape[1] // 2
    return nn.functional.cross_entropy(logits[:, half:].flatten(0, 1), batch[:, half + 1 :].flatten()) / math.log(2)


def train(model: LanguageModel, text: Tensor, arguments: argparse.Namespace) -> tuple[History, ft.AdamW]:
    """Trains on the first 9 tenths of the text and prints a table."""
    split = len(text) * 9 // 10
    generator = torch.Generator().manual_seed(arguments.seed)
    places = torch.linspace(split, len(text) - arguments.length - 1, HELD_OUT).long()
    held_out = windows(text, places, arguments.length)
    optimizer = ft.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.99), ema_decay=0.96)
    history, begun = History(), time.perf_counter()
    print(f"{'step':>6} {'raw':>8} {'average':>8} {'seconds':>8}")
    for step in range(1, arguments.steps + 1):
        starts = torch.randint(0, split - arguments.length - 1, (arguments.batch,), generator=generator)
        loss = bits(model, windows(text, starts, arguments.length))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, arguments.steps // 10) == 0 or step == arguments.steps:
            with torch.no_grad():
                raw = float(bits(model, held_out))
                with optimizer.average_parameters():
                    average = float(bits(model, held_out))
            history.steps.append(step)
            history.raw.append(raw)
            history.average.append(average)
            print(f"{step:6} {raw:8.3f} {average:8.3f} {time.perf_counter() - begun:8.1f}", flush=True)
    return history, optimizer


def plot(history: History, path: str) -> None:
    """Draw both curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(history.steps, history.raw, "o-", label="raw weights", color="tab:gray")
    axes.plot(history.steps, history.average, "o-", label="averaged weights", color="tab:blue")
    axes.set_xlabel("steps")
    axes.set_ylabel("bits a byte, held out")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", nargs="?", type=Path, help="a text to learn (default: Python's standard library)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="bytes of a window")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE")
    arguments = parser.parse_args()
    raw = standard_library(1 << 20) if arguments.text is None else arguments.text.read_bytes()
    if len(raw) < 20 * arguments.length:
        parser.error(f"text must be of at least {20 * arguments.length} bytes, got {len(raw)}")
    torch.manual_seed(arguments.seed)
    text = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
    model = LanguageModel(arguments.width, arguments.depth)
    history, optimizer = train(model, text, arguments)
    beginning = raw[len(raw) * 9 // 10 :][:64]
    with optimizer.average_parameters():
        written = model.continued(beginning, 96, torch.Generator().manual_seed(arguments.seed))
    print("given:    ", repr(beginning.decode(errors="replace")))
    print("continued:", repr(written.decode(errors="replace")))
    if arguments.plot:
        plot(history, arguments.plot)


if __name__ == "__main__":
    main()
