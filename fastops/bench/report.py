# SPDX-License-Identifier: BSD-3-Clause
"""What a benchmark run is shown as: table, TSV, JSON like pytest-benchmark's, HTML report, the README's picture."""

from __future__ import annotations

import io
import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import numpy as np

from fastops.bench.runner import NOISE_LIMIT, Group, Measurement, Run, ratio_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ratios of an earlier run by (group, row).
Old = dict[tuple[str, str], float]

COLUMNS = ("operation", "implementation", "time", "IQR", "rate", "x exact", "x reference", "error", "verdict")
# Placed in the SVG text by matplotlib, replaced by the page's own colour.
_INK = "#010203"
_FAMILY_COLOURS = {
    "native": "#2a7fbf",
    "numba": "#3f9e5a",
    "reference": "#c0504d",
    "NumPy": "#8a8a8a",
    "other": "#b8860b",
}


@dataclass(frozen=True)
class Line:
    """One row of the table, as text, with what colours it."""

    group: str
    first: bool
    cells: tuple[str, ...]
    verdict: str
    yardstick: bool


def seconds_text(seconds: float) -> str:
    """Three digits with a unit: 1.23 ms."""
    for limit, factor, unit in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def rate_text(rate: float) -> str:
    """A rate in G, M or k units a second."""
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate >= limit:
            return f"{rate / limit:.3g} {prefix}/s"
    return f"{rate:.3g} /s"


def _error_text(error: float | None) -> str:
    if error is None:
        return ""
    return "same bits" if error == 0 else f"{error:.1e}"


def read_old(path: str) -> Old:
    """Ratios of a file that `--json` wrote.

    Raises
    ------
    ValueError
        The file is not such a file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
        ratios = {}
        for bench in document["benchmarks"]:
            ratio = bench["extra_info"].get("ratio_to_yardstick")
            if ratio is not None:
                ratios[bench["group"], bench["param"]] = float(ratio)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"--compare: {path!r} is not JSON of 'fastops bench' ({type(problem).__name__})") from None
    return ratios


def lines(run: Run, old: Old | None = None) -> Iterator[Line]:
    """The table's rows."""
    for group in run.groups:
        for index, m in enumerate(group.measurements):
            verdict = group.verdict(m)
            cells = [group.case.group, m.row.name]
            if m.seconds:
                low, high = m.quartiles
                cells += [seconds_text(m.median * m.scale), f"{(high - low) / m.median:.1%}"]
                cells += [rate_text(m.rate), ratio_text(group.ratio(m, group.yardstick))]
                cells += [ratio_text(group.ratio(m, group.reference)), _error_text(m.error)]
            else:
                cells += [""] * 6
            cells.append(verdict)
            if old is not None:
                cells.append(_change(group, m, old))
            yield Line(group.case.group, index == 0, tuple(cells), verdict, m is group.yardstick)


def _change(group: Group, measurement: Measurement, old: Old) -> str:
    """The ratio's change since an earlier run; absolute times of two runs say nothing on a shared machine."""
    ratio, before = group.ratio(measurement, group.yardstick), old.get((group.case.group, measurement.row.name))
    if ratio is None or before is None or measurement is group.yardstick:
        return ""
    if group.noisy:
        return "noise too high"
    return f"{ratio / before - 1:+.1%}"


def columns(old: Old | None) -> tuple[str, ...]:
    """The table's header."""
    return COLUMNS if old is None else (*COLUMNS, "ratio since")


def summary(run: Run) -> str:
    """One line: machine, levels, threads, versions."""
    machine = run.machine
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    levels = ", ".join(machine["targets"]) or "none"
    return (
        f"{machine['cpu']}, {machine['cpus']} CPUs; native levels: {levels}; threads: {machine['threads']}; "
        f"Python {machine['python_version']}; {libraries}"
    )


LEGEND = (
    "Rates: elements or multiply-adds a second. Ratios: a row's rate over the yardstick's (x exact) and over plain "
    "NumPy's (x reference), above 1 is faster. Error: relative, against the oracle."
)


