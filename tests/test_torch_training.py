# SPDX-License-Identifier: BSD-3-Clause
"""EMA and AdamW of fastops.torch beside torch's AveragedModel and AdamW and timm's ModelEmaV3: values, states, schedulers."""

from __future__ import annotations

import copy
import importlib.util
import io
import pathlib
import pickle
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance

import fastops
from fastops import _tensors, _validate

torch = pytest.importorskip("torch", reason="torch is not installed")
ft = pytest.importorskip("fastops.torch")

swa = torch.optim.swa_utils
F32 = np.dtype(np.float32)
BF16 = pytest.mark.skipif(_validate.bfloat16() is None, reason="ml_dtypes is not installed")


class Net(torch.nn.Module):
    """With a tied parameter, running statistics and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.last = torch.nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: Any) -> Any:
        return self.last(self.norm(self.first(x)))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return Net()


def disturb(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        model(torch.randn(8, *model.state_dict()["first.weight"].shape[1:])) if hasattr(model, "norm") else None


def near(x: Any, y: Any, updates: int = 8) -> None:
    a, b = x.detach().numpy(), y.detach().numpy()
    assert a.dtype == b.dtype
    if a.dtype.kind == "f":
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance.average(updates, 16.0, a.dtype))
    else:
        np.testing.assert_array_equal(a, b)


# --- averages ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.9, "equal"])
def test_averages_are_those_of_averaged_model(model: Any, decay: Any) -> None:
    ours = ft.EMA(model, decay)
    function = None if decay == "equal" else swa.get_ema_multi_avg_fn(decay)
    theirs = swa.AveragedModel(model, multi_avg_fn=function)
    for i in range(6):
        disturb(model)
        # Both ways of naming the model.
        assert ours.update() is True if i % 2 else ours.update_parameters(model) is None
        theirs.update_parameters(model)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, x in ours.state_dict().items():
        near(x, theirs.state_dict()[name])
    assert not ours.module.training
    x = torch.randn(3, 4)
    assert torch.equal(ours(x), ours.module(x))


def test_state_dicts_are_exchanged_with_averaged_model(model: Any) -> None:
    ours = ft.EMA(model, 0.9)
    theirs = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        disturb(model)
        theirs.update_parameters(model)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    ours.load_state_dict(torch.load(file, weights_only=True))
    assert int(ours.n_averaged) == 3
    disturb(model)
    ours.update()
    again = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9))
    again.load_state_dict(ours.state_dict())
    assert int(again.n_averaged) == 4
    theirs.update_parameters(model)
    disturb(model)
    for averaged in (ours, theirs, again):
        averaged.update_parameters(model)
    for name, x in ours.state_dict().items():
        near(x, theirs.state_dict()[name])
        near(x, again.state_dict()[name])


@pytest.fixture
def timm() -> ModuleType:
    """The one file: the package imports torchvision, whose operators must fit torch's build."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed")
    path = pathlib.Path(spec.origin).parent / "utils" / "model_ema.py"
    file = importlib.util.spec_from_file_location("timm_model_ema", path)
    assert file is not None
    assert file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_averages_and_states_are_those_of_timm(model: Any, timm: ModuleType, warmup: bool, buffers: str) -> None:
    # timm averages a tensor as often as it is in the state dict.
    model.last.weight = torch.nn.Parameter(model.first.weight.detach().clone())
    theirs = timm.ModelEmaV3(model, decay=0.9, use_warmup=warmup, exclude_buffers=buffers == "copy")
    ours = ft.EMA(model, 0.9, warmup="timm" if warmup else "none", buffers=buffers, layout="timm")
    for step in range(1, 7):
        disturb(model)
        theirs.update(model, step)
        ours.update(model, step)
        assert ours.get_decay(step) == theirs.get_decay(step)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, x in ours.state_dict().items():
        near(x, theirs.state_dict()[name])
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    # A state without a counter goes on averaging, and does not copy.
    fresh = ft.EMA(model, 0.9)
    fresh.load_state_dict(theirs.state_dict())
    kept = fresh.module.first.bias.detach().clone()
    disturb(model)
    fresh.update()
    near(fresh.module.first.bias, 0.9 * kept + 0.1 * model.first.bias)
    # And with one, where it is not kept.
    ours.load_state_dict(fresh.state_dict())
    assert ours.n_averaged == fresh.n_averaged


