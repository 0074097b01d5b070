# SPDX-License-Identifier: BSD-3-Clause
"""`EMA`: swapping, states, pickles, fused steps, threads and failures."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance
from numpy.typing import NDArray
from samples import FLOATS, assert_same_bits, follow

import fastops
from fastops import averaging
from fastops.averaging import EMA

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("over_backend")


# Swapping.


@pytest.mark.parametrize("dtype", FLOATS)
def test_swap_and_back_keeps_every_bit(dtype: str) -> None:
    rng = np.random.default_rng(1)
    # Strided, Fortran, 0-d; the shadow is wider than the halves, so an exchange would lose bits of it.
    base = rng.standard_normal((6, 8)).astype(FLOATS[dtype])
    params = [base[::2, ::3], np.asfortranarray(base), base[1, 1:2].reshape(())]
    ema = EMA(params, 0.9)
    for p in params:
        p[...] = rng.standard_normal(p.shape)
    ema.update()
    before, shadows = [p.copy() for p in params], [s.copy() for s in ema.shadows]
    for _ in range(2):
        ema.swap_()
        for p, shadow in zip(params, shadows, strict=True):
            assert_same_bits(p, shadow.astype(p.dtype))
        ema.swap_()
        for p, old in zip(params, before, strict=True):
            assert_same_bits(p, old)
    for got, want in zip(ema.shadows, shadows, strict=True):
        assert_same_bits(got, want)


def test_context_restores_after_an_exception() -> None:
    p = np.zeros(2)
    ema = EMA([p], 0.5)
    follow(ema, p, [1.0])

    def work() -> None:
        with ema.average_parameters():
            assert p.tolist() == [0.5, 0.5]
            p[...] = 7.0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert p.tolist() == [1.0, 1.0]
    # Swapping back by hand inside is no harm.
    with ema.average_parameters():
        ema.swap_()
    assert p.tolist() == [1.0, 1.0]
    assert ema.update()


def test_nothing_updates_while_averages_are_swapped_in() -> None:
    p = np.zeros(2)
    ema = EMA([p], (0.5, 0.9))
    follow(ema, p, [1.0])
    state = ema.state_dict()
    with ema.average_parameters(1):
        for call in (ema.update, ema.copy_to_, lambda: ema.load_state_dict(state), ema.average_parameters().__enter__):
            with pytest.raises(RuntimeError, match="must be called when the parameters are back"):
                call()
        with pytest.raises(ValueError, match="profile must be 1, which is swapped in, got 0"):
            ema.swap_()
        for key, value in ema.state_dict().items():
            np.testing.assert_array_equal(value, state[key])
        # A pickle from here knows the parameters to go back to.
        other = pickle.loads(pickle.dumps(ema))
    assert p.tolist() == [1.0, 1.0]
    other.swap_(1)
    assert other._sources[0].tolist() == [1.0, 1.0]


def test_copy_to_writes_any_float_dtype() -> None:
    p, count = np.zeros((2, 2), np.float32), np.array(4)
    ema = EMA({"p": p, "count": count}, 0.5)
    follow(ema, p, [1.0])
    for dtype in FLOATS.values():
        out = {"count": np.array(0), "p": np.zeros((2, 2), dtype, order="F")}
        ema.copy_to_(out)
        assert out["p"].astype(np.float64).tolist() == [[0.5, 0.5]] * 2
        assert out["count"] == 4
    with np.errstate(all="raise"):
        p[...] = 1e30
        ema.update()
        ema.copy_to_({"count": np.array(0), "p": (out := np.zeros((2, 2), np.float16))})
    assert np.isinf(out).all()
    ema.copy_to_()
    assert p[0, 0] == np.float32(ema.shadows[0][0, 0])


def test_tied_weights_are_one_array_under_two_names() -> None:
    p = np.zeros(3)
    ema = EMA({"embedding": p, "head": p}, 0.5)
    follow(ema, p, [1.0])
    with ema.average_parameters():
        assert p.tolist() == [0.5] * 3
    assert p.tolist() == [1.0] * 3


def test_an_interrupt_is_heard_when_all_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [np.zeros(1) for _ in range(4)]
    ema = EMA(params, 0.5)
    for p in params:
        p[...] = 1.0
    ema.update()
    real, calls = np.copyto, []

    def interrupted(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args, **options)

    monkeypatch.setattr(np, "copyto", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ema.swap_()
    assert [p[0] for p in params] == [0.5] * 4
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        ema.swap_()
    assert [p[0] for p in params] == [1.0] * 4
    calls.clear()
    with pytest.raises(KeyboardInterrupt), ema.average_parameters():
        raise AssertionError("not reached")
    assert [p[0] for p in params] == [1.0] * 4
    assert ema.update()


# States.


def saved(state: dict[str, Any]) -> Any:
    """What a file of NumPy's makes of a state, without pickle."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **state)
    file.seek(0)
    return np.load(file, allow_pickle=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"debias": True},
        {"decay": (0.9, "equal")},
        {"warmup": "power", "sigma": (0.05, 0.1)},
        {"buffers": "average"},
        {"buffers": "skip"},
        {"nonfinite": "skip", "update_every": 3},
        pytest.param(
            {"shadow_dtype": "bfloat16", "seed": 3},
            marks=pytest.mark.skipif("bf16" not in FLOATS, reason="ml_dtypes is not installed"),
        ),
    ],
    ids=str,
)
def test_a_run_goes_on_from_a_file_as_if_uninterrupted(options: dict[str, Any]) -> None:
    def params() -> dict[str, Array]:
        return {
            "file": np.zeros((2, 3), np.float32),
            "0.w": np.zeros(2, FLOATS.get("bf16", np.float16)),
            "n": np.array(0),
        }

    def steps(ema: EMA, arrays: dict[str, Array], numbers: range) -> None:
        for i in numbers:
            for array in arrays.values():
                array[...] = np.random.default_rng(i).integers(0, 9, array.shape)
            if i == 6:
                arrays["file"][0] = np.nan if "nonfinite" in options else 1
            ema.update()

    whole, first, second = params(), params(), params()
    one, two, three = (EMA(arrays, **options) for arrays in (whole, first, second))
    steps(one, whole, range(12))
    steps(two, first, range(7))
    three.load_state_dict(saved(two.state_dict()))
    steps(three, second, range(7, 12))
    want, got = one.state_dict(), three.state_dict()
    assert want.keys() == got.keys()
    for key, value in want.items():
        assert_same_bits(np.asarray(got[key]), np.asarray(value))