def print_tsv(run: Run, out: TextIO, old: Old | None = None) -> None:
    """Tab-separated values with plain numbers, in seconds and units a second; one header line."""
    names = ("operation", "implementation", "seconds", "iqr", "rate", "x_exact", "x_reference", "error", "noise")
    out.write("\t".join([*names, "verdict", *(["ratio_since"] if old is not None else [])]) + "\n")
    for group in run.groups:
        for m in group.measurements:
            numbers: list[float | None] = [None] * 6
            if m.seconds:
                scale, (low, high) = m.scale, m.quartiles
                ratios = group.ratio(m, group.yardstick), group.ratio(m, group.reference)
                numbers = [m.median * scale, (high - low) * scale, m.rate, *ratios, m.error]
            texts = ["" if number is None else f"{number:.4g}" for number in [*numbers, group.noise]]
            cells = [group.case.group, m.row.name, *texts, group.verdict(m)]
            if old is not None:
                cells.append(_change(group, m, old))
            out.write("\t".join(" ".join(cell.split()) for cell in cells) + "\n")


def print_table(run: Run, out: TextIO, old: Old | None = None) -> None:
    """A table for a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=out, highlight=False)
    names = list(columns(old)[1:])
    # The columns that a narrow terminal has no room for; the other forms have them.
    hidden = {"error"} if console.width < 100 else set()
    table = Table(title="fastops bench", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in names:
        if name == "implementation":
            table.add_column(name, min_width=24)
        elif name not in hidden:
            justify: Literal["left", "right"] = "left" if name == "verdict" else "right"
            table.add_column(
                name.replace("reference", "ref."), justify=justify, no_wrap=name in ("time", "IQR", "rate")
            )
    colours = {"faster": "green", "slower": "yellow", "WrongResult": "bold red"}
    for line in lines(run, old):
        if line.first:
            table.add_section()
            table.add_row(Text(line.group, style="bold"))
        cells = [Text(cell) for name, cell in zip(names, line.cells[1:], strict=True) if name not in hidden]
        cells[0].pad_left(2)
        cells[-1 if old is None else -2].stylize(next((c for word, c in colours.items() if word in line.verdict), ""))
        table.add_row(*cells, style="dim" if line.yardstick else "")
    console.print(table)
    console.print(LEGEND)
    console.print(summary(run))


def to_json(run: Run) -> dict[str, Any]:
    """A document in the form of pytest-benchmark's --benchmark-json, which its `compare` reads."""
    machine = {key: value for key, value in run.machine.items() if key not in ("fastops_config", "libraries")}
    machine |= {"node": "", "processor": run.machine["machine"], "libraries": run.machine["libraries"]}
    benchmarks = [_benchmark(group, m) for group in run.groups for m in group.measurements if m.seconds]
    return {
        "machine_info": machine,
        "commit_info": {"id": f"fastops {run.machine['libraries'].get('fastops', '')}", "dirty": False},
        "benchmarks": benchmarks,
        "datetime": run.started,
        "version": run.machine["libraries"].get("fastops", ""),
        "fastops": {
            "config": run.machine["fastops_config"],
            "seconds": run.seconds,
            "notes": run.notes,
            "failed": [
                {"group": g.case.group, "param": m.row.name, "reason": m.failed}
                for g in run.groups
                for m in g.measurements
                if m.failed
            ],
        },
    }


def _benchmark(group: Group, m: Measurement) -> dict[str, Any]:
    name = f"{group.case.op}[{m.row.name}]"
    yardstick, reference = group.yardstick, group.reference
    return {
        "group": group.case.group,
        "name": f"{group.case.group}[{m.row.name}]",
        "fullname": f"fastops/bench/{group.case.family}.py::{group.case.group}::{name}",
        "params": {"implementation": m.row.name, "dtype": group.case.dtype, "size": group.case.size},
        "param": m.row.name,
        "extra_info": {
            "ratio_to_yardstick": group.ratio(m, yardstick),
            "yardstick": yardstick.row.name if yardstick else None,
            "ratio_to_reference": group.ratio(m, reference),
            "verdict": group.verdict(m),
            "noise": group.noise,
            "error": m.error,
            "memory": None if m.memory is None else m.memory * m.scale,
            "rate": m.rate,
            "unit": group.case.unit,
            "work": m.whole,
            "note": m.note,
            "backend": m.row.backend,
            "target": m.row.target,
            "threads": m.row.threads,
        },
        "options": {"disable_gc": True, "timer": "perf_counter_ns", "min_rounds": 3, "warmup": True},
        "stats": _stats([seconds * m.scale for seconds in m.seconds], m.calls),
    }