def test_weights_are_swapped_and_come_back_bit_by_bit(model: Any) -> None:
    ema = ft.EMA(model, 0.5)
    for _ in range(2):
        disturb(model)
        ema.update()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with ema.average_parameters() as same:
        assert same is model
        for name, x in model.state_dict().items():
            assert torch.equal(x, ema.module.state_dict()[name])
        with pytest.raises(RuntimeError, match="average_parameters must be left"), ema.average_parameters():
            pass
        with pytest.raises(RuntimeError, match="update must be called outside"):
            ema.update()
    with pytest.raises(KeyError), ema.average_parameters():
        raise KeyError
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])
    ema.copy_to_()
    assert torch.equal(model.first.bias, ema.module.first.bias)
    disturb(model)
    ema.set()
    assert torch.equal(model.first.bias, ema.module.first.bias)


def test_replaced_parameters_are_followed(model: Any) -> None:
    ema = ft.EMA(model, 0.5)
    ema.update()
    model.last.bias = torch.nn.Parameter(torch.full((4,), 100.0))
    ema.update()
    assert (ema.module.last.bias > 40).all()
    model.load_state_dict({name: torch.zeros_like(x) for name, x in model.state_dict().items()}, assign=True)
    # That makes a tensor for each name, also for two that had one.
    with pytest.raises(ValueError, match=r"^model must be a module of 5 parameters and 3 buffers, got one of 6 and 3"):
        ema.update()
    model.last.weight = model.first.weight
    for _ in range(40):
        ema.update()
    assert (ema.module.last.bias.abs() < 1e-6).all()
    assert (ema.module.last.weight.abs() < 1e-6).all()


def test_replaced_layers_are_followed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    ema = ft.EMA(model, 0.5)
    ema.update()
    model[1] = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(model[1].bias, 100.0)
    ema.update()
    assert (ema.module[1].bias > 40).all()


@pytest.mark.parametrize("change", ["another", "in place of none", "in place of one", "none in place of one"])
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_tensors_that_are_registered_later_are_followed(kind: str, change: str) -> None:
    model = torch.nn.Linear(2, 2)

    def register(module: Any, name: str, x: Any) -> None:
        if kind == "parameter":
            module.register_parameter(name, x if x is None else torch.nn.Parameter(x))
        else:
            module.register_buffer(name, x)

    register(model, "first", None if change == "in place of none" else torch.zeros(3))
    ema = ft.EMA(model, 0.5, buffers="average")
    for _ in range(2):
        ema.update()
    name = "first" if change in ("in place of none", "none in place of one") else "second"

    def alter(module: Any, value: float) -> None:
        if change == "in place of one":
            delattr(module, "first")
        register(module, name, None if change == "none in place of one" else torch.full((3,), value))

    alter(model, 4.0)
    if change != "in place of one":
        with pytest.raises(ValueError, match=r"^model must be a module of \d parameters and \d buffers"):
            ema.update()
    alter(ema.module, 0.0)
    torch.nn.init.constant_(model.weight, 0.0)
    before = ema.module.weight.clone()
    ema.update()
    assert torch.equal(ema.module.weight, before / 2)
    found = getattr(ema.module, name)
    assert found is None if change == "none in place of one" else (found == 2.0).all()


