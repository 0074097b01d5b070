# SPDX-License-Identifier: BSD-3-Clause
"""Benchmark cases of moving averages and optimizer steps over the tensors of real models, many small ones and one large one."""

from __future__ import annotations

import importlib
import importlib.util
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fastops.bench.case import Case, Implementation, Machine, Task, WrongResult

Array = npt.NDArray[Any]
Shapes = list[tuple[int, ...]]
Lists = dict[str, list[Array]]

REFERENCE = "reference"
NUMPY = "NumPy in place"
# A row slower than the others is timed on a part of the tensors, and its rate compared.
_PART, _PART_TENSORS = 5_000_000, 500
_LR, _DECAY, _MOMENTUM, _BETAS, _ALPHA, _EG_LR = 1e-4, 0.999, 0.9, (0.999, 0.9999), 0.5, 1e-6
_ACCUMULATE = 4
_TABLE, _LIVE = (30522, 768), 2000


def _resnet50() -> Shapes:
    """Its 161 parameter tensors (He et al. 2015), in the order of torchvision's module."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, (shape[0],), (shape[0],)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def _bert_base() -> Shapes:
    """Its 199 parameter tensors (Devlin et al. 2018)."""
    width, inner = 768, 3072
    layer: Shapes = [*[(width, width), (width,)] * 4, (width,), (width,)]
    layer += [(inner, width), (inner,), (width, inner), (width,), (width,), (width,)]
    return [_TABLE, (512, width), (2, width), (width,), (width,), *layer * 12, (width, width), (width,)]


_SETS: dict[str, Callable[[], Shapes]] = {
    "ResNet-50": _resnet50,
    "BERT-base": _bert_base,
    "5000x256": lambda: [(256,)] * 5000,
    "flat 2.6e7": lambda: [(25_557_032,)],
    "flat 1e8": lambda: [(100_000_000,)],
    "2000 of 30522x768": lambda: [_TABLE],
}
_YARDSTICKS = ("torch", NUMPY, REFERENCE)


def _case(op: str, dtype: str, size: str, quick: bool = False) -> Case:
    shapes = _SETS[size]()
    elements = sum(map(_size, shapes)) if op != "lazy rows" else _LIVE * _TABLE[1]
    return Case("optim", op, dtype, size, (len(shapes), elements), "element", quick, _YARDSTICKS)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def cases() -> list[Case]:
    """Every case of the family, in the order of the table."""
    return [
        _case("ema", "float32", "ResNet-50", quick=True),
        _case("ema", "float32", "5000x256", quick=True),
        _case("ema", "float32", "flat 2.6e7"),
        _case("ema", "float32", "flat 1e8"),
        _case("ema", "float32", "BERT-base"),
        _case("ema of bfloat16", "float32", "ResNet-50"),
        _case("ema of bfloat16", "float32", "BERT-base"),
        _case("ema stochastic", "bfloat16", "ResNet-50"),
        _case("ema 2 profiles", "float32", "ResNet-50"),
        _case("adamw", "float32", "ResNet-50"),
        _case("adamw + ema", "float32", "ResNet-50"),
        _case("adamw + ema", "float32", "5000x256", quick=True),
        _case("adamw + ema", "float32", "flat 2.6e7"),
        _case("adamw + ema + zero_grad", "float32", "ResNet-50"),
        _case("sgd", "float32", "ResNet-50"),
        _case("sgd + ema", "float32", "ResNet-50"),
        _case("sgd accumulate 4", "float32", "ResNet-50"),
        _case("lookahead", "float32", "ResNet-50"),
        _case("eg", "float32", "ResNet-50"),
        _case("lazy rows", "float32", "2000 of 30522x768"),
    ]


def implementations(case: Case, machine: Machine) -> list[Implementation]:
    """Rows of a case on a machine: the peers first, the native levels last."""
    if "bfloat16" in case.group and "ml_dtypes" not in machine.modules:
        return []
    many = machine.threads
    rows: list[Implementation] = []

    if "torch" in machine.modules and case.op != "ema stochastic":
        rows.append(Implementation(f"torch {_TORCH[case.op]}{_threads(many)}", "torch", threads=many))
    plain = case.op in ("ema", "ema of bfloat16", "ema stochastic")
    if "timm" in machine.modules and plain:
        rows.append(Implementation(f"timm ModelEmaV3{_threads(many)}", "timm", threads=many))
    if "torch_ema" in machine.modules and case.op == "ema":
        rows.append(Implementation(f"torch_ema{_threads(many)}", "torch_ema", threads=many))
    if case.op == "ema" and case.size.startswith("flat") and "torch" in machine.modules:
        rows.append(Implementation(f"STREAM triad (torch.add){_threads(many)}", "triad", threads=many))
    if case.op != "ema stochastic":
        rows.append(Implementation(NUMPY, "numpy"))
    rows.append(Implementation(REFERENCE, "fastops"))
    if "numba" in machine.backends and case.size != "flat 1e8":
        rows.append(Implementation("numba", "fastops", "numba"))
    rows += [Implementation(f"native {target}", "fastops", "native", target) for target in reversed(machine.targets)]
    if machine.backends[0] == "native":
        best = machine.targets[0]
        name = f"native {best}"
        if many > 1:
            rows.append(Implementation(f"{name}, {many} threads", "fastops", "native", best, many))
        if case.op != "lazy rows":
            rows.append(Implementation(f"{name}, TensorList{_threads(many)}", "plan", "native", best, many))
    return rows


def _threads(many: int) -> str:
    return f", {many} threads" if many > 1 else ""


# What torch offers for each operation, in the fastest spelling found.
_TORCH = {
    "ema": "foreach lerp_",
    "ema of bfloat16": "foreach lerp_ of float()",
    "ema 2 profiles": "foreach lerp_ twice",
    "adamw": "fused AdamW",
    "adamw + ema": "fused AdamW, foreach lerp_",
    "adamw + ema + zero_grad": "fused AdamW, foreach lerp_ and zero_",
    "sgd": "fused SGD",
    "sgd + ema": "fused SGD, foreach lerp_",
    "sgd accumulate 4": "foreach add_, fused SGD",
    "lookahead": "foreach lerp_ and copy_",
    "eg": "loop of mul_ and exp",
    "lazy rows": "SparseAdam",
}


# --- tensors -------------------------------------------------------------------------------------------------------------------


def _shapes(case: Case, row: Implementation) -> Shapes:
    """The case's tensors, cut to its elements where a test wants fewer; a part of them for slow rows."""
    shapes = _SETS[case.size]()
    if case.op == "lazy rows":
        return shapes if case.shape[1] >= _LIVE * _TABLE[1] else [(12, 5)]
    if case.shape[1] < sum(map(_size, shapes)):
        return [(min(_size(shape), case.shape[1] // case.shape[0]),) for shape in shapes[: case.shape[0]]]
    if row.name != REFERENCE:
        return shapes
    # Every n-th tensor: of each size some.
    total = sum(map(_size, shapes))
    step = max(len(shapes) // _PART_TENSORS, 1)
    step = max(step, min(total // _PART, len(shapes)))
    part = shapes[::step]
    if len(part) == 1 and _size(part[0]) > _PART:
        part = [(_PART,)]
    return part


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def _tensors(
    shapes: Shapes, dtype: np.dtype[Any], rng: np.random.Generator, scale: float, positive: bool
) -> list[Array]:
    """Normal numbers in arrays of one block, each on a cache line; values repeat, which no row can use."""
    line = 64 // dtype.itemsize
    starts = np.cumsum([0, *(-(-_size(shape) // line) * line for shape in shapes)])
    values = rng.standard_normal(min(1 << 18, int(starts[-1]) or 1)).astype(np.float32) * np.float32(scale)
    raw = np.empty(int(starts[-1]) * dtype.itemsize + 4096, np.uint8)
    first = -raw.ctypes.data % 4096
    block = raw[first : first + int(starts[-1]) * dtype.itemsize].view(dtype)
    filler = (np.abs(values) if positive else values).astype(dtype)
    for start in range(0, block.size, filler.size):
        piece = block[start : start + filler.size]
        piece[:] = filler[: piece.size]
    return [
        block[start : start + _size(shape)].reshape(shape)
        for start, shape in zip(starts.tolist(), shapes, strict=False)
    ]


_ROLES: dict[str, tuple[str, ...]] = {
    "ema": ("s", "p"),
    "adamw": ("p", "g", "m", "v"),
    "sgd": ("p", "g", "m"),
    "lookahead": ("s", "p"),
    "eg": ("p", "g"),
    "lazy": ("p", "g", "m", "v"),
}


def _lists(case: Case, row: Implementation, rng: np.random.Generator) -> Lists:
    shapes = _shapes(case, row)
    roles = list(_ROLES[case.op.split()[0]])
    roles += ["s"] if "+ ema" in case.op else ["t"] if "profiles" in case.op else []
    lists = {}
    for role in roles:
        dtype = _dtype("bfloat16" if case.op == "ema of bfloat16" and role == "p" else case.dtype)
        if case.op == "ema stochastic" and role == "p":
            dtype = np.dtype(np.float32)
        scale = 1e-3 if role in "gmv" else 1.0
        rows = _live(shapes[0]) if case.op == "lazy rows" and role == "g" else None
        sizes = [(len(rows), *shapes[0][1:])] if rows is not None else shapes
        lists[role] = _tensors(sizes, dtype, rng, scale, role == "v")
    return lists


def _live(shape: tuple[int, ...]) -> Array:
    rows = np.random.default_rng(0).permutation(shape[0])
    return rows[: min(_LIVE, shape[0] // 3)]


# --- recipes -------------------------------------------------------------------------------------------------------------------


def _functions(backend: str) -> Any:
    """The public functions on a backend, whichever this process has chosen: a module of their own."""
    spec = importlib.util.find_spec("fastops.optim")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._backend = importlib.import_module(f"fastops.{backend}")  # type: ignore[attr-defined]
    return module


def _ours(case: Case, f: Any, lists: dict[str, Any]) -> Callable[[], object]:
    """One call of the operation by functions of fastops."""
    s, p, g, m, v = (lists.get(role) for role in "spgmv")
    op = case.op
    adam = {"step": 10, "lr": _LR, "betas": _BETAS, "weight_decay": 0.01}
    if op == "ema 2 profiles":
        weights = (1.0 - _DECAY, 1.0 - 0.99)
        return partial(f._backend.ema_update, (s, lists["t"]), p, weights, None)
    if op == "ema stochastic":
        return partial(f.ema_update_, s, p, _DECAY, rounding="stochastic", seed=1)
    if op.startswith("ema"):
        return partial(f.ema_update_, s, p, _DECAY)
    if op.startswith("adamw"):
        more = {"ema": s, "ema_decay": _DECAY} if "ema" in op else {}
        return partial(f.adamw_step_, p, g, m, v, **adam, **more, zero_grad="zero_grad" in op)
    if op == "sgd accumulate 4":

        def cycle() -> None:
            for i in range(_ACCUMULATE):
                f.sgd_step_(p, g, m, lr=_LR, momentum=_MOMENTUM, accumulate=(i, _ACCUMULATE))

        return cycle
    if op.startswith("sgd"):
        more = {"ema": s, "ema_decay": _DECAY} if "ema" in op else {}
        return partial(f.sgd_step_, p, g, m, lr=_LR, momentum=_MOMENTUM, **more)
    if op == "lookahead":
        return partial(f.lookahead_sync_, s, p, _ALPHA)
    if op == "eg":
        return partial(f.eg_step_, p, g, lr=_EG_LR)
    return partial(f.lazy_adamw_rows_, p, g, m, v, lists["rows"], **adam)


def _numpy_adam(p: Array, g: Array, m: Array, v: Array) -> None:
    b1, b2 = (np.float32(b) for b in _BETAS)
    p *= np.float32(1.0 - _LR * 0.01)
    m *= b1
    m += np.float32(1.0 - _BETAS[0]) * g
    v *= b2
    v += np.float32(1.0 - _BETAS[1]) * g * g
    denominator = np.sqrt(v)
    denominator *= np.float32((1.0 - _BETAS[1] ** 10) ** -0.5)
    denominator += np.float32(1e-8)
    p -= np.float32(_LR / (1.0 - _BETAS[0] ** 10)) * m / denominator


def _numpy(case: Case, lists: Lists) -> Callable[[], object]:
    """The operation as it is written with NumPy, in place."""
    op, w = case.op, np.float32(1.0 - _DECAY)
    columns = list(zip(*lists.values(), strict=True))

    def average(s: Array, p: Array) -> None:
        s += w * (p.astype(s.dtype, copy=False) - s)

    def each(step: Callable[..., None]) -> Callable[[], object]:
        def run() -> None:
            for arrays in columns:
                step(*arrays)

        return run

    def adam(p: Array, g: Array, m: Array, v: Array, *s: Array) -> None:
        _numpy_adam(p, g, m, v)
        for shadow in s:
            average(shadow, p)
        if "zero_grad" in op:
            g[...] = 0

    def sgd(p: Array, g: Array, m: Array, *s: Array) -> None:
        m *= np.float32(_MOMENTUM)
        m += g
        p -= np.float32(_LR) * m
        for shadow in s:
            average(shadow, p)

    def lookahead(s: Array, p: Array) -> None:
        s += np.float32(_ALPHA) * (p - s)
        p[...] = s

    def eg(p: Array, g: Array) -> None:
        p *= np.exp(np.float32(-_EG_LR) * g)

    def profiles(s: Array, p: Array, t: Array) -> None:
        average(s, p)
        t += np.float32(1.0 - 0.99) * (p - t)

    def accumulated(p: Array, g: Array, m: Array, buffer: Array) -> None:
        buffer[...] = 0
        for _ in range(_ACCUMULATE):
            buffer += np.float32(1 / _ACCUMULATE) * g
        sgd(p, buffer, m)

    def rows(p: Array, g: Array, m: Array, v: Array, live: Array) -> None:
        part = [x[live] for x in (p, m, v)]
        _numpy_adam(part[0], g, part[1], part[2])
        p[live], m[live], v[live] = part

    if op == "sgd accumulate 4":
        columns = [(*arrays, np.empty_like(arrays[0])) for arrays in columns]
    steps: dict[str, Callable[..., None]] = {
        "ema 2 profiles": profiles,
        "sgd accumulate 4": accumulated,
        "lazy rows": rows,
        "lookahead": lookahead,
        "eg": eg,
    }
    family: dict[str, Callable[..., None]] = {"ema": average, "adamw": adam, "sgd": sgd}
    return each(steps[op] if op in steps else family[op.split()[0]])


def _torch_lists(lists: Lists) -> dict[str, list[Any]]:
    import torch

    def tensor(x: Array) -> Any:
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    return {role: [tensor(x) for x in items] for role, items in lists.items()}


def _torch(case: Case, lists: Lists, threads: int) -> Callable[[], object]:
    """The operation by torch's own multi-tensor functions and optimizers, on the same memory."""
    import torch

    torch.set_num_threads(threads)
    tensors = _torch_lists(lists)
    s, p, g, m, v = (tensors.get(role, []) for role in "spgmv")
    op, w = case.op, 1.0 - _DECAY
    if op == "ema":
        return lambda: torch._foreach_lerp_(s, p, w)
    if op == "ema of bfloat16":
        return lambda: torch._foreach_lerp_(s, [x.float() for x in p], w)
    if op == "ema 2 profiles":
        t = tensors["t"]
        return lambda: (torch._foreach_lerp_(s, p, w), torch._foreach_lerp_(t, p, 1.0 - 0.99))
    if op == "lookahead":
        return lambda: (torch._foreach_lerp_(s, p, _ALPHA), torch._foreach_copy_(p, s))
    if op == "eg":

        def eg() -> None:
            for x, y in zip(p, g, strict=True):
                x.mul_(torch.exp(y * -_EG_LR))

        return eg
    params = [torch.nn.Parameter(x) for x in p]
    if op == "lazy rows":
        (rows,) = tensors["rows"]
        params[0].grad = torch.sparse_coo_tensor(rows[None], g[0], tuple(p[0].shape), check_invariants=True).coalesce()
        optimizer: Any = torch.optim.SparseAdam(params, lr=_LR, betas=_BETAS)
        optimizer.state[params[0]] = {"step": 9, "exp_avg": m[0], "exp_avg_sq": v[0]}
        return optimizer.step  # type: ignore[no-any-return]
    for x, y in zip(params, g, strict=True):
        x.grad = y
    if op.startswith("adamw"):
        optimizer = torch.optim.AdamW(params, lr=_LR, betas=_BETAS, weight_decay=0.01, fused=True)
        for x, first, second in zip(params, m, v, strict=True):
            optimizer.state[x] = {"step": torch.tensor(9.0), "exp_avg": first, "exp_avg_sq": second}
    else:
        optimizer = torch.optim.SGD(params, lr=_LR, momentum=_MOMENTUM, fused=True)
        for x, buffer in zip(params, m, strict=True):
            optimizer.state[x] = {"momentum_buffer": buffer}
    step: Callable[[], object] = optimizer.step
    if op == "sgd accumulate 4":
        sums = [torch.zeros_like(x) for x in p]
        for x, y in zip(params, sums, strict=True):
            x.grad = y

        def cycle() -> None:
            for _ in range(_ACCUMULATE):
                torch._foreach_add_(sums, g, alpha=1 / _ACCUMULATE)
            step()
            torch._foreach_zero_(sums)

        return cycle
    data = [x.detach() for x in params]
    if "ema" not in op:
        return step

    def both() -> None:
        step()
        torch._foreach_lerp_(s, data, w)
        if "zero_grad" in op:
            torch._foreach_zero_(g)

    return both


def _module_of(tensors: list[Any]) -> Any:
    import torch

    module = torch.nn.Module()
    for i, x in enumerate(tensors):
        module.register_parameter(f"p{i}", torch.nn.Parameter(x))
    return module


def _timm(case: Case, lists: Lists, threads: int) -> Callable[[], object]:
    import torch

    torch.set_num_threads(threads)
    # The file alone: the package imports torchvision, whose operators must fit torch's build.
    (folder,) = importlib.util.find_spec("timm").submodule_search_locations  # type: ignore[union-attr, misc]
    spec = importlib.util.spec_from_file_location("model_ema", f"{folder}/utils/model_ema.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    tensors = _torch_lists(lists)
    model = _module_of(tensors["p"])
    dtype = torch.bfloat16 if case.op == "ema stochastic" else torch.float32
    ema = module.ModelEmaV3(model, decay=_DECAY, dtype=dtype)
    for x, y in zip(ema.module.parameters(), tensors["s"], strict=True):
        x.data = y
    return partial(ema.update, model)


def _torch_ema(case: Case, lists: Lists, threads: int) -> Callable[[], object]:
    import torch
    from torch_ema import ExponentialMovingAverage

    torch.set_num_threads(threads)
    tensors = _torch_lists(lists)
    params = [torch.nn.Parameter(x) for x in tensors["p"]]
    ema = ExponentialMovingAverage(params, decay=_DECAY, use_num_updates=False)
    ema.shadow_params = tensors["s"]
    return partial(ema.update, params)


def _triad(lists: Lists, threads: int) -> Callable[[], object]:
    """a = b + c q: 12 bytes a float, as the average."""
    import torch

    torch.set_num_threads(threads)
    (b,), (c,) = _torch_lists(lists).values()
    a = torch.empty_like(b)
    return lambda: torch.add(b, c, alpha=0.5, out=a)


# --- tasks ---------------------------------------------------------------------------------------------------------------------


def prepare(case: Case, row: Implementation) -> Task:
    """Tensors and call of one row; equal tensors in every process."""
    rng = np.random.default_rng(zlib.crc32(case.group.encode()))
    lists = _lists(case, row, rng)
    if case.op == "lazy rows":
        lists["rows"] = [_live(lists["p"][0].shape)]
    call = _call(case, row, lists)

    def check() -> float:
        if row.recipe == "triad":
            call()
            return 0.0
        places = _places(case, lists)
        want = {role: [items[i][place].copy() for i, place in places[role]] for role, items in lists.items()}
        if case.op == "lazy rows":
            want["rows"] = [np.arange(len(want["rows"][0]))]
        call()
        _ours(case, _functions("reference"), want)()
        return max(
            _difference(lists[role][i][place], exact)
            for role, items in want.items()
            for (i, place), exact in zip(places[role], items, strict=True)
            if role != "rows"
        )

    elements = sum(x.size for x in lists["g" if case.op == "lazy rows" else "p"])
    whole = float(case.shape[1])
    part = elements < whole
    note = f"timed on {elements:,} of {case.shape[1]:,} elements" if part else ""
    return Task(call, (), float(elements), max(whole, float(elements)), check, note, [lists])


def _call(case: Case, row: Implementation, lists: Lists) -> Callable[[], object]:
    if row.recipe == "numpy":
        return _numpy(case, lists)
    if row.recipe == "torch":
        return _torch(case, lists, row.threads)
    if row.recipe == "timm":
        return _timm(case, lists, row.threads)
    if row.recipe == "torch_ema":
        return _torch_ema(case, lists, row.threads)
    if row.recipe == "triad":
        return _triad(lists, row.threads)
    given: dict[str, Any] = dict(lists)
    if row.recipe == "plan":
        from fastops import TensorList

        given = {role: TensorList(items) for role, items in lists.items()}
    return _ours(case, _functions(row.backend), given)


def _places(case: Case, lists: Lists) -> dict[str, list[tuple[int, Any]]]:
    """What of each list the oracle is asked about, since it is slow: up to 6 tensors, and of each some rows."""
    if case.op == "lazy rows":
        live = lists["rows"][0][:20]
        few = slice(0, len(live))
        return {role: [(0, few if role in ("g", "rows") else live)] for role in lists}
    count = len(lists["p"])
    chosen = sorted({0, 1 % count, count // 3, count // 2, max(count - 2, 0), count - 1})
    sizes = [(i, lists["p"][i]) for i in chosen]
    places = [(i, slice(0, max(1, min(len(x), 20_000 * len(x) // max(x.size, 1))))) for i, x in sizes]
    return dict.fromkeys(lists, places)


def _difference(got: Array, want: Array) -> float:
    """Largest difference over 1 + |want|; raises above some units of the dtype, 2 of bfloat16 where roundings are random."""
    wide_got, wide_want = got.astype(np.float64), want.astype(np.float64)
    error = float(np.max(np.abs(wide_got - wide_want) / (1.0 + np.abs(wide_want)), initial=0.0))
    bound = 2.0**-6 if got.dtype.name == "bfloat16" else 1e-6
    if not error <= bound:
        raise WrongResult(f"difference {error:.3g} from the oracle, allowed {bound:.3g}")
    return error
