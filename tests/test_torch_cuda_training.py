# SPDX-License-Identifier: BSD-3-Clause
"""EMA and AdamW of fastops.torch on a GPU: through the shim, where tensors of the CPU say that they are on one, and on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from gpu_arrays import PLATFORMS, Shim, open_platform

from fastops import cuda, optim

torch = pytest.importorskip("torch", reason="torch is not installed")
ft = pytest.importorskip("fastops.torch")

DTYPES = ["torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"]
SHAPES = [(3, 5), (), (70,), (2, 3, 4), (0,), (20_000,)]


class Machine:
    """Where tensors are made, and what was launched."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.calls: list[str] = []
        # Of the shim: which device the memory of a tensor belongs to; all others are on the CPU.
        self.places: dict[int, int] = {}
        self.kept: list[Any] = []

    def make(self, *shapes: tuple[int, ...], seed: int = 0, dtype: Any = None, index: int = 0) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(shape, generator=generator).to(dtype or torch.float32) for shape in shapes]
        return [self.put(x, index) for x in made]

    def put(self, x: Any, index: int = 0) -> Any:
        if self.device == "cuda":
            return x.to("cuda")
        self.kept.append(x)
        self.places[x.untyped_storage()._cdata] = index
        return x


@pytest.fixture(params=PLATFORMS)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A GPU, or two that are made of the CPU's memory."""
    gpu = open_platform(request.param, monkeypatch)
    found = Machine("cpu" if isinstance(gpu, Shim) else "cuda")
    for name in ("adamw_step_", "ema_update_"):
        function = getattr(cuda, name)

        def recorded(*args: Any, name: str = name, function: Any = function, **options: Any) -> None:
            function(*args, **options)
            found.calls.append(name)

        monkeypatch.setattr(cuda, name, recorded)
    if not isinstance(gpu, Shim):
        return found
    real = torch.Tensor.device

    def place(x: Any) -> int | None:
        return found.places.get(x.untyped_storage()._cdata) if x.layout is torch.strided else None

    def device(x: Any) -> Any:
        index = place(x)
        return real.__get__(x) if index is None else torch.device("cuda", index)

    def describe(name: str, x: Any) -> Any:
        index = place(x) if isinstance(x, torch.Tensor) else None
        if index is None:
            raise TypeError(f"{name} must be a tensor on a GPU, got one on cpu")
        return x.data_ptr(), tuple(x.shape), tuple(x.stride()), DTYPES.index(str(x.dtype)), index, False

    def like(function: Any) -> Any:
        def made(x: Any, *args: Any, **options: Any) -> Any:
            y = function(x, *args, **options)
            index = place(x)
            return y if index is None else found.put(y, index)

        return made

    def on_host(function: Any) -> Any:
        """The functions of the CPU would find the memory of a fake GPU there."""

        def called(*args: Any, **options: Any) -> None:
            for x in (y for items in args if not isinstance(items, float) for y in items):
                if place(x) is not None:
                    raise TypeError(f"params[0] must be an array in host memory, got a tensor on {x.device}")
            function(*args, **options)

        return called

    for name in ("adamw_step_", "ema_update_"):
        monkeypatch.setattr(optim, name, on_host(getattr(optim, name)))
    monkeypatch.setattr(torch.Tensor, "device", property(device))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: place(x) is not None))
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda x: place(x) is None))
    monkeypatch.setattr(torch.Tensor, "clone", like(torch.Tensor.clone))
    monkeypatch.setattr(torch, "zeros_like", like(torch.zeros_like))
    monkeypatch.setattr("fastops.cuda._optim._Step._describe", lambda _, name, x: describe(name, x))
    monkeypatch.setattr("fastops.cuda._calls.current_stream", lambda values: 1)
    return found


def on_cpu(x: Any) -> Any:
    """A copy that no fake GPU has: by way of another dtype, since a tensor of the shim is on the CPU already."""
    return x.detach().double().cpu().to(x.dtype)


def same(x: Any, y: Any) -> None:
    torch.testing.assert_close(on_cpu(x), on_cpu(y), rtol=1e-6, atol=1e-6)


def parameters(machine: Machine, *shapes: tuple[int, ...], **options: Any) -> list[Any]:
    return [torch.nn.Parameter(x) for x in machine.make(*shapes, **options)]


def mirror(params: list[Any]) -> list[Any]:
    return [torch.nn.Parameter(on_cpu(p)) for p in params]


def take_steps(machine: Machine, pairs: list[tuple[Any, list[Any]]], steps: int, index: Any = lambda i: 0) -> None:
    for t in range(steps):
        generator = torch.Generator().manual_seed(t)
        shapes = [tuple(p.shape) for p in pairs[0][1]]
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for on_gpu, (optimizer, params) in zip((True, False), pairs, strict=True):
            for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
                where = index(i) if on_gpu else None
                p.grad = g.clone() if where is None else machine.put(g.clone(), where)
            optimizer.step()