def test_a_part_that_a_layer_gets_later_is_followed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    ema = ft.EMA(model, 0.5)
    ema.update()
    model[0].add_module("later", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^model must be a module of 2 parameters and 0 buffers, got one of 4 and 0"):
        ema.update()
    ema.module[0].add_module("later", copy.deepcopy(model[0].later))
    torch.nn.init.constant_(model[0].later.bias, 100.0)
    ema.update()
    assert (ema.module[0].later.bias > 40).all()


def test_weights_that_are_shared_no_more_are_followed(model: Any) -> None:
    ema = ft.EMA(model, 0.5)
    ema.update()
    model.last.weight = torch.nn.Parameter(torch.full((4, 4), 100.0))
    with pytest.raises(ValueError, match=r"^model must be a module of 5 parameters and 3 buffers, got one of 6 and 3"):
        ema.update()
    ema.module.last.weight = torch.nn.Parameter(torch.zeros(4, 4))
    ema.update()
    assert (ema.module.last.weight == 50).all()
    assert (ema.module.first.weight < 10).all()


@pytest.mark.parametrize("call", ["update", "set", "copy_to_"])
def test_a_model_of_other_shapes_leaves_all_untouched(call: str) -> None:
    """Buffers that are copied, too, after what is averaged; for a copy of all, the weights."""
    model = torch.nn.BatchNorm1d(3)
    ema = ft.EMA(model, 0.5)
    other = torch.nn.BatchNorm1d(3)
    for x in (*other.parameters(), *other.buffers()):
        torch.nn.init.constant_(x, 7)
    other.running_var = torch.ones(1)
    before = copy.deepcopy(ema.state_dict()), copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"shapes of their averages, got \(1,\) beside \(3,\)$"):
        getattr(ema, call)(other)
    for had, now in zip(before, (ema, other), strict=True):
        for name, x in now.state_dict().items():
            assert torch.equal(x, had[name]), name


def test_a_model_that_cannot_be_read_is_refused_in_each_update() -> None:
    """Neither the weights of an earlier one nor none are taken in its place."""
    model = torch.nn.Linear(2, 2)
    emptied = copy.deepcopy(model)
    emptied.weight.untyped_storage().resize_(0)
    for begun in (False, True):
        ema = ft.EMA(model, 0.5)
        if begun:
            ema.update()
        with torch.no_grad():
            model.weight.add_(1.0)
        before = copy.deepcopy(ema.state_dict())
        for bad, kind in ((copy.deepcopy(model).to("meta"), TypeError), (emptied, ValueError)):
            for _ in range(2):
                with pytest.raises(kind, match="must be"):
                    ema.update(bad)
        for name, x in ema.state_dict().items():
            assert torch.equal(x, before[name]), name
        assert ema.update()
        want = (before["module.weight"] + model.weight) / 2 if begun else model.weight
        torch.testing.assert_close(ema.module.weight.detach(), want.detach())


def test_an_inf_is_left_out(model: Any) -> None:
    ema = ft.EMA(model, 0.5, nonfinite="skip")
    with torch.no_grad():
        model.first.bias[0] = torch.inf
    assert ema.update() is False
    assert torch.isfinite(ema.module.first.bias).all()
    assert ema.n_averaged == 0


@BF16
def test_half_precision_averages_move() -> None:
    """1000 steps of a thousandth: to nearest, the first would round to nothing and so would all others."""
    model = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    kept, wide = (
        ft.EMA(model, 0.999, update_after_step=0),
        ft.EMA(model, 0.999, update_after_step=0, dtype=torch.float32),
    )
    with torch.no_grad():
        for average in (kept, wide):
            average.module.weight.fill_(1.0)
        model.weight.fill_(2.0)
    for _ in range(1000):
        kept.update()
        wide.update()
    assert kept.module.weight.dtype is torch.bfloat16
    want = 2 - 0.999**1000
    np.testing.assert_allclose(wide.module.weight.detach(), want, rtol=0, atol=tolerance.average(1000, 2.0, F32))
    assert abs(float(kept.module.weight.detach().float().mean()) - want) < 0.05
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 for a model with float16"):
        ft.EMA(torch.nn.Linear(2, 2, dtype=torch.float16))


