# SPDX-License-Identifier: BSD-3-Clause
"""Attention beside torch: gradients equal autograd's, softmax attention equals scaled_dot_product_attention, tensors are read."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tolerance
from quadratic import DECAYING, MAPS

import fastops
from fastops import attention as module

torch = pytest.importorskip("torch")

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
both = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])


@pytest.fixture
def ops(backend: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The public functions, on a backend and CPU level."""
    monkeypatch.setattr(module, "_backend", backend)
    return module


def features(x: Any, name: str, scale: float, projection: Any) -> Any:
    if name == "elu":
        return torch.nn.functional.elu(x) + 1
    if name == "relu":
        return torch.relu(x) + 0.1
    if name == "relu2":
        return torch.relu(x) ** 2 + 0.1
    if name in ("exp", "softmax"):
        return torch.exp(scale * x)
    if name == "favor":
        x = math.sqrt(scale) * x
        return torch.exp(x @ projection.T - 0.5 * (x * x).sum(-1, keepdim=True)) / math.sqrt(len(projection))
    if name == "cosine":
        return torch.cat([torch.nn.functional.normalize(x, dim=-1), torch.ones_like(x[..., :1])], -1)
    return x


def attention(q: Any, k: Any, v: Any, name: str, causal: bool, mask: Any, decay: Any, projection: Any) -> Any:
    """All pairs, in torch's operations, of (B, H, N, D) tensors."""
    n, m, repeats = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if name in ("identity", "exp", "favor") else 1.0
    fq, fk = (features(x, name, scale, projection) for x in (q, k))
    weight = torch.ones(n, m, dtype=q.dtype)
    weight = torch.tril(weight, m - n) if causal else weight
    weight = weight * mask[:, :, None]
    if decay is not None:
        sums = torch.cumsum(decay, -1)
        weight = weight * torch.exp(torch.clamp(sums[:, :, m - n :, None] - sums[:, :, None], max=0))
    fk, v, weight = (x.repeat_interleave(repeats, 1) for x in (fk, v, weight))
    if name == "softmax":
        p = fq / fq.sum(-1, keepdim=True)
        each = weight[..., None] * fk[:, :, None]
        return torch.einsum("bhid,bhijd,bhje->bhie", p, each / each.sum(3, keepdim=True), v)
    w = (fq @ fk.transpose(-1, -2)) * weight
    if name == "identity":
        return scale * w @ v
    return (w / w.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("name", MAPS)
@both
def test_gradients_are_those_of_autograd(ops: ModuleType, name: str, causal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    b, h, heads, n, m, d, e = 2, 4, 2, 19, 23, 5, 3
    shapes = (b, h, n, d), (b, heads, m, d), (b, heads, m, e)
    for dtype, (masked, decays) in (
        (torch.float64, (False, False)),
        (torch.float64, (True, True)),
        (torch.float32, (True, True)),
    ):
        arrays = [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]
        mask = torch.rand((b, heads, m), generator=generator) < 0.7 if masked else torch.ones(b, heads, m, dtype=bool)
        mask[..., :6] = True
        decay = (
            -torch.rand((b, heads, m), generator=generator, dtype=dtype)
            if decays and causal and name in DECAYING
            else None
        )
        w = torch.from_numpy(fastops.favor_projection(d, 6, rng=3)).to(dtype) if name == "favor" else None
        want = attention(*arrays, name, causal, mask, decay, w)
        dy = torch.randn(want.shape, generator=generator, dtype=dtype)
        want.backward(dy)
        options: dict[str, Any] = {"causal": causal, "feature_map": name, "key_mask": mask.numpy()}
        options.update({} if w is None else {"projection": w.numpy()})
        options.update({} if decay is None else {"decay": decay.numpy()})
        options.update({"kernel_eps": 0.1} if name in ("relu", "relu2") else {})
        q, k, v = (x.detach().numpy() for x in arrays)
        y = ops.linear_attention(q, k, v, **options)
        found = ops.linear_attention_backward(dy.numpy(), q, k, v, y, **options)
        size = float(dy.abs().max()) * 4
        bound = tolerance.attention_gradient(max(size, float(want.detach().abs().max())), 8.0, y.dtype, y.dtype)
        assert np.abs(y - want.detach().numpy()).max() <= bound
        for got, x in zip(found, arrays, strict=True):
            most = max(size, float(x.grad.abs().max()) * 4)
            assert np.abs(got - x.grad.numpy()).max() <= tolerance.attention_gradient(most, 8.0, y.dtype, y.dtype)


@both
def test_softmax_attention_is_torchs(ops: ModuleType, causal: bool) -> None:
    """Of as many queries as keys: torch aligns the diagonal of others at the first row, we at the last."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn((2, 3, 50, 16), generator=generator) for _ in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).numpy()
    got = ops.softmax_attention(q, k, v, causal=causal)
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * float(tolerance.attention(8.0, 4.0, 20.0, F32)))
    mask = torch.rand((2, 50), generator=generator) < 0.7
    mask[:, 0] = True
    pairs = mask[:, None, None] & (torch.ones(50, 50, dtype=bool).tril() if causal else torch.ones(50, 50, dtype=bool))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=pairs).numpy()
    got = ops.softmax_attention(q, k, v, causal=causal, key_mask=mask)
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * float(tolerance.attention(8.0, 4.0, 20.0, F32)))
    # Five queries over a cache of fifty keys see it as the last five rows do.
    last = ops.softmax_attention(q[:, :, -5:], k, v, causal=causal)
    np.testing.assert_allclose(
        last,
        ops.softmax_attention(q, k, v, causal=causal)[:, :, -5:],
        rtol=0,
        atol=float(tolerance.attention(8.0, 4.0, 20.0, F32)),
    )


def test_tensors_are_read_in_place(ops: ModuleType) -> None:
    q, k, v = (torch.randn(1, 2, 9, 4) for _ in range(3))
    y = ops.linear_attention(q, k, v, causal=True)
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, ops.linear_attention(q.numpy(), k.numpy(), v.numpy(), causal=True))
    out = np.zeros((1, 2, 9, 4), np.float32)
    with pytest.raises(ValueError, match="apart from q"):
        ops.linear_attention(torch.from_numpy(out), k, v, out=out)


def test_tensors_that_numpy_does_not_read_are_named(ops: ModuleType) -> None:
    """torch's own words for it name no argument."""
    good = torch.randn(1, 2, 9, 4)
    _, state = ops.linear_attention(good, good, good, return_state=True)
    row = good[:, :, 0]
    for bad, words in (
        (good.clone().requires_grad_(), r"detach\(\)"),
        (good.to(torch.bfloat16), r"view\(torch.int16\)"),
        (good.to_sparse(), "dense"),
        (torch.empty(1, 2, 9, 4, device="meta"), "meta"),
    ):
        with pytest.raises(TypeError, match=f"^k must be a .*{words}"):
            ops.linear_attention(good, bad, good)
        with pytest.raises(TypeError, match=r"^dy must be a "):
            ops.linear_attention_backward(bad, good, good, good, good)
        if "dense" not in words:
            with pytest.raises(TypeError, match=r"^v must be a "):
                ops.linear_attention_step_(row, row, bad[:, :, 0], state)