def test_state_keys_are_the_names() -> None:
    ema = EMA({"layer.weight": np.ones(2), "n": np.array(1)}, (0.5, 0.9))
    names = {"shadow.0.layer.weight", "shadow.0.n", "shadow.1.layer.weight", "shadow.1.n"}
    numbers = {"step", "last", "updates", "averaged", "skipped", "totals", "debias"}
    state = ema.state_dict()
    assert set(state) == names | numbers
    state["shadow.0.layer.weight"][...] = 9.0
    assert ema.shadows[0][0].tolist() == [1.0, 1.0]


def test_loading_keeps_the_shadows_dtype() -> None:
    """torch_ema turns float32 shadows of bfloat16 parameters into bfloat16 when it loads them."""
    p = np.ones(3, FLOATS.get("bf16", np.float16))
    ema, other = EMA([p], 0.999), EMA([p.copy()], 0.999)
    follow(ema, p, [2.0])
    arrays = [id(shadow) for shadow in other.shadows]
    other.load_state_dict(ema.state_dict())
    assert other.shadows[0].dtype == np.float32
    assert_same_bits(other.shadows[0], ema.shadows[0])
    assert arrays == [id(shadow) for shadow in other.shadows]


@pytest.mark.skipif("bf16" not in FLOATS, reason="ml_dtypes is not installed")
@pytest.mark.parametrize("form", ["uint16", "void", "bfloat16"])
def test_bfloat16_states_load_in_every_form(form: str) -> None:
    p = np.array([1.5, -2.25, 3.0], np.float32)
    ema = EMA([p], shadow_dtype="bfloat16")
    state = ema.state_dict()
    assert state["shadow.0.0"].dtype == np.uint16
    if form == "void":
        state["shadow.0.0"] = saved({"a": ema.shadows[0]})["a"]
        assert state["shadow.0.0"].dtype == np.dtype("V2")
    elif form == "bfloat16":
        state["shadow.0.0"] = ema.shadows[0]
    other = EMA([np.zeros(3, np.float32)], shadow_dtype="bfloat16")
    other.load_state_dict(state)
    assert_same_bits(other.shadows[0], ema.shadows[0])


def _change(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, key: value}