def _stats(seconds: Sequence[float], calls: int) -> dict[str, Any]:
    q1, q3 = (float(value) for value in np.percentile(seconds, [25, 75]))
    mean, median = statistics.fmean(seconds), statistics.median(seconds)
    deviation = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    inside = [value for value in seconds if low <= value <= high]
    beyond = sum(abs(value - mean) > deviation for value in seconds)
    return {
        "min": min(seconds),
        "max": max(seconds),
        "mean": mean,
        "stddev": deviation,
        "rounds": len(seconds),
        "median": median,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": len(seconds) - len(inside),
        "stddev_outliers": beyond,
        "outliers": f"{beyond};{len(seconds) - len(inside)}",
        "ld15iqr": min(inside),
        "hd15iqr": max(inside),
        "ops": 1 / mean,
        "total": sum(seconds),
        "data": list(seconds),
        "iterations": calls,
    }


# Plots.


def _figure(width: float, height: float) -> Figure:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.use("Agg")
    return Figure(figsize=(width, height), layout="constrained")


def _colour(name: str) -> str:
    for prefix, colour in _FAMILY_COLOURS.items():
        if name.startswith(prefix):
            return colour
    return _FAMILY_COLOURS["other"]


def _ink(axes: Axes) -> None:
    """Text and lines in the page's ink, so that a dark page reads as well as a light one."""
    axes.tick_params(colors=_INK, which="both")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.title.set_color(_INK)
    axes.patch.set_alpha(0)


