# SPDX-License-Identifier: BSD-3-Clause
"""The picture of a count: frequency against rank, both logarithmic, beside Zipf's law."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

# Points that are drawn: more do not show.
_POINTS = 2000
_INK = "#333333"
_COLOUR = "#2a7fbf"


def picture(counts: Sequence[int] | np.ndarray[Any, Any], words: Sequence[str], kind: str) -> bytes:
    """The counts, largest first, drawn as a PNG or SVG; `words` are those of the first ranks, some of which are named."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.use("Agg")
    numbers = np.asarray(counts, dtype=float)
    total = float(numbers.sum())
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"{len(numbers):,} words, {total:,.0f} occurrences", fontsize=10, color=_INK)
    axes.set_xlabel("rank", color=_INK)
    axes.set_ylabel("occurrences", color=_INK)
    axes.set_xscale("log")
    axes.set_yscale("log")
    if len(numbers):
        ranks = np.unique(np.geomspace(1, len(numbers), _POINTS).round().astype(np.int64))
        # Zipf, 1935: the count falls as one over the rank; the line holds as many occurrences.
        harmonic = np.log(len(numbers)) + np.euler_gamma if len(numbers) > 1 else 1.0
        zipf = np.maximum(total / harmonic / ranks, 0.5)
        axes.plot(ranks, zipf, "--", color="#8a8a8a", linewidth=1, label="one over the rank")
        axes.plot(ranks, numbers[ranks - 1], "-", color=_COLOUR, linewidth=1.6, label="counted")
        named = [rank for rank in (1, 3, 10, 30, 100, 300, 1000) if rank <= min(len(words), len(numbers))]
        for rank in named:
            axes.plot([rank], [numbers[rank - 1]], "o", color=_COLOUR, markersize=3.5)
            # "$" begins mathematics in matplotlib.
            text = words[rank - 1].replace("$", r"\$")
            axes.annotate(
                text if len(text) <= 20 else text[:17] + "...",
                (rank, numbers[rank - 1]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
                color=_INK,
            )
        axes.legend(fontsize=8, frameon=False, labelcolor=_INK)
    axes.grid(color="#888888", alpha=0.3, linewidth=0.5)
    axes.tick_params(colors=_INK, which="both")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _drawn(figure, kind)


def _drawn(figure: Any, kind: str) -> bytes:
    import warnings

    import matplotlib as mpl

    buffer = io.BytesIO()
    dates = {"Date": None, "Creator": None} if kind == ".svg" else {"Software": None}
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastops"}), warnings.catch_warnings():
        # Letters that the font has not are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format=kind[1:], dpi=144, metadata=dates)
    return buffer.getvalue()