WRONG_STATES: list[tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = [
    (lambda state: 3, TypeError, "state must be a mapping of names to arrays and numbers, got 3"),
    (lambda state: {k: v for k, v in state.items() if k != "step"}, ValueError, "with the key 'step'"),
    (lambda state: {k: v for k, v in state.items() if k != "shadow.0.b"}, ValueError, "with the key 'shadow.0.b'"),
    (_change("shadow.1.a", np.zeros(1)), ValueError, "without the key 'shadow.1.a'"),
    (_change("shadow.0.b", np.zeros(3)), ValueError, "state['shadow.0.b'] must be of shape (2,)"),
    (_change("shadow.0.b", np.zeros(2, np.float32)), TypeError, "state['shadow.0.b'] must be of dtype float64"),
    (_change("shadow.0.b", np.zeros(2, ">f8")), TypeError, "state['shadow.0.b'] must be of dtype float64"),
    (_change("shadow.0.b", [0.0, 0.0]), TypeError, "state['shadow.0.b'] must be"),
    (_change("step", -1), ValueError, "state['step'] must be an integer >= 0, got -1"),
    (_change("step", 1.5), TypeError, "state['step'] must be an integer"),
    (_change("last", 99), ValueError, "state['last'] must be an integer in [0, 1], got 99"),
    (_change("updates", "1"), TypeError, "state['updates'] must be an integer"),
    (_change("debias", 1), ValueError, "state['debias'] must be 0, as this EMA has it, got 1"),
    (_change("totals", np.zeros(2)), ValueError, "state['totals'] must be of shape (1,)"),
    (_change("totals", np.zeros(1, np.int64)), TypeError, "state['totals'] must be a float64 array"),
    (_change("totals", np.array([np.nan])), ValueError, "state['totals'] must be of numbers in [0, 1]"),
]


@pytest.mark.parametrize(("change", "kind", "text"), WRONG_STATES, ids=range(len(WRONG_STATES)))
def test_wrong_states_change_nothing(change: Callable[[dict[str, Any]], Any], kind: type[Exception], text: str) -> None:
    ema = EMA({"a": np.ones(1), "b": np.ones(2)}, 0.5)
    source = EMA({"a": np.full(1, 5.0), "b": np.full(2, 5.0)}, 0.5)
    source.update()
    with pytest.raises(kind) as caught:
        ema.load_state_dict(change(source.state_dict()))
    assert text in str(caught.value)
    assert [shadow[0] for shadow in ema.shadows] == [1.0, 1.0]
    assert ema.step == 0


def test_pickle_alone_and_with_its_model() -> None:
    model = {"w": np.zeros(2), "n": np.array(1)}
    ema = EMA(model, (0.5, 0.9), buffers="average", debias=True)
    follow(ema, model["w"], [1.0])
    for other_model, other in (pickle.loads(pickle.dumps((model, ema))), copy.deepcopy((model, ema))):
        other_model["w"] += 1.0
        assert other.update()
        assert other.shadows[0][0].tolist() == [1.25, 1.25]  # 0.5 + (2 - 0.5) / 2
        other.copy_to_(profile=0)
        assert model["w"].tolist() == [1.0, 1.0]
    alone = pickle.loads(pickle.dumps(ema))
    model["w"] += 8.0
    alone.update()
    assert alone.shadows[0][0].tolist() == [0.75, 0.75]
    # A shallow copy follows the same parameters with shadows of its own.
    shallow = copy.copy(ema)
    shallow.update()
    assert shallow.shadows[0][0].tolist() == [4.75, 4.75]
    assert ema.shadows[0][0].tolist() == [0.5, 0.5]
    assert repr(shallow) == "<fastops.EMA of 2 arrays, decay=0.5, 0.9, warmup='none', step 2>"


# Fused steps.


def test_a_fused_step_equals_two_calls() -> None:
    rng = np.random.default_rng(2)
    start = [rng.standard_normal(shape).astype(np.float32) for shape in ((5, 3), (4,))]
    fused, apart = [p.copy() for p in start], [p.copy() for p in start]
    options: dict[str, Any] = {"decay": 0.9, "warmup": "timm", "update_every": 2}
    one, two = EMA(fused, **options), EMA(apart, **options)
    m1, m2 = [np.zeros_like(p) for p in start], [np.zeros_like(p) for p in start]
    for _ in range(5):
        grads = [rng.standard_normal(p.shape).astype(np.float32) for p in start]
        fastops.sgd_step_(fused, grads, m1, lr=0.1, momentum=0.9, ema=one)
        fastops.sgd_step_(apart, grads, m2, lr=0.1, momentum=0.9)
        two.update()
    for got, want in zip(one.shadows, two.shadows, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance.average(10, 4.0, got.dtype))
    assert one.state_dict()["totals"] == two.state_dict()["totals"]
    assert (one.step, one.updates) == (5, 2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"decay": (0.9, 0.99)}, "ema must be of one profile for {}"),
        ({"nonfinite": "skip"}, "nonfinite must be 'propagate' for {}"),
        ({"buffers": "copy"}, "buffers must be 'skip' for {}"),
    ],
)
def test_a_fused_step_refuses_what_it_cannot_do(options: dict[str, Any], text: str) -> None:
    p = np.zeros(2)
    ema = EMA([p, *([np.array(1)] * ("buffers" in options))], **options)
    with pytest.raises(ValueError, match=text.format("advance")):
        ema.advance()
    with pytest.raises(ValueError, match=text.format("a fused step")):
        fastops.sgd_step_([p], [np.ones(2)], None, lr=0.1, ema=ema)
    assert ema.step == 0
    assert p.tolist() == [0.0, 0.0]