def _svg(figure: Figure, salt: str, ink: str = "currentColor", background: str = "none") -> str:
    """The figure as an inline <svg>: text stays text, no date, ids that do not clash between figures."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(
            buffer, format="svg", facecolor=background, bbox_inches="tight", metadata={"Date": None, "Creator": None}
        )
    text = buffer.getvalue()
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{salt}-", text[text.index("<svg") :])
    return text.replace(_INK, ink)


def _ratios(axes: Axes, named: Sequence[tuple[str, float, str, str]], label: str) -> None:
    """Horizontal bars from 1 on a logarithmic axis: (name, ratio, colour, text)."""
    places = range(len(named))
    ratios = [ratio for _, ratio, _, _ in named]
    axes.barh(places, [r - 1 for r in ratios], left=1, color=[c for _, _, c, _ in named], height=0.7)
    axes.set_xscale("log")
    low, high = min([*ratios, 0.5]), max([*ratios, 2.0])
    spread = math.log10(high / low)
    axes.set_xlim(low / 10 ** (0.03 * spread), high * 10 ** (0.25 * spread))
    axes.axvline(1, color=_INK, linewidth=0.8)
    for place, (_, ratio, _, text) in zip(places, named, strict=True):
        axes.annotate(
            text,
            (max(ratio, 1), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_INK,
        )
    axes.set_yticks(list(places), [name for name, _, _, _ in named], fontsize=8)
    axes.set_ylim(len(named) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}x")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    _ink(axes)


def _group_plot(group: Group, index: int) -> str:
    named = []
    for m in group.measurements:
        ratio = group.ratio(m, group.yardstick)
        if ratio is not None:
            text = f"{ratio_text(ratio)}x, {rate_text(m.rate)}"
            named.append((m.row.name, ratio, _colour(m.row.name), text))
    if not named or group.yardstick is None:
        return ""
    figure = _figure(7.2, 0.55 + 0.26 * len(named))
    _ratios(figure.add_subplot(), named, f"rate over that of {group.yardstick.row.name}")
    return _svg(figure, f"g{index}")


def _size_plots(run: Run) -> list[dict[str, str]]:
    """Rate over size for each operation that was timed at three sizes or more; time and memory where that was measured."""
    series: dict[tuple[str, str], list[Group]] = {}
    plots: list[dict[str, str]] = []
    for name, groups in _lengths(run).items():
        figure = _figure(7.2, 3.6)
        _length_plot(figure, groups, run.machine["targets"], _INK)
        plots.append({"title": f"{name}: time and memory over the length", "svg": _svg(figure, f"s{len(plots)}")})
    for group in run.groups:
        if not _measures_memory(group):
            series.setdefault((group.case.op, group.case.dtype), []).append(group)
    for (op, dtype), groups in series.items():
        if len(groups) < 3:
            continue
        figure = _figure(7.2, 3.4)
        axes = figure.add_subplot()
        names = dict.fromkeys(m.row.name for group in groups for m in group.measurements if m.seconds)
        for number, name in enumerate(names):
            rows = [(g.case.shape[0], m) for g in groups for m in g.measurements if m.row.name == name]
            points = [(size, m.rate) for size, m in rows if m.seconds]
            style = ("-", "--", ":", "-.")[number % 4]
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=_colour(name), label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("n", fontsize=8)
        axes.set_ylabel(f"{groups[0].case.unit}s a second", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(color="#888888", alpha=0.3, linewidth=0.5)
        axes.legend(fontsize=7, frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
        _ink(axes)
        plots.append({"title": f"{op} {dtype}: rate over size", "svg": _svg(figure, f"s{len(plots)}")})
    return plots


def _measures_memory(group: Group) -> bool:
    return any(m.memory is not None for m in group.measurements)


def _lengths(run: Run) -> dict[str, list[Group]]:
    """Groups that differ in the length alone, three or more, by operation; lengths come first in the shapes of such cases."""
    series: dict[tuple[Any, ...], list[Group]] = {}
    for group in run.groups:
        if _measures_memory(group):
            case = group.case
            series.setdefault((case.op, case.dtype, case.shape[1:]), []).append(group)
    found = {}
    for (op, dtype, _), groups in series.items():
        if len(groups) >= 3:
            found[f"{op} {dtype}"] = sorted(groups, key=lambda group: group.case.shape[0])
    return found


def _length_plot(figure: Figure, groups: Sequence[Group], targets: Sequence[str], ink: str) -> None:
    """Time and memory over the length: what users choose between, on one thread, of our levels the best."""
    names = [
        m.row.name
        for m in groups[0].measurements
        if m.row.threads == 1 and m.row.name != "reference" and m.row.target in ("", *targets[:1])
    ]
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(names):
        rows = [(g.case.shape[0], m) for g in groups for m in g.measurements if m.row.name == name and m.seconds]
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3], "label": name}
        for axes, points in (
            (left, [(n, m.median * m.scale) for n, m in rows]),
            (right, [(n, m.memory * m.scale / 2**20) for n, m in rows if m.memory]),
        ):
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)
    for axes, label in ((left, "seconds"), (right, "MiB that a call takes, its result included")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([g.case.shape[0] for g in groups], [f"{g.case.shape[0]:,}" for g in groups])
        axes.set_xlabel("length N", fontsize=8)
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(color="#888888", alpha=0.3, linewidth=0.5)
        _ink(axes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, frameon=False, labelcolor=ink, loc="outside lower center", ncols=3)


def lengths(run: Run) -> str:
    """Time and memory over the length as a picture, of the first operation that was timed at three lengths."""
    found = _lengths(run)
    if not found:
        raise ValueError("--lengths: no operation was timed at three lengths")
    name, groups = next(iter(found.items()))
    figure = _figure(8.4, 4.2)
    _length_plot(figure, groups, run.machine["targets"], _INK)
    _, batch, heads, width = groups[0].case.shape
    title = f"{name}: batch {batch}, {heads} heads of {width}, one thread of {run.machine['cpu']}"
    figure.suptitle(title, fontsize=10, color=_INK)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + _svg(figure, "l", ink="#222222", background="#ffffff")


def html(run: Run, old: Old | None = None) -> str:
    """The report as one self-contained page."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    groups = []
    rows = list(lines(run, old))
    for index, group in enumerate(run.groups):
        groups.append(
            {
                "name": group.case.group,
                "noise": "" if group.noise is None else f"{group.noise:.1%}",
                "noisy": group.noisy,
                "rows": [line for line in rows if line.group == group.case.group],
                "notes": [f"{m.row.name}: {m.note}" for m in group.measurements if m.note],
                # Made by matplotlib from numbers and the names of this package, which it escapes.
                "plot": Markup(_group_plot(group, index)),
            }
        )
    return environment.get_template("report.html.j2").render(
        columns=columns(old)[1:],
        groups=groups,
        size_plots=[{"title": p["title"], "svg": Markup(p["svg"])} for p in _size_plots(run)],
        machine=run.machine,
        notes=run.notes,
        started=run.started,
        seconds=f"{run.seconds:.0f}",
        legend=LEGEND,
        limit=f"{NOISE_LIMIT:.0%}",
    )


