# SPDX-License-Identifier: BSD-3-Clause
"""Steps over torch tensors: in place, seen by autograd, equal to torch's own where that is right, and never out of memory's bounds."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance
from child import run
from samples import assert_same_bits

import fastops
from fastops import optim as module

torch = pytest.importorskip("torch")

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


@pytest.fixture
def ops(backend: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The public functions, on a backend and CPU level."""
    monkeypatch.setattr(module, "_backend", backend)
    return module


def tensors(seed: int, *shapes: tuple[int, ...], dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def clones(items: list[Any]) -> list[Any]:
    return [x.detach().clone() for x in items]


SHAPES = [(3, 5), (), (0,), (70,), (2, 3, 4)]


# --- equal to torch ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [1e-4, 0.1, 0.3, 0.4999])
def test_average_has_the_bits_of_torch_lerp(ops: ModuleType, backend: ModuleType, target: str, w: float) -> None:
    """At the levels with FMA, where torch's own runs with FMA too; every tail, and one tensor that torch splits."""
    if backend.__name__ != "fastops.native" or target == "v2" or "NO AVX" in torch.backends.cpu.get_cpu_capability():
        pytest.skip("both sides need FMA")
    shapes = [(n,) for n in (*range(1, 70), 100_003)]
    s, p = tensors(1, *shapes), tensors(2, *shapes)
    want = clones(s)
    decay = 1.0 - w
    torch._foreach_lerp_(want, p, 1.0 - decay)
    ops.ema_update_(s, p, decay)
    for got, exact in zip(s, want, strict=True):
        assert_same_bits(got.numpy(), exact.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("w", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_average_within_the_bound_of_torch_lerp(ops: ModuleType, dtype: Any, w: float) -> None:
    s, p = tensors(3, *SHAPES, dtype=dtype), tensors(4, *SHAPES, dtype=dtype)
    want, before = clones(s), clones(s)
    for x, y in zip(want, p, strict=True):
        x.lerp_(y, w)
    ops.ema_update_(s, p, 1.0 - w)
    for got, exact, x, y in zip(s, want, before, p, strict=True):
        bound = 2 * tolerance.lerp(x.numpy(), y.numpy(), got.numpy().dtype)
        assert (np.abs(got.numpy() - exact.numpy()) <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"betas": (0.5, 0.9), "eps": 1e-3}], ids=str)
def test_adamw_follows_torch(ops: ModuleType, dtype: Any, options: dict[str, Any]) -> None:
    p = [torch.nn.Parameter(x) for x in tensors(5, (3, 5), (70,), (2, 3, 4), dtype=dtype)]
    theirs = [torch.nn.Parameter(x) for x in clones(p)]
    settings = {"lr": 0.01, "weight_decay": 0.01, **options}
    optimizer = torch.optim.AdamW(theirs, fused=True, **settings)
    m, v = ([torch.zeros_like(x) for x in p] for _ in range(2))
    for step in range(1, 5):
        gradients = tensors(10 + step, *(tuple(x.shape) for x in p), dtype=dtype)
        for x, g in zip(theirs, gradients, strict=True):
            x.grad = g.clone()
        optimizer.step()
        ops.adamw_step_(p, gradients, m, v, step=step, **settings)
        for x, y in zip(p, theirs, strict=True):
            # Each step adds at most some 4 lr, and two ways of rounding it.
            bound = (
                2 * step * tolerance.step(np.abs(y.detach().numpy()) + 0.1, tolerance.ADAM, y.detach().numpy().dtype)
            )
            assert (np.abs((x - y).detach().numpy()) <= bound).all()
    for x, y in zip(theirs, m, strict=True):
        np.testing.assert_allclose(y, optimizer.state[x]["exp_avg"], rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.0, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_sgd_follows_torch(ops: ModuleType, options: dict[str, Any]) -> None:
    """torch takes the first gradient undamped for the buffer: ours is filled with what makes the first step the same."""
    p = tensors(6, (3, 5), (70,), dtype=torch.float64)
    theirs = [torch.nn.Parameter(x) for x in clones(p)]
    optimizer = torch.optim.SGD(theirs, lr=0.1, **options)
    m = None
    for step in range(4):
        gradients = tensors(20 + step, *(tuple(x.shape) for x in p), dtype=torch.float64)
        for x, g in zip(theirs, gradients, strict=True):
            x.grad = g.clone()
        if options["momentum"] and m is None:
            decay, keep = options.get("weight_decay", 0.0), options["momentum"]
            rest = options.get("dampening", 0.0)
            m = [(g + decay * x) * rest / keep for g, x in zip(gradients, p, strict=True)]
        optimizer.step()
        ops.sgd_step_(p, gradients, m, lr=0.1, **options)
        for x, y in zip(p, theirs, strict=True):
            np.testing.assert_allclose(x, y.detach(), rtol=tolerance.DOUBLE, atol=tolerance.DOUBLE)


def test_lookahead_follows_lerp_and_copy(ops: ModuleType) -> None:
    slow, fast = tensors(7, *SHAPES), tensors(8, *SHAPES)
    want = clones(slow)
    for q, p in zip(want, fast, strict=True):
        q.lerp_(p, 0.3)
    old = clones(slow)
    ops.lookahead_sync_(slow, fast, 0.3)
    for q, exact, p, before in zip(slow, want, fast, old, strict=True):
        bound = 2 * tolerance.lerp(before.numpy(), p.numpy(), F32) + 1e-6
        assert (np.abs(q.numpy() - exact.numpy()) <= bound).all()
        assert torch.equal(p, q)


def test_lazy_rows_follow_sparse_adam(ops: ModuleType) -> None:
    p = tensors(9, (20, 3), dtype=torch.float64)
    theirs = [torch.nn.Parameter(p[0].clone())]
    # Ours divides eps by the root of the bias correction, as AdamW does: too small to be seen.
    optimizer = torch.optim.SparseAdam(theirs, lr=0.1, eps=1e-30)
    m, v = [torch.zeros(20, 3, dtype=torch.float64)], [torch.zeros(20, 3, dtype=torch.float64)]
    for step in range(1, 4):
        rows = torch.randperm(20, generator=torch.Generator().manual_seed(step))[:6]
        g = tensors(30 + step, (6, 3), dtype=torch.float64)[0]
        theirs[0].grad = torch.sparse_coo_tensor(rows[None], g, (20, 3), check_invariants=True)
        optimizer.step()
        ops.lazy_adamw_rows_(p, [g], m, v, [rows], step=step, lr=0.1, eps=1e-30)
        np.testing.assert_allclose(p[0], theirs[0].detach(), rtol=tolerance.DOUBLE, atol=tolerance.DOUBLE)


# --- tensors -----------------------------------------------------------------------------------------------------------------------


def test_every_kind_of_tensor_is_updated_in_place(ops: ModuleType) -> None:
    def both(s: Any, p: Any) -> None:
        base, like = s.detach().numpy().copy(), p.detach().float().numpy()
        ops.ema_update_([s], [p], 0.5)
        np.testing.assert_allclose(s.detach().numpy(), 0.5 * (base + like), rtol=1e-6)

    both(torch.zeros(3, 5), torch.ones(3, 5))
    both(torch.nn.Parameter(torch.zeros(7)), torch.nn.Parameter(torch.ones(7)))
    both(torch.zeros(5, 3).t(), torch.arange(15.0).reshape(3, 5))
    both(torch.zeros(10)[::2], torch.ones(5, requires_grad=True) * 2)
    both(torch.zeros(3, 4), torch.arange(4.0).expand(3, 4))
    both(torch.zeros(()), torch.ones(()))
    both(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.ones(2, 3, 4, 4))
    both(torch.zeros(9), torch.linspace(0, 1, 9).half())
    with torch.inference_mode():
        s = torch.zeros(4)
    both(s, torch.ones(4))
    if fastops._validate.bfloat16() is not None:
        both(torch.zeros(9), torch.linspace(0, 1, 9).bfloat16())
        s = torch.full((5,), 0.5, dtype=torch.bfloat16)
        ops.ema_update_([s], [torch.ones(5)], 0.5, rounding="stochastic", seed=1)
        assert (s == 0.75).all()
    mixed = np.zeros(4, np.float32)
    ops.ema_update_([mixed], [torch.ones(4)], 0.5)
    assert (mixed == 0.5).all()


def test_gradients_of_parameters_are_zeroed_in_place(ops: ModuleType) -> None:
    p = torch.nn.Parameter(torch.ones(5))
    (p * p).sum().backward()
    gradient = p.grad
    ops.sgd_step_([p], [p.grad], None, lr=0.1, zero_grad=True)
    assert (p.detach() == 0.8).all()
    assert p.grad is gradient
    assert (gradient == 0).all()


@pytest.mark.parametrize("plan", [False, True])
def test_autograd_hears_of_every_tensor_that_was_written(ops: ModuleType, plan: bool) -> None:
    """Otherwise a backward pass would go on with the new values, silently."""
    p, s = torch.ones(4, requires_grad=True), torch.zeros(4)
    g, m, v = torch.ones(4), torch.zeros(4), torch.zeros(4)
    loss = (p * p).sum()
    lists = [fastops.TensorList([x]) if plan else [x] for x in (p, g, m, v, s)]
    for _ in range(2):
        before = [x._version for x in (p, g, m, v, s)]
        ops.adamw_step_(*lists[:4], step=1, lr=0.1, ema=lists[4], ema_decay=0.5)
        assert [x._version > y for x, y in zip((p, g, m, v, s), before, strict=True)] == [True, False, True, True, True]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    before = [x._version for x in (p, s)]
    ops.ema_update_(lists[4], lists[0], 0.5)
    assert [x._version - y for x, y in zip((p, s), before, strict=True)] == [0, 1]


def test_autograd_hears_of_tensors_with_few_counters(ops: ModuleType) -> None:
    """Views of one tensor have one counter of versions; of two, each is told."""
    first, second = torch.zeros(64), torch.zeros(64)
    parts = [*first.split(8), *second.split(8)]
    for views in (parts[:8], parts, [parts[0], parts[9], *parts[10:]]):
        s, p = fastops.TensorList(views), fastops.TensorList([torch.ones(8) for _ in views])
        for _ in range(3):
            before = [x._version for x in views]
            ops.ema_update_(s, p, 0.5)
            assert all(x._version > y for x, y in zip(views, before, strict=True))
    # The counter goes with what is swapped in.
    alone = [torch.zeros(8).detach() for _ in range(3)]
    s, p = fastops.TensorList(alone), fastops.TensorList([torch.ones(8) for _ in alone])
    ops.ema_update_(s, p, 0.5)
    torch.utils.swap_tensors(alone[1], torch.zeros(8))
    before = [x._version for x in alone]
    ops.ema_update_(s, p, 0.5)
    assert all(x._version > y for x, y in zip(alone, before, strict=True))
    with torch.inference_mode():
        quiet = [torch.zeros(4) for _ in range(2)]
    s, p = fastops.TensorList(quiet), fastops.TensorList([torch.ones(4) for _ in quiet])
    ops.ema_update_(s, p, 0.5)
    assert all((x == 0.5).all() for x in quiet)


FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "meta": (lambda: torch.ones(4, device="meta"), TypeError, "on meta"),
    "sparse": (lambda: torch.ones(4).to_sparse(), TypeError, "layout sparse_coo"),
    "csr": (lambda: torch.ones(2, 2).to_sparse_csr(), TypeError, "layout sparse_csr"),
    "float8": (lambda: torch.ones(4, dtype=torch.float8_e4m3fn), TypeError, "float8_e4m3fn"),
    "integers": (lambda: torch.ones(4, dtype=torch.int64), TypeError, "int64"),
    "complex": (lambda: torch.ones(4, dtype=torch.complex64), TypeError, "complex64"),
    "negative": (lambda: torch.imag((torch.ones(4) * 1j).conj()), TypeError, "NumPy can share"),
    "one negative": (lambda: torch.imag((torch.ones(1) * 1j).conj()), TypeError, "NumPy can share"),
    "shape": (lambda: torch.ones(5), ValueError, "of shape"),
    "no storage": (lambda: _emptied(torch.ones(4)), ValueError, "storage holds its elements"),
    "no storage at an offset": (
        lambda: _emptied(torch.ones(1 << 20)[1 << 19 : (1 << 19) + 4]),
        ValueError,
        "storage holds",
    ),
}


def _shrunk(x: Any) -> Any:
    x.untyped_storage().resize_(8)
    return x


def _emptied(x: Any) -> Any:
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("i", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_tensor_leaves_all_untouched(ops: ModuleType, fault: str, i: int, written: bool) -> None:
    make, kind, text = FAULTS[fault]
    s, p = [torch.zeros(4) for _ in range(3)], [torch.ones(4) for _ in range(3)]
    odd = make()
    (s if written else p)[i] = odd
    if tuple(odd.shape) != (4,) and kind is TypeError:
        (p if written else s)[i] = torch.zeros(odd.shape)
    with pytest.raises(kind, match=rf"^(shadows|params)\[{i}\] must be ") as caught:
        ops.ema_update_(s, p, 0.5)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 200
    assert all((x == 0).all() for k, x in enumerate(s) if k != i)


def test_partial_overlap_and_folded_tensors(ops: ModuleType) -> None:
    base = torch.zeros(10)
    with pytest.raises(ValueError, match="memory apart from"):
        ops.ema_update_([base[:6]], [base[4:]], 0.5)
    with pytest.raises(ValueError, match="overlapping strides"):
        ops.ema_update_([torch.zeros(4).expand(3, 4)], [torch.ones(3, 4)], 0.5)
    same = torch.zeros(4)
    with pytest.raises(ValueError, match="memory apart from"):
        ops.ema_update_([same, same], [torch.ones(4), torch.ones(4)], 0.5)
    with pytest.raises(ValueError, match="memory apart from"):
        ops.ema_update_([same], [same.view(2, 2).view(4)], 0.5)
    assert (base == 0).all()
    assert (same == 0).all()


@pytest.mark.parametrize("verify", [True, False])
def test_tensor_list_has_the_new_storage(ops: ModuleType, verify: bool) -> None:
    """By itself where it verifies, else after `refresh`."""
    s, p = torch.zeros(1000), torch.ones(1000)
    plan, params = (fastops.TensorList([x], verify=verify) for x in (s, p))

    def refresh() -> None:
        if not verify:
            plan.refresh()
            params.refresh()

    for _ in range(2):
        ops.ema_update_(plan, params, 0.5)
    s.data = torch.full((1000,), 7.0)
    refresh()
    ops.ema_update_(plan, params, 0.5)
    assert (s == 4).all()
    s.data = torch.zeros(10)
    refresh()
    with pytest.raises(ValueError, match=r"^shadows\[0\] must be of shape \(1000,\)"):
        ops.ema_update_(plan, params, 0.5)
    s.data = torch.zeros(1000)
    p.data = _emptied(torch.ones(1000))
    refresh()
    with pytest.raises(ValueError, match=r"^params\[0\] must be a tensor whose storage holds"):
        ops.ema_update_(plan, params, 0.5)
    assert (s == 0).all()


def test_a_list_that_was_refused_is_looked_at_anew(ops: ModuleType) -> None:
    """All of it: what lies before the tensor at fault may have moved, and memory that is gone must not be written."""
    s = [torch.zeros(4) for _ in range(3)]
    shadows, params = fastops.TensorList(s), fastops.TensorList([torch.ones(4) for _ in s])
    for _ in range(2):
        ops.ema_update_(shadows, params, 0.5)
    old = s[0].data
    s[0].data = torch.zeros(4)
    away = torch.zeros(4, device="meta")
    torch.utils.swap_tensors(s[1], away)
    with pytest.raises(TypeError, match=r"^shadows\[1\] must be an array in host memory"):
        ops.ema_update_(shadows, params, 0.5)
    torch.utils.swap_tensors(s[1], away)
    ops.ema_update_(shadows, params, 0.5)
    assert (old == 0.75).all()
    assert [x.tolist() for x in s] == [[0.5] * 4, [0.875] * 4, [0.875] * 4]


def test_walks_are_made_by_plans_alone(native: ModuleType) -> None:
    """One without tensors read memory at address 0."""
    items = tensors(60, (3,), (4,), (5,))
    kept = fastops.TensorList(items)
    native.optim.all_finite(kept)
    walk = kept._plan.walk(tuple(items))
    with pytest.raises(TypeError):
        type(walk)()
    with pytest.raises(TypeError):
        copy.copy(walk)
    assert all(x is y for x, y in zip(walk, items, strict=True))


def test_an_error_while_gradients_are_remembered(native: ModuleType) -> None:
    """The next step finds nothing of what was remembered by half. In a process of its own: it read memory at address 0."""
    code = """
    import threading, torch
    count = 40

    class Name:
        def __str__(self):
            Meta.asked += 1
            if Meta.asked == count + 1:
                raise KeyError("asked")
            return "mine"

    class Meta(type(torch.Tensor)):
        asked = count + 1
        __module__ = property(lambda cls: Name())

    def step(shadows, kinds):
        fastops.ema_update_(shadows, [torch.ones(4).as_subclass(kind) for kind in kinds], 0.5)

    def run():
        # A thread knows as many types as it meets first, and asks the others each time.
        for i in range(70):
            step([torch.zeros(4)], [type(f"Kind{i}", (torch.Tensor,), {})])
        odd = Meta("Odd", (torch.Tensor,), {})
        shadows = fastops.TensorList([torch.zeros(4) for _ in range(count)])
        Meta.asked = 0
        try:
            step(shadows, [odd] * count)
        except KeyError:
            raised.append(True)
        step(shadows, [odd] * count)
        values.extend(shadows)

    raised, values = [], []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised
    assert len(values) == count
    assert all((x == 0.5).all() for x in values)
    """
    run(code, timeout=90)


def test_axes_of_one_element_have_any_stride(ops: ModuleType) -> None:
    """Their multiples, which overflowed, move nothing."""
    x, s = torch.arange(8.0).as_strided((1, 3), (2**62, 2)), torch.zeros(1, 3)
    ops.ema_update_([s], [x], 0.5)
    assert s.tolist() == [[0.0, 1.0, 2.0]]
    ops.ema_update_([x], [s], 0.5)
    assert x.tolist() == [[0.0, 1.5, 3.0]]


def test_gradients_beside_kept_lists_may_be_others_in_each_step(ops: ModuleType) -> None:
    """Anew, back where they were, of another dtype, among NumPy's arrays: as lists alone have it."""
    shapes = [(5,), (), (3, 4), (0,), (9,), (1,)]
    p, m, s = (tensors(seed, *shapes) for seed in (40, 41, 42))
    v = [x.square() for x in tensors(43, *shapes)]
    plain = [clones(x) for x in (p, m, v, s)]
    kept = [fastops.TensorList(x) for x in (p, m, v, s)]
    first = tensors(44, *shapes)
    room = torch.zeros(64)
    apart = [room[i * 16 : i * 16 + 9] for i in range(3)]
    batches: list[list[Any]] = [
        first,
        tensors(45, *shapes),
        [*tensors(46, *shapes[:4]), apart[1], first[5]],
        [*first[:4], apart[2].fill_(0.5), first[5]],
        [x.half() for x in first],
        [x.numpy() for x in tensors(47, *shapes)],
        [x.numpy() for x in tensors(48, *shapes)],
        first,
    ]
    for step, gradients in enumerate(batches, 1):
        for lists in (kept, plain):
            x, y, z, w = lists
            ops.adamw_step_(x, gradients, y, z, step=step, lr=0.1, ema=w, ema_decay=0.5)
        for got, want in zip(kept, plain, strict=True):
            for a, b in zip(got, want, strict=True):
                assert_same_bits(a.numpy(), b.numpy())


def test_gradients_beside_kept_lists_are_looked_at_anew(ops: ModuleType) -> None:
    p, m, v = (tensors(seed, (4,), (1,), (3, 2)) for seed in (50, 51, 52))
    v = [x.square() for x in v]
    kept = [fastops.TensorList(x) for x in (p, m, v)]

    def step(gradients: list[Any], **options: Any) -> None:
        ops.adamw_step_(kept[0], gradients, *kept[1:], step=1, lr=0.1, **options)

    good = [torch.ones(4), torch.ones(1), torch.ones(3, 2)]
    other = [torch.ones(4), torch.ones(1), torch.ones(3, 2)]
    beside = torch.cat([torch.ones(6), torch.ones(6)])
    faults: list[tuple[int, Any, type[Exception], str]] = [
        (0, m[2].view(6)[:4], ValueError, "memory apart from"),
        (0, p[0], ValueError, "memory apart from"),
        (2, v[2], ValueError, "memory apart from"),
        (0, torch.ones(5), ValueError, "of shape"),
        (2, torch.ones(2, 3), ValueError, "of shape"),
        (1, torch.imag((torch.ones(1) * 1j).conj()), TypeError, "NumPy can share"),
        (2, _emptied(torch.ones(3, 2)), ValueError, "storage holds its elements"),
        (2, _emptied(beside[6:].view(3, 2)), ValueError, "storage holds its elements"),
        (2, _shrunk(torch.ones(3, 2)), ValueError, "storage holds its elements"),
        (0, torch.ones(4, dtype=torch.float64), TypeError, "of dtype"),
        (0, torch.ones(4, device="meta"), TypeError, "on meta"),
    ]
    for i, fault, kind, text in faults:
        for gradients in (good, other):
            step(gradients)
        before = clones([*p, *m, *v])
        bad = list(good)
        bad[i] = fault
        with pytest.raises(kind, match=text):
            step(bad)
        for x, y in zip(before, [*p, *m, *v], strict=True):
            assert torch.equal(x, y)
    with pytest.raises(ValueError, match=r"^grads must be a list of 3 arrays"):
        step(good[:2])
    # A sign that torch puts off leaves the address as it is.
    number = torch.ones(1) * 1j
    step([good[0], torch.view_as_real(number)[..., 1], good[2]])
    with pytest.raises(TypeError, match="NumPy can share"):
        step([good[0], torch.imag(number.conj()), good[2]])
    # Where they are written, too.
    for gradients in (good, other, good):
        step(gradients, zero_grad=True)
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("moment", ["the look", "the record"])
def test_a_list_that_is_emptied_while_its_tensors_are_asked(native: ModuleType, moment: str) -> None:
    """The step is one of the tensors that were given. In a process of its own: it read memory that was freed."""
    code = """
    import torch
    n = 48
    p, m, v = ([torch.zeros(4) for _ in range(n)] for _ in range(3))
    kept = [fastops.TensorList(x) for x in (p, m, v)]
    given, junk = [], []

    def spoil():
        if given:
            given.clear()
            junk.extend(bytearray(b"A" * (8 * n - 1)) for _ in range(200))

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, f, types, args=(), kwargs=None):
            if "is_neg" in str(f):
                spoil()
            return super().__torch_function__(f, types, args, kwargs or {})

    class Refused(torch.Tensor):
        @classmethod
        def __torch_function__(cls, f, types, args=(), kwargs=None):
            if "is_neg" in str(f) and given:
                spoil()
                return True
            return super().__torch_function__(f, types, args, kwargs or {})

    def step(number, first, dtype=torch.float32):
        tensors = [first, *(torch.ones(4, dtype=dtype) for _ in range(n - 1))]
        given[:] = tensors
        fastops.adamw_step_(kept[0], given, kept[1], kept[2], step=number, lr=0.1, weight_decay=0.0)

    step(1, torch.ones(4))
    if os.sys.argv[1] == "the look":
        step(2, torch.ones(4).as_subclass(Refused))
    else:
        step(2, torch.ones(4, dtype=torch.float16).as_subclass(Asked), torch.float16)
    assert not given
    for x in p:
        assert torch.allclose(x, torch.full((4,), -0.2), atol=1e-6), x
    """
    run(code, arguments=[moment], timeout=90)


def test_tensors_that_stand_for_others_are_refused(ops: ModuleType) -> None:
    def inner(x: Any) -> Any:
        with pytest.raises(TypeError, match=r"^params\[0\] must be a tensor that NumPy can share"):
            ops.ema_update_([torch.zeros(4)], [x], 0.5)
        return (x * x).sum()

    torch.vmap(inner)(torch.ones(3, 4))
    torch.func.grad(inner)(torch.ones(4))


def test_a_training_loop_with_native_steps(native: ModuleType) -> None:
    """In a process of its own, with torch's threads beside ours."""
    code = """
    import torch
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    p = list(model.parameters())
    m, v, ema = ([torch.zeros_like(x) for x in p] for _ in range(3))
    x = torch.randn(512, 20)
    y = (x[:, :3] * 3).argmax(dim=1)
    losses = []
    for step in range(1, 151):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        fastops.adamw_step_(p, [q.grad for q in p], m, v, step=step, lr=0.01, ema=ema, ema_decay=0.9, zero_grad=True)
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], losses[::30]
    assert all((q.grad == 0).all() for q in p)
    assert max((a - q).abs().max() for a, q in zip(ema, p)) < 0.2
    """
    run(code, timeout=90)
