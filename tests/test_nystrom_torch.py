# SPDX-License-Identifier: BSD-3-Clause
"""Nystrom attention beside torch: results and gradients equal those of its formulas under autograd."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance
from pages import DOCS

from fastops import attention as module

torch = pytest.importorskip("torch")


@pytest.fixture
def ops(backend: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The public functions, on a backend and CPU level."""
    monkeypatch.setattr(module, "_backend", backend)
    return module


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's threads take longer to meet than these small arrays need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def means(x: Any, m: int) -> Any:
    """Of the rows of (N, D), by a matrix."""
    n = x.shape[0]
    short = m - n % m
    of = torch.repeat_interleave(torch.arange(m), torch.tensor([n // m + (i >= short) for i in range(m)]))
    share = torch.nn.functional.one_hot(of, m).to(x.dtype)
    return (share / share.sum(0)).T @ x


def sample(q: Any, k: Any, v: Any, m: int, pinv: str, normalize: bool) -> Any:
    """One head of valid rows."""
    s = q.shape[-1] ** -0.5
    if min(len(q), len(k)) <= m:
        return torch.softmax(s * q @ k.T, -1) @ v
    qt, kt = means(q, m), means(k, m)
    first, a, third = (torch.softmax(s * x @ y.T, -1) for x, y in ((q, kt), (qt, kt), (qt, k)))
    one, c = torch.eye(m, dtype=q.dtype), a.sum(0).max() * a.sum(1).max()
    if pinv == "ridge":
        z = torch.linalg.solve(a.T @ a + c / 1178 * one, a.T)
    else:
        z = a.T / c
        for _ in range(6):
            x = a @ z
            z = z @ (13 * one - x @ (15 * one - x @ (7 * one - x))) / 4
    y = first @ z @ third
    return (y / y.sum(-1, keepdim=True) if normalize else y) @ v


def attention(q: Any, k: Any, v: Any, m: int, pinv: str, normalize: bool, mask: Any, w: Any) -> Any:
    """Of (B, H, N, D) tensors, as many queries as keys."""
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            own = mask[b]
            y = torch.zeros(q.shape[2], v.shape[3], dtype=q.dtype)
            y[own] = sample(q[b, h, own], k[b, g, own], v[b, g, own], m, pinv, normalize)
            values = (v[b, g] * own[:, None]).T[:, None]
            y = y + torch.nn.functional.conv1d(values, w[h][None, None], padding=w.shape[1] // 2)[:, 0].T * own[:, None]
            rows.append(y)
    return torch.stack(rows).reshape(*q.shape[:3], v.shape[3])


@pytest.mark.parametrize("pinv", ["newton", "ridge"])
@pytest.mark.parametrize("normalize", [False, True], ids=["sums", "normalized"])
def test_results_and_gradients_are_those_of_autograd(ops: ModuleType, pinv: str, normalize: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    b, h, heads, n, d, e, m = 3, 4, 2, 45, 8, 5, 6
    shapes = (b, h, n, d), (b, heads, n, d), (b, heads, n, e), (h, 5)
    mask = torch.arange(n) < torch.tensor([[n], [5], [31]])
    for dtype in (torch.float64, torch.float32):
        arrays = [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]
        want = attention(*arrays[:3], m, pinv, normalize, mask, arrays[3])
        dy = torch.randn(want.shape, generator=generator, dtype=dtype)
        want.backward(dy)
        q, k, v, w = (x.detach().numpy() for x in arrays)
        options: dict[str, Any] = {"num_landmarks": m, "pinv": pinv, "normalize": normalize, "key_mask": mask.numpy()}
        y = ops.nystrom_attention(q, k, v, **options, conv_weight=w)
        found = ops.nystrom_attention_backward(dy.numpy(), q, k, v, **options, conv_weight=w)
        # Both sides are off.
        exact = want.detach().numpy()
        assert np.linalg.norm(y - exact) <= 2 * tolerance.nystrom(y.dtype) * np.linalg.norm(exact)
        for got, x in zip(found, arrays, strict=True):
            exact = x.grad.numpy()
            assert np.linalg.norm(got - exact) <= 2 * tolerance.nystrom_gradient(y.dtype) * np.linalg.norm(exact)


def test_tensors_are_read_in_place(ops: ModuleType) -> None:
    q, k, v = (torch.randn(1, 2, 20, 4) for _ in range(3))
    y = ops.nystrom_attention(q, k, v, num_landmarks=4)
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, ops.nystrom_attention(q.numpy(), k.numpy(), v.numpy(), num_landmarks=4))


@pytest.mark.parametrize("pinv", ["newton", "ridge"])
def test_the_recipe_of_the_pages_is_differentiable(ops: ModuleType, pinv: str) -> None:
    """Its code as it stands there, by torch's own check."""
    text = (DOCS / "attention.md").read_text(encoding="utf-8")
    (code,) = (x for x in re.findall(r"^```py\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if "Nystrom" in x)
    scope: dict[str, Any] = {}
    exec(compile(code, "attention.md", "exec"), scope)
    function = scope["NystromAttention"]
    generator = torch.Generator().manual_seed(2)
    shapes = (2, 2, 12, 3), (2, 1, 12, 3), (2, 1, 12, 2)
    arrays = [torch.randn(x, generator=generator, dtype=torch.float64, requires_grad=True) for x in shapes]
    taps = torch.randn((2, 3), generator=generator, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"key_mask": torch.arange(12) < torch.tensor([[12], [7]])}, {"normalize": True}):
        options = {"num_landmarks": 4, "pinv": pinv, **options}
        assert torch.autograd.gradcheck(lambda *x, of=options: function.apply(*x, None, of), arrays)
        assert torch.autograd.gradcheck(lambda *x, of=options: function.apply(*x, of), [*arrays, taps])
    for dtype in (torch.float32, torch.float16):
        narrow = [x.detach().to(dtype).requires_grad_() for x in arrays]
        w = taps.detach().to(dtype).requires_grad_()
        y = function.apply(*narrow, w, {"num_landmarks": 4, "pinv": pinv})
        y.sum().backward()
        assert [x.grad.dtype for x in (*narrow, w)] == [dtype] * 4