def _best(run: Run, group: Group) -> Measurement | None:
    """Our row: the best level on one thread, Numba without one."""
    named = {m.row.name: m for m in group.measurements if m.seconds}
    ours = [*(f"native {target}" for target in run.machine["targets"]), "numba"]
    return next((named[name] for name in ours if name in named), None)


def markdown(run: Run) -> str:
    """The README's table: each level's rate over the yardstick's, and ours over the other ways on as many threads."""
    targets = run.machine["targets"]
    kept = [(group, best) for group in run.groups if (best := _best(run, group)) is not None]
    several = {group.case.group: _of_several(group) for group, _ in kept}
    threads = max((m.row.threads for m in several.values() if m), default=1)
    columns = [*targets, *([f"{targets[0]}, {threads} threads"] if threads > 1 else [])]
    heads = ["operation", "yardstick", *columns, "reference", "Numba", "others"]
    rows = [heads, ["---", "---", *["---:"] * (len(columns) + 2), "---"]]
    for group, best in kept:
        named = {m.row.name: m for m in group.measurements if m.seconds}
        many = several[group.case.group]
        mark = "~" if group.noisy else ""

        def over(ours: Measurement | None, other: Measurement | None, mark: str = mark, group: Group = group) -> str:
            return mark + ratio_text(group.ratio(ours, other)) if ours and other else ""

        shown = [named.get(f"native {target}") for target in targets] + [many] * (threads > 1)
        base = group.yardstick.row.name if group.yardstick else ""
        # The same call by the way of a framework has no column.
        others = [
            f"{name.removeprefix(best.row.name + ', ')}: {over(many if many and m.row.threads > 1 else best, m)}"
            for name, m in named.items()
            if name not in ("reference", "numba", base) and (not name.startswith("native") or ", fastops." in name)
        ]
        cells = [group.case.group, base, *(over(m, group.yardstick) for m in shown)]
        cells += [over(best, named.get("reference")), over(best, named.get("numba")), "; ".join(others)]
        rows.append(cells)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _of_several(group: Group) -> Measurement | None:
    """Our fastest row of several threads."""
    ours = [m for m in group.measurements if m.seconds and m.row.name.startswith("native") and m.row.threads > 1]
    return max(ours, key=lambda m: m.rate, default=None)


def picture(run: Run) -> str:
    """The README's picture: how many times faster our best row is than each other way of doing the same in Python."""
    named = []
    for group in run.groups:
        best = _best(run, group)
        if best is None:
            continue
        for m in group.measurements:
            # "matmul" rows are ours too: the yardsticks of convolution and gradient.
            other = m is not best and m.row.backend != "native" and m.row.recipe != "matmul"
            if other and m.seconds and m.row.threads == 1:
                ratio = best.rate / m.rate
                name = f"{group.case.op} {group.case.dtype} {group.case.size} / {m.row.name}"
                named.append((name, ratio, _colour(m.row.name), f"{'~' if group.noisy else ''}{ratio_text(ratio)}x"))
    if not named:
        raise ValueError("--picture: no group has a row of ours to compare")
    figure = _figure(8.4, 1.0 + 0.2 * len(named))
    axes = figure.add_subplot()
    noisy = (
        f"; ~ where two equal runs differed by more than {NOISE_LIMIT:.0%}" if any("~" in n[3] for n in named) else ""
    )
    _ratios(axes, named, f"times as fast as the row, one thread each{noisy}")
    axes.set_title(f"fastops on {run.machine['cpu']}", fontsize=10)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + _svg(figure, "p", ink="#222222", background="#ffffff")