def test_steps_on_the_gpu_are_those_of_the_cpu(machine: Machine) -> None:
    params = parameters(machine, *SHAPES)
    other = mirror(params)
    ours, theirs = (ft.AdamW(x, lr=0.01, ema_decay=0.75) for x in (params, other))
    take_steps(machine, [(ours, params), (theirs, other)], 4)
    assert machine.calls == ["adamw_step_"] * 4
    for p, q in zip(params, other, strict=True):
        same(p, q)
        for name in ("exp_avg", "exp_avg_sq", "ema"):
            same(ours.state[p][name], theirs.state[q][name])
        assert int(ours.state[p]["step"]) == 4
        assert p._version >= 4
    with ours.average_parameters():
        for p, q in zip(params, other, strict=True):
            same(p, theirs.state[q]["ema"])
    again = copy.deepcopy(ours.state_dict())
    assert {*again["state"][0]} == {"step", "exp_avg", "exp_avg_sq", "ema"}


def test_a_model_on_several_devices_takes_a_call_for_each(machine: Machine) -> None:
    if machine.device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def index(i: int) -> int | None:
        return (0, None, 1)[i % 3]

    params = [
        p if index(i) is not None else torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(9)))
        for i, s in enumerate(SHAPES)
        for p in parameters(machine, s, seed=i, index=index(i) or 0)
    ]
    other = mirror(params)
    pairs = [(ft.AdamW(x, lr=0.01, ema_decay=0.75), x) for x in (params, other)]
    take_steps(machine, pairs, 3, index)
    assert machine.calls == ["adamw_step_"] * 6
    for p, q in zip(params, other, strict=True):
        same(p, q)
        same(pairs[0][0].state[p]["ema"], pairs[1][0].state[q]["ema"])


def test_a_step_on_the_gpu_that_raises_has_written_nothing(machine: Machine) -> None:
    params = parameters(machine, (3,), (4,))
    host = torch.nn.Parameter(torch.ones(2))
    optimizer = ft.AdamW([host, *params], lr=0.1)
    host.grad = torch.ones(2)
    for p, g in zip(params, machine.make((3,), (4,)), strict=True):
        p.grad = g
    optimizer.step()
    before = [p.detach().clone() for p in (host, *params)]
    params[1].grad = None
    params[1].data = params[1].data.half() if machine.device == "cuda" else machine.put(params[1].data.half())
    params[1].grad = machine.put(torch.ones(4).half())
    with pytest.raises(TypeError, match=r"^params\[1\] must be of dtype float32 or float64, got float16"):
        optimizer.step()
    for p, x in zip((host, params[0]), before, strict=False):
        assert torch.equal(p.cpu(), x.cpu())


def test_gradients_may_be_in_half_precision(machine: Machine) -> None:
    params = parameters(machine, (3, 4), (5,))
    optimizer = ft.AdamW(params, lr=0.1)
    for p in params:
        p.grad_dtype = None
        p.grad = machine.put(torch.ones(p.shape).bfloat16())
    other = mirror(params)
    for q in other:
        q.grad = torch.ones(q.shape)
    optimizer.step()
    ft.AdamW(other, lr=0.1).step()
    for p, q in zip(params, other, strict=True):
        same(p, q)


def module_of(params: list[Any]) -> Any:
    module = torch.nn.Module()
    module.all = torch.nn.ParameterList(params)
    module.register_buffer("mean", torch.zeros(3))
    module.register_buffer("count", torch.zeros((), dtype=torch.long))
    return module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_averages_on_the_gpu_are_those_of_the_cpu(machine: Machine, dtype: str) -> None:
    params = parameters(machine, *SHAPES, dtype=getattr(torch, dtype))
    models = module_of(params), module_of(mirror(params))
    averages = [torch.nn.Parameter(p.detach().clone()) for p in params]
    held = module_of(averages), module_of(mirror(averages))
    emas = [ft.EMA(m, 0.75, seed=5, module=x, nonfinite="skip") for m, x in zip(models, held, strict=True)]
    for t in range(3):
        for p, q, x in zip(params, models[1].parameters(), machine.make(*SHAPES, seed=t), strict=True):
            with torch.no_grad():
                p.copy_(x)
                q.copy_(x)
        assert emas[0].update() is emas[1].update() is True
    assert machine.calls == ["ema_update_"] * 3
    for x, y in zip(*(ema.module.parameters() for ema in emas), strict=True):
        same(x, y)
    with torch.no_grad():
        params[0][0, 0] = torch.inf
    assert not emas[0].update()


@pytest.mark.parametrize("first", [0, 1])
def test_averages_follow_where_the_tensors_go(machine: Machine, first: int) -> None:
    """``Module.to`` puts the memory of another device into the same parameters."""
    model = module_of([torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))])
    ema = ft.EMA(model, 0.5, update_after_step=0)
    for step in range(2):
        if step:
            for x in (*list(model.parameters())[first:], *list(ema.module.parameters())[first:]):
                x.data = machine.put(x.data.clone())
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(8.0)
        assert ema.update()
    assert machine.calls == ["ema_update_"]
    for x in ema.module.parameters():
        assert x.detach().cpu().tolist() == [6.0] * len(x)


def test_devices_that_differ_are_named(machine: Machine) -> None:
    model = module_of(parameters(machine, (3,)))
    ema = ft.EMA(model, module=module_of([torch.nn.Parameter(torch.zeros(3))]))
    with pytest.raises(TypeError, match=r"^params\[0\] must be an array in host memory"):
        ema.update()