def test_averages_pickle_and_copy(model: Any) -> None:
    ema = ft.EMA(model, 0.5)
    ema.update()
    for same_model, same in (pickle.loads(pickle.dumps((model, ema))), copy.deepcopy((model, ema))):
        with torch.no_grad():
            same_model.first.bias.fill_(100.0)
        same.update()
        assert (same.module.first.bias > 40).all()
        assert (ema.module.first.bias < 10).all()
    assert "decay=0.5" in repr(ema)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"decay": 1.5}, ValueError, "decay must be a finite number"),
        ({"decay": (0.5, 0.9)}, TypeError, "decay must be a number or 'equal'"),
        ({"warmup": "power"}, ValueError, "warmup must be"),
        ({"layout": "keras"}, ValueError, "layout must be"),
        ({"dtype": torch.float16}, ValueError, "dtype must be torch.float32"),
        ({"buffers": "skip"}, ValueError, "buffers must be"),
    ],
    ids=str,
)
def test_wrong_options_of_averages(model: Any, options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        ft.EMA(model, **options)


def test_wrong_models_of_averages(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        ft.EMA(model.parameters())
    ema = ft.EMA(model)
    with pytest.raises(ValueError, match="model must be a module of 5 parameters and 3 buffers"):
        ema.update(model.norm)
    before = copy.deepcopy(ema.state_dict())
    with pytest.raises(TypeError, match="array in host memory"):
        ft.EMA(model.first).update(copy.deepcopy(model.first).to("meta"))
    with pytest.raises(ValueError, match="of shape"):
        ema.update(_other())
    for name, x in ema.state_dict().items():
        assert torch.equal(x, before[name])


def _other() -> Any:
    model = Net()
    model.last.bias = torch.nn.Parameter(torch.ones(5))
    return model


# --- AdamW -------------------------------------------------------------------------------------------------------------------------


def train(optimizer: Any, params: list[Any], steps: int, seed: int = 0, skip: int = -1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.grad = None if i == skip and t % 2 else g
        optimizer.step()


def parameters(dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in ((3, 5), (), (70,), (2, 3, 4))
    ]


def close(x: Any, y: Any, steps: int) -> None:
    a, b = x.detach().numpy(), y.detach().numpy()
    bound = 2 * steps * tolerance.step(np.abs(b) + 0.1, tolerance.ADAM, b.dtype)
    assert (np.abs(a - b) <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("skip", [-1, 2])
def test_steps_are_those_of_torch(dtype: Any, skip: int) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    pairs = []
    for make, params in ((ft.AdamW, ours), (torch.optim.AdamW, theirs)):
        groups = [{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:], "betas": (0.8, 0.9)}]
        optimizer = make(groups, lr=0.05)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20)
        pairs.append((optimizer, scheduler))
    for i in range(6):
        for (optimizer, scheduler), params in zip(pairs, (ours, theirs), strict=True):
            train(optimizer, params, 2, seed=i, skip=skip)
            scheduler.step()
    assert pairs[0][0].param_groups[0]["lr"] == pairs[1][0].param_groups[0]["lr"]
    for x, y in zip(ours, theirs, strict=True):
        close(x, y, 12)
    for x, y in zip(ours, theirs, strict=True):
        mine, other = pairs[0][0].state[x], pairs[1][0].state[y]
        assert mine["step"] == other["step"]
        close(mine["exp_avg"], other["exp_avg"], 12)


def test_l2_penalty_is_that_of_adam() -> None:
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    train(
        ft.AdamW(ours, lr=torch.tensor(0.01, dtype=torch.float64), weight_decay=0.1, decoupled_weight_decay=False),
        ours,
        5,
    )
    train(torch.optim.Adam(theirs, lr=0.01, weight_decay=0.1), theirs, 5)
    for x, y in zip(ours, theirs, strict=True):
        close(x, y, 5)


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_states_are_exchanged_with_torch(fused: bool) -> None:
    ours, theirs = parameters(), parameters()
    mine, other = ft.AdamW(ours, lr=0.01, ema_decay=0.5), torch.optim.AdamW(theirs, lr=0.01, fused=fused)
    train(other, theirs, 3)
    with torch.no_grad():
        for x, y in zip(ours, theirs, strict=True):
            x.copy_(y)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    mine.load_state_dict(torch.load(file, weights_only=True))
    for optimizer, params in ((mine, ours), (other, theirs)):
        train(optimizer, params, 3, seed=1)
    back = torch.optim.AdamW([torch.nn.Parameter(x.detach().clone()) for x in ours])
    back.load_state_dict(copy.deepcopy(mine.state_dict()))
    params = back.param_groups[0]["params"]
    train(back, params, 3, seed=2)
    train(mine, ours, 3, seed=2)
    train(other, theirs, 3, seed=2)
    for x, y, z in zip(ours, theirs, params, strict=True):
        close(x, y, 9)
        close(z, y, 9)
        assert int(mine.state[x]["step"]) == int(other.state[y]["step"]) == int(back.state[z]["step"]) == 9


def test_the_average_moves_with_the_steps() -> None:
    params = parameters()
    optimizer = ft.AdamW(params, lr=0.05, ema_decay=0.75)
    want = [p.detach().clone() for p in params]
    for i in range(6):
        train(optimizer, params, 1, seed=i, skip=0 if i % 2 else -1)
        if i % 2:
            params[0].grad = None
        for average, p in zip(want, params, strict=True):
            average.lerp_(p.detach(), 0.25)
    for average, p in zip(want, params, strict=True):
        near(optimizer.state[p]["ema"], average)
    before = [p.detach().clone() for p in params]
    with optimizer.average_parameters():
        for average, p in zip(want, params, strict=True):
            near(p, average)
        with pytest.raises(RuntimeError, match="step must be called outside"):
            optimizer.step()
    for p, x in zip(params, before, strict=True):
        assert torch.equal(p, x)
    # Averages are part of the state.
    again = ft.AdamW([torch.nn.Parameter(p.detach().clone()) for p in params], ema_decay=0.75)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(again, again.param_groups[0]["params"], 1, seed=9)
    train(optimizer, params, 1, seed=9)
    for p, q in zip(params, again.param_groups[0]["params"], strict=True):
        assert torch.equal(optimizer.state[p]["ema"], again.state[q]["ema"])


def test_a_parameter_without_gradients_is_followed_while_it_stands_still() -> None:
    p, q = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = ft.AdamW([p, q], lr=0.0, ema_decay=0.5)
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    with torch.no_grad():
        q.fill_(8.0)
    q.grad = None
    for _ in range(2):
        optimizer.step()
    assert optimizer.state[q]["ema"].tolist() == [6.0] * 3
    assert int(optimizer.state[q]["step"]) == 1
    assert int(optimizer.state[p]["step"]) == 3


def test_a_state_that_is_cleared_or_replaced_is_heard_of() -> None:
    start = torch.linspace(0, 1, 5)
    pairs = []
    for kind in (torch.optim.AdamW, ft.AdamW):
        p = torch.nn.Parameter(start.clone())
        optimizer = kind([p], lr=0.1)

        def step(p: Any = p, optimizer: Any = optimizer) -> None:
            p.grad = torch.sin(3 * p.detach())
            optimizer.step()

        step()
        optimizer.state.clear()
        step()
        optimizer.state[p]["exp_avg"] = torch.full((5,), 0.3)
        step()
        pairs.append((p.detach(), optimizer.state_dict()["state"][0]))
    torch.testing.assert_close(*(p for p, _ in pairs))
    assert int(pairs[1][1]["step"]) == 2
    torch.testing.assert_close(*(state["exp_avg"] for _, state in pairs))


def test_states_of_several_groups_are_replaced_unheard_by_none() -> None:
    """Also in the step after which the states of another group were seen to be what they were."""
    results = []
    for kind in (torch.optim.AdamW, ft.AdamW):
        params = [torch.nn.Parameter(torch.linspace(0, 1, n)) for n in (3, 1, 4)]
        optimizer = kind([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)

        def step(params: list[Any] = params, optimizer: Any = optimizer) -> None:
            for p in params:
                p.grad = torch.sin(3 * p.detach()) + 1
            optimizer.step()

        for _ in range(3):
            step()
        for p in params[::2]:
            optimizer.state[p] = {key: x.clone() for key, x in optimizer.state[p].items()}
            step()
            optimizer.state[p]["exp_avg"] = torch.full_like(p, 0.3)
            step()
        first, second = (optimizer.state[p] for p in params[1:])
        second["step"] = torch.tensor(9.0)
        step()
        del first["exp_avg_sq"]
        first.clear()
        step()
        results.append((params, [optimizer.state[p] for p in params]))
    for p, q, x, y in zip(*(params for params, _ in results), *(states for _, states in results), strict=True):
        torch.testing.assert_close(p, q)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(x[name], y[name])


def test_several_groups_are_looked_at_by_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full check takes several microseconds a tensor."""
    if fastops.show_config("dict")["backend"] != "native":
        pytest.skip("of the compiled backend")
    params = parameters()
    optimizer = ft.AdamW([{"params": params[:2]}, {"params": params[2:]}], ema_decay=0.5)
    train(optimizer, params, 1)
    monkeypatch.setattr(_tensors, "check", None)
    train(optimizer, params, 3)


def test_options_that_are_refused_are_so_in_a_step() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ft.AdamW([p])
    p.grad = torch.ones(3)
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize must be False"):
        optimizer.step()
    assert (p == 1).all()


@pytest.mark.parametrize("bad", ["sparse", "half", "option", "idle", "average"])
def test_a_step_that_raises_has_written_nothing(bad: str) -> None:
    """Neither the group before the one that does not fit, nor in it the parameters that have taken as many steps."""
    params = parameters()[:2] + [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(4)]
    optimizer = ft.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, ema_decay=0.5)
    for steps in range(3):
        for p in params:
            # The last has taken part in the first step only, and the one before it in the last step not.
            late = (p is params[-1] and steps) or (p is params[-2] and steps == 2)
            p.grad = None if late else torch.ones_like(p)
        if steps < 2:
            optimizer.step()
    p = params[-3]
    if bad == "sparse":
        p.grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 2), (3, 2), check_invariants=True)
        text = r"grads\[1\] must be a dense tensor"
    elif bad == "half":
        p.data, text = p.data.half(), r"params\[1\] must be of dtype float32 or float64"
    elif bad == "option":
        optimizer.param_groups[1]["lr"], text = float("nan"), "lr must be"
    elif bad == "average":
        state = optimizer.state[params[-1]]
        state["ema"], text = state["ema"].half(), r"shadows\[1\] must be of dtype bfloat16, float32 or float64"
    else:
        params[-2].data, text = torch.ones(5), r"shadows\[0\] must be of shape \(5,\)"
    before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    with pytest.raises((TypeError, ValueError), match=text):
        optimizer.step()
    after = optimizer.state_dict(), params
    for x, y in zip(before[1], after[1], strict=True):
        assert torch.equal(x, y)
    for i, own in before[0]["state"].items():
        for name, x in own.items():
            assert torch.equal(x, after[0]["state"][i][name]), (i, name)


def test_autograd_hears_of_a_step() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ft.AdamW([p], lr=0.1)
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def versions(optimizer: Any) -> list[int]:
    own = [x for p in optimizer.state for x in (p, *optimizer.state[p].values()) if x is not optimizer.state[p]["step"]]
    return [x._version for x in own]


@pytest.mark.parametrize("change", ["none", "loaded", "copied", "one replaced", "one swapped", "one elsewhere"])
def test_autograd_hears_of_every_state(change: str) -> None:
    """Their versions are counted together where the optimizer made them, and one by one where they came from elsewhere."""
    params = parameters()
    optimizer = ft.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, ema_decay=0.5)

    def step() -> None:
        for p in (q for group in optimizer.param_groups for q in group["params"]):
            p.grad = torch.ones_like(p)
        before = versions(optimizer)
        optimizer.step()
        if before:
            assert all(x > y for x, y in zip(versions(optimizer), before, strict=True))

    for _ in range(3):
        step()
    state = optimizer.state[params[1]]
    if change == "loaded":
        theirs = copy.deepcopy(optimizer.state_dict())
        optimizer = ft.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, ema_decay=0.5)
        optimizer.load_state_dict(theirs)
    elif change == "copied":
        optimizer = copy.deepcopy(optimizer)
    elif change == "one replaced":
        state["exp_avg"] = state["exp_avg"].clone()
    elif change == "one swapped":
        torch.utils.swap_tensors(state["exp_avg_sq"], state["exp_avg_sq"].clone())
    elif change == "one elsewhere":
        state["ema"].data = state["ema"].clone()
    for _ in range(3):
        step()
    kept = next(iter(optimizer.state.values()))["exp_avg"]
    w = torch.ones(kept.shape, requires_grad=True)
    loss = (w * kept).sum()
    step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_those_of_the_moment() -> None:
    """Of other parameters, anew, none, and while a parameter that is asked changes the list or asks again."""
    from fastops.torch._tensor_lists import GradientReader

    reader = GradientReader()
    params = parameters() * 5
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        found, complete = reader.read(params)
        assert complete
        assert all(g is p.grad for g, p in zip(found, params, strict=True))
    params[1].grad = None
    params[2].grad = torch.zeros_like(params[2])
    found, complete = reader.read(tuple(params))
    assert not complete
    assert found[1] is None
    assert found[2] is params[2].grad

    class Asked:
        @property
        def grad(self) -> str:
            if given:
                given.clear()
                assert reader.read(params[:3])[0][2] is params[2].grad
            return "asked"

        @property
        def _cdata(self) -> int:
            reader.read(params[:2])
            raise ValueError

    given: list[Any] = [Asked(), *params]
    found, complete = reader.read(given)
    assert not given
    assert found[0] == "asked"
    assert found[3] is params[2].grad
    with pytest.raises(AttributeError):
        reader.read([object()])
    with pytest.raises(TypeError):
        reader.read(None)
    assert reader.read([]) == ([], True)


def test_states_have_memory_of_their_own() -> None:
    """That their versions are counted together is all that they share."""
    p = [torch.nn.Parameter(torch.ones(n, dtype=t)) for n, t in ((3, torch.float32), (5, torch.float64))]
    optimizer = ft.AdamW(p, lr=0.1, ema_decay=0.5)
    for x in p:
        x.grad = torch.ones_like(x)
    optimizer.step()
    for x in p:
        for name in ("exp_avg", "exp_avg_sq", "ema"):
            own = optimizer.state[x][name]
            assert type(own) is torch.Tensor
            assert own.dtype is x.dtype
            assert own._base is None
            assert not own.requires_grad
            assert own.untyped_storage().nbytes() == own.nbytes
            assert own.storage_offset() == 0


@pytest.mark.parametrize("moment", ["made", "stepped"])
def test_the_default_device_and_dtype_are_not_those_of_states(moment: str) -> None:
    """On another device they could be no states of parameters here, and 256 + 1 = 256 in bfloat16."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)

    def make() -> Any:
        return ft.AdamW([p], lr=0.1, ema_decay=0.5)

    def step(optimizer: Any) -> None:
        optimizer.step()
        state = optimizer.state[p]
        assert all(x.device.type == "cpu" and x.dtype is torch.float32 for x in state.values())
        state["step"].fill_(256.0)
        optimizer.step()
        assert int(state["step"]) == 257

    with torch.device("meta"):
        optimizer = make()
        if moment == "stepped":
            step(optimizer)
    torch.set_default_dtype(torch.bfloat16)
    try:
        step(optimizer if moment == "made" else make())
    finally:
        torch.set_default_dtype(torch.float32)


def test_steps_in_inference_mode_and_after_it() -> None:
    """States that are made there could not be counted outside it, which was heard of when the parameters had moved."""
    ours, theirs = parameters(), parameters()
    mine, other = ft.AdamW(ours, lr=0.1, ema_decay=0.5), torch.optim.AdamW(theirs, lr=0.1)
    for mode in (True, False, True, False):
        for params in (ours, theirs):
            for p in params:
                p.grad = torch.ones_like(p)
        with torch.inference_mode(mode):
            mine.step()
        other.step()
    for x, y in zip(ours, theirs, strict=True):
        close(x, y, 4)
        assert not any(state.is_inference() for state in mine.state[x].values())


def test_steps_that_are_no_tensors() -> None:
    """As optimizers of torch had them once, and as they are written into a state."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    other = torch.optim.AdamW([p])
    other.step()
    theirs = other.state_dict()
    theirs["state"][0]["step"] = 1
    optimizer = ft.AdamW([p])
    optimizer.load_state_dict(theirs)
    for same in (optimizer.state_dict()["state"][0], *pickle.loads(pickle.dumps(optimizer)).state.values()):
        assert same["step"] == 1
        assert same["step"].dtype is torch.float32
    optimizer.step()
    assert int(optimizer.state[p]["step"]) == 2


def test_a_state_that_is_refused_changes_nothing() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer, other = ft.AdamW([p], lr=0.1), torch.optim.AdamW([p], amsgrad=True)
    for x in (optimizer, other):
        x.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="amsgrad must be False"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(x, after["state"][0][name]) for name, x in before["state"][0].items())
    optimizer.step()
    assert int(optimizer.state[p]["step"]) == 2


def test_options_that_a_state_does_not_have_stay() -> None:
    params = parameters()
    groups = [{"params": params[:2], "ema_decay": 0.5}, {"params": params[2:], "decoupled_weight_decay": False}]
    optimizer = ft.AdamW(groups, weight_decay=0.1)
    theirs = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.5).state_dict()
    for group in theirs["param_groups"]:
        # As of older versions of torch.
        group.pop("decoupled_weight_decay", None)
    optimizer.load_state_dict(theirs)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert [group["ema_decay"] for group in optimizer.param_groups] == [0.5, None]
    assert [group["decoupled_weight_decay"] for group in optimizer.param_groups] == [True, False]


def test_a_copy_leaves_the_lists_of_an_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """To make them anew takes as long as many steps."""
    params = parameters()
    optimizer = ft.AdamW(params)
    train(optimizer, params, 1)
    copied = copy.deepcopy(optimizer)
    monkeypatch.setattr(ft.AdamW, "_sort", None)
    train(optimizer, params, 1)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
    assert {int(state["step"]) for state in copied.state.values()} == {1}


def test_a_closure_and_copies() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ft.AdamW([p], lr=0.1, ema_decay=0.5)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    for same in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (q,) = same.param_groups[0]["params"]
        q.grad = torch.ones(3)
        same.step()
        assert int(same.state[q]["step"]) == 2
    assert int(optimizer.state[p]["step"]) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be"),
        ({"ema_decay": 2.0}, "ema_decay must be"),
        ({"weight_decay": float("nan")}, "weight_decay must be"),
    ],
    ids=str,
)
def test_wrong_options_of_adamw(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ft.AdamW(parameters(), **options)


def test_wrong_states_and_parameters_of_adamw() -> None:
    params = parameters()
    other = torch.optim.AdamW(params, amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad must be False"):
        ft.AdamW(params).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="ema_decay must be given"), ft.AdamW(params).average_parameters():
        pass
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    half.grad = torch.ones(3, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"params\[0\] must be of dtype float32 or float64"):
        ft.AdamW([half]).step()
    sparse = torch.nn.Parameter(torch.ones(3, 2))
    sparse.grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 2), (3, 2), check_invariants=True)
    with pytest.raises(TypeError, match=r"grads\[0\] must be a dense tensor"):
        ft.AdamW([sparse]).step()
    assert (sparse == 1).all()