def test_a_fused_step_that_is_refused_does_not_count() -> None:
    p = np.zeros(2)
    ema = EMA([p], "equal")
    with pytest.raises(ValueError, match=r"grads\[0\] must be of shape"):
        fastops.sgd_step_([p], [np.ones(3)], None, lr=1.0, ema=ema)
    assert (ema.step, ema.updates) == (0, 0)
    fastops.sgd_step_([p], [np.ones(2)], None, lr=1.0, ema=ema)
    assert ema.shadows[0].tolist() == [-1.0, -1.0]
    with pytest.raises(ValueError, match="ema_decay must be None with an EMA"):
        fastops.sgd_step_([p], [np.ones(2)], None, lr=1.0, ema=ema, ema_decay=0.5)


def test_an_accumulating_step_counts_where_the_parameters_move() -> None:
    p, g, m = [np.zeros(2)], [np.ones(2)], [np.zeros(2)]
    ema = EMA(p, 0.5)
    for i in range(8):
        fastops.sgd_step_(p, g, m, lr=1.0, accumulate=(i, 4), ema=ema)
        assert ema.updates == (i + 1) // 4
    assert p[0].tolist() == [-2.0, -2.0]
    assert ema.shadows[0].tolist() == [-1.25, -1.25]


# Threads and failures.


def test_one_thread_at_a_time(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ema = EMA([np.zeros(2)], 0.5)
    errors: list[str] = []

    def meanwhile() -> None:
        state = {"step": 0}
        for call in (ema.update, ema.swap_, ema.copy_to_, ema.state_dict, ema.advance, lambda: pickle.dumps(ema)):
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))
        with pytest.raises(RuntimeError, match="one thread at a time"):
            ema.load_state_dict(state)

    class Slow:
        @staticmethod
        def ema_update(*arguments: Any) -> None:
            thread = threading.Thread(target=meanwhile)
            thread.start()
            thread.join()
            backend.ema_update(*arguments)

    monkeypatch.setattr(averaging, "_backend", Slow)
    assert ema.update()
    assert errors == ["an EMA must be used by one thread at a time, got a call during another"] * 6
    monkeypatch.setattr(averaging, "_backend", backend)
    assert ema.update()


@pytest.mark.parametrize("error", [MemoryError, ValueError("x"), RuntimeError("x")])
def test_a_failing_update_does_not_count(error: Any, backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        @staticmethod
        def ema_update(*_: Any) -> None:
            raise error

    ema = EMA([np.zeros(2)], 0.5, debias=True)
    before = ema.state_dict()
    monkeypatch.setattr(averaging, "_backend", Failing)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        ema.update()
    assert ema.state_dict().keys() == before.keys()
    assert all((ema.state_dict()[key] == before[key]).all() for key in before if key.startswith(("shadow", "totals")))
    assert ema.step == 0
    monkeypatch.setattr(averaging, "_backend", backend)
    assert ema.update()


def test_changed_parameters_are_named_and_nothing_moves() -> None:
    arrays = {"n": np.array(1), "a": np.zeros(2), "b": np.zeros((2, 2))}
    for buffers in ("copy", "average", "skip"):
        ema = EMA(arrays, 0.5, buffers=buffers)
        for change, kind, text in (
            ({"b": np.zeros(4)}, ValueError, "params['b'] must be of shape (2, 2), got (4,)"),
            ({"b": np.zeros((2, 2), int)}, TypeError, "params['b'] must be of dtype float16"),
            ({"b": None}, TypeError, "params['b'] must be an array in host memory"),
            ({"n": np.array(2.0)}, TypeError, "params['n'] must be of dtype int64"),
            ({"n": np.array([2])}, ValueError, "params['n'] must be of shape ()"),
        ):
            if "n" in change and buffers == "skip":
                continue
            with pytest.raises(kind) as caught:
                ema.update({**arrays, "a": np.ones(2), **change})
            assert text in str(caught.value)
            assert not any(shadow.any() for name, shadow in zip(ema.names, ema.shadows, strict=True) if name != "n")
            assert ema.step == 0
        assert ema.update()


def test_a_resized_parameter_is_named() -> None:
    p = [np.zeros(3), np.zeros(4)]
    ema = EMA(p, 0.5)
    p[0][...] = 1.0
    p[1].resize(5, refcheck=False)
    with pytest.raises(ValueError, match=r"params\[1\] must be of shape \(4,\)"):
        ema.update()
    assert not ema.shadows[0].any()
    with pytest.raises(ValueError, match=r"params\[1\] must be of shape \(4,\)"):
        ema.swap_()
    assert p[0].tolist() == [1.0] * 3
