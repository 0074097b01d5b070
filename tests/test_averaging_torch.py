# SPDX-License-Identifier: BSD-3-Clause
"""`EMA` over tensors and modules of torch, and beside its AveragedModel."""

from __future__ import annotations

import io
import pickle
from types import ModuleType

import numpy as np
import pytest
import tolerance
from samples import FLOATS

from fastops import _tensors
from fastops.averaging import EMA

pytestmark = pytest.mark.usefixtures("over_backend")


@pytest.fixture
def torch() -> ModuleType:
    return pytest.importorskip("torch", reason="torch is not installed")


def test_torch_module_with_buffers(torch: ModuleType) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.BatchNorm1d(4))
    ema = EMA({**dict(model.named_parameters()), **dict(model.named_buffers())}, 0.9)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        # By hand: torch.optim imports half of torch at its first step.
        parameters = list(model.parameters())
        grads = torch.autograd.grad((model(torch.randn(8, 3)) ** 3).sum(), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p -= 0.1 * g
        ema.update()
    now = {name: value.clone() for name, value in model.state_dict().items()}
    with ema.average_parameters():
        for name, value in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                assert int(value) == 2
            else:
                assert not torch.equal(value, now[name])
                assert not torch.equal(value, start[name])
    for name, value in model.state_dict().items():
        assert torch.equal(value, now[name])


def test_torch_averaged_model_agrees(torch: ModuleType, backend: ModuleType) -> None:
    swa = torch.optim.swa_utils
    model = torch.nn.Linear(7, 5)
    ours = EMA(model.parameters(), (0.99, "equal"))
    theirs = [swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.99)), swa.AveragedModel(model)]
    with torch.no_grad():
        for _ in range(5):
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            ours.update()
            for averaged in theirs:
                averaged.update_parameters(model)
    # AveragedModel copies at its first update; so does "equal", and an EMA started there.
    for got, want in zip(ours.shadows[1], theirs[1].module.parameters(), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=0, atol=tolerance.average(5, 16.0, got.dtype))
    start = EMA(model.parameters(), 0.99, update_after_step=1)
    again = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.99))
    with torch.no_grad():
        for _ in range(5):
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            start.update()
            again.update_parameters(model)
    for got, want in zip(start.shadows, again.module.parameters(), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=0, atol=tolerance.average(5, 16.0, got.dtype))


@pytest.mark.skipif("bf16" not in FLOATS, reason="ml_dtypes is not installed")
def test_torch_bfloat16_parameters_with_float32_shadows(torch: ModuleType) -> None:
    """A mixed lerp is an error in torch, and a bfloat16 shadow never moves: 0.5 stays 0.5 at a decay of 0.9999."""
    p = torch.nn.Parameter(torch.full((4,), 0.5, dtype=torch.bfloat16))
    ema = EMA([p], 0.9999)
    assert ema.shadows[0].dtype == np.float32
    with torch.no_grad():
        p.fill_(1.0)
    for _ in range(1000):
        ema.update()
    want = 1.0 - 0.5 * 0.9999**1000
    np.testing.assert_allclose(ema.shadows[0], want, rtol=0, atol=tolerance.average(1000, 1.0, np.dtype(np.float32)))
    ema.copy_to_([out := torch.zeros(4, dtype=torch.float64)])
    assert out.tolist() == ema.shadows[0].astype(np.float64).tolist()
    with ema.average_parameters():
        assert p.tolist() == torch.from_numpy(ema.shadows[0]).bfloat16().tolist()
    assert p.tolist() == [1.0] * 4


def test_torch_autograd_hears_of_swapped_parameters(torch: ModuleType) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    ema = EMA([p], 0.5)
    loss = (p * p).sum()
    ema.update()
    loss.backward(retain_graph=True)  # reading is no change
    ema.swap_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    ema.swap_()
    loss = (p * p).sum()
    ema.copy_to_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_torch_tensors_whose_storage_changes(torch: ModuleType) -> None:
    p = torch.zeros(4)
    ema = EMA([p], 0.5)
    p.data = torch.ones(4)
    ema.update()
    assert ema.shadows[0].tolist() == [0.5] * 4
    p.data = torch.ones(5)
    with pytest.raises(ValueError, match=r"params\[0\] must be of shape \(4,\)"):
        ema.update()
    p.data = torch.ones(4)
    p.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"params\[0\] must be a tensor whose storage holds its elements"):
        ema.update()
    assert ema.shadows[0].tolist() == [0.5] * 4


def test_torch_state_and_pickle(torch: ModuleType) -> None:
    model = torch.nn.Linear(2, 2)
    ema = EMA(dict(model.named_parameters()))
    ema.update()
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    other = EMA(dict(model.named_parameters()))
    other.load_state_dict(torch.load(file, weights_only=False))
    assert other.step == 1
    same_model, same = pickle.loads(pickle.dumps((model, ema)))
    with torch.no_grad():
        same_model.bias.fill_(100.0)
    before = same.shadows[1].copy()
    same.update()
    assert (same.shadows[1] > before + 0.05).all()
    assert _tensors.as_ndarray("p", model.bias).max() < 100
