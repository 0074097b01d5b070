# SPDX-License-Identifier: BSD-3-Clause
"""Layers of fastops.torch, the conversion of models, and the examples of its documentation."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import pickle
import re
from typing import Any

import numpy as np
import pytest
import tolerance

import fastops
from fastops import Multiplier

torch = pytest.importorskip("torch", reason="torch is not installed")
ft = pytest.importorskip("fastops.torch")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def network() -> Any:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 4, 3, stride=2, groups=2, padding="valid"),
        torch.nn.Flatten(),
        torch.nn.Linear(36, 5),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 2, "stride": 2, "dilation": (1, 2)},
        {"padding": "same", "bias": False},
        {"padding": "valid"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": (1, 2), "padding_mode": "circular", "stride": (2, 1)},
        {"groups": 2},
    ],
    ids=str,
)
def test_convolution_has_the_form_of_torchs(options: dict[str, Any]) -> None:
    # Powers of two times powers of two: the approximation is exact, and so are the sums.
    plain = torch.nn.Conv2d(2, 4, 3, **options)
    layer = ft.MitchellConv2d(2, 4, 3, **options)
    layer.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for x in (plain, layer):
            torch.manual_seed(1)
            x.weight.copy_(torch.randint(0, 3, x.weight.shape).exp2())
            x.bias.zero_() if x.bias is not None else None
    images = torch.randint(0, 3, (3, 2, 8, 7)).float().exp2()
    assert torch.equal(layer(images), plain(images))
    assert torch.equal(layer(images[0]), plain(images[0]))


def test_a_converted_model_computes_approximately_and_comes_back() -> None:
    model = network()
    x = torch.randn(6, 1, 8, 8)
    before, names = model(x).detach(), list(model.state_dict())
    kept = list(model.parameters())
    m = Multiplier("min-mse")
    assert ft.approximate(model, m, mode="ste") is model
    assert [type(layer).__name__ for layer in model if hasattr(layer, "weight")] == [
        "MitchellConv2d",
        "MitchellConv2d",
        "MitchellLinear",
    ]
    assert all(p is q for p, q in zip(model.parameters(), kept, strict=True))
    assert list(model.state_dict()) == names
    hidden = torch.relu(
        torch.from_numpy(fastops.mitchell_conv2d(x.numpy(), kept[0].detach().numpy(), padding=1, multiplier=m))
        + kept[1][:, None, None]
    )
    np.testing.assert_allclose(model[1](model[0](x)).detach(), hidden.detach(), rtol=0, atol=1e-6)
    y = model(x).detach()
    assert 0 < (y - before).abs().max() < 0.2 * before.abs().max()
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(x), y)
    assert "multiplier=Multiplier('min-mse'), mode='ste'" in repr(model)
    ft.approximate(model)
    assert model[0].multiplier == Multiplier()
    assert ft.exact(model) is model
    assert torch.equal(model(x), before)
    assert [type(layer) for layer in model] == [type(layer) for layer in network()]


def test_layers_are_chosen() -> None:
    model = ft.approximate(network(), where=lambda name, layer: name != "4")
    assert type(model[4]) is torch.nn.Linear
    assert type(model[0]) is ft.MitchellConv2d
    heads = torch.nn.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match="a module with a Linear or Conv2d"):
        ft.approximate(heads)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ft.approximate([])
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ft.exact(None)
    with pytest.raises(TypeError, match="multiplier must be"):
        ft.approximate(network(), "min-mse")


def test_a_converted_model_trains() -> None:
    model = network()
    images, labels = torch.randn(64, 1, 8, 8), torch.randint(0, 5, (64,))
    optimizer = ft.AdamW(model.parameters(), lr=0.02)
    ft.approximate(model)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_layers_compile() -> None:
    torch.compiler.reset()
    model = ft.approximate(network(), Multiplier("min-mse"))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    layer = ft.LinearAttention(8, 2, causal=True)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "kv_heads": 2},
        {"causal": True, "decay": (-0.5, -0.25, -0.1, 0.0)},
        {"feature_map": "favor", "num_features": 16, "causal": True},
    ],
    ids=str,
)
def test_linear_attention_layer(options: dict[str, Any]) -> None:
    layer = ft.LinearAttention(12, 4, **options)
    x = torch.randn(2, 7, 12)
    y = layer(x)
    q, k, v = (p(x).detach().numpy().reshape(2, 7, -1, 3) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    given = {name: options[name] for name in ("causal", "feature_map") if name in options}
    if layer.projection is not None:
        given["projection"] = layer.projection.numpy()
    if layer.decay is not None:
        given["decay"] = layer.decay.numpy()
    rows = fastops.linear_attention(q, k, v, layout="bnhd", **given).reshape(2, 7, 12)
    np.testing.assert_allclose(y.detach(), layer.out_proj(torch.from_numpy(rows)).detach(), rtol=0, atol=1e-6)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    if not layer.causal:
        with pytest.raises(ValueError, match="causal must be True"):
            layer.step(x[:, 0], layer.new_state(2))
        return
    state = layer.new_state(2)
    token = torch.stack([layer.step(x[:, i], state) for i in range(7)], 1)
    np.testing.assert_allclose(token.detach(), y.detach(), rtol=0, atol=100 * tolerance.ATTENTION)
    # A padded prompt gives the state of the prompt, with a decay too.
    padded = torch.cat([x[:, :3], torch.full((2, 2, 12), 9.0)], 1)
    _, same = layer(padded, key_mask=torch.arange(5).expand(2, 5) < 3, return_state=True)
    first, middle = layer(x[:, :3], return_state=True)
    for got, wanted in zip(same, middle, strict=True):
        np.testing.assert_allclose(got.detach(), wanted.detach(), rtol=0, atol=100 * tolerance.ATTENTION)
    second = layer(x[:, 3:], state=middle)
    np.testing.assert_allclose(
        torch.cat([first, second], 1).detach(), y.detach(), rtol=0, atol=100 * tolerance.ATTENTION
    )


def test_nystrom_attention_layer() -> None:
    layer = ft.NystromAttention(12, 3, num_landmarks=4, conv_kernel_size=3)
    x, mask = torch.randn(2, 30, 12), torch.ones(2, 30, dtype=torch.bool)
    mask[:, 20:] = False
    y = layer(x, key_mask=mask)
    np.testing.assert_allclose(y[:, :20].detach(), layer(x[:, :20]).detach(), rtol=0, atol=1e-5)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"pinv": "ridge", "ridge": 0.01},
        {"scale": 0.75},
        {"init": "batch"},
        {"normalize": True},
        {"iterations": 2, "normalize": np.True_},
    ],
)
def test_nystrom_attention_layer_passes_its_options_on(options: dict[str, Any]) -> None:
    x = torch.randn(2, 30, 12)
    layer = ft.NystromAttention(12, 3, num_landmarks=4, **options)
    q, k, v = (p(x).unflatten(-1, (3, 4)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    want = layer.out_proj(ft.nystrom_attention(q, k, v, num_landmarks=4, layout="bnhd", **options).flatten(-2))
    np.testing.assert_array_equal(layer(x).detach(), want.detach())
    plain = ft.NystromAttention(12, 3, num_landmarks=4)
    plain.load_state_dict(layer.state_dict())
    assert not torch.equal(plain(x), layer(x))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ft.NystromAttention(12, 4, ridge=0.1), "ridge must be None with pinv='newton'"),
        (lambda: ft.NystromAttention(12, 4, pinv="ridge", init="batch"), "init must be 'matrix' with pinv='ridge'"),
        (lambda: ft.NystromAttention(12, 4, scale=float("nan")), "scale must be a finite number"),
        (lambda: ft.LinearAttention(10, 4), "num_heads must be a divisor of embed_dim=10"),
        (lambda: ft.LinearAttention(12, 4, kv_heads=3), "kv_heads must be a divisor"),
        (lambda: ft.LinearAttention(12, 4, feature_map="favor"), "num_features must be given"),
        (lambda: ft.LinearAttention(12, 4, num_features=3), "favor' and with no other, got 3"),
        (lambda: ft.LinearAttention(12, 4, feature_map="eluu"), "did you mean 'elu'"),
        (lambda: ft.LinearAttention(12, 4, decay=(0.0,)), "decay must be of 4 numbers"),
        (lambda: ft.LinearAttention(12, 4, causal=True, decay=(0.9,) * 4), "decay must be"),
        (lambda: ft.LinearAttention(12, 4, decay=(-0.1,) * 4), "decay must be None without causal=True"),
        (lambda: ft.NystromAttention(12, 4, num_landmarks=5000), r"num_landmarks must be an integer in \[1, 4096\]"),
        (lambda: ft.NystromAttention(12, 4, conv_kernel_size=2), "conv_kernel_size must be an odd number"),
        (lambda: ft.MitchellLinear(2, 2, mode="exakt"), "did you mean 'exact'"),
    ],
)
def test_wrong_layers_are_named(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_wrong_inputs_of_layers_are_named() -> None:
    layer, x = ft.LinearAttention(8, 4, kv_heads=2, causal=True), torch.randn(2, 5, 8)
    _, state = layer(x, return_state=True)
    row = r"x must be of shape \(2, 8\), the row of one token for each state, got"
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: layer.step(x[:, :1], state), ValueError, rf"^{row} \(2, 1, 8\)$"),
        (lambda: layer.step(x, state), ValueError, rf"^{row} \(2, 5, 8\)$"),
        (
            lambda: layer.step(x[:, 0, :7], state),
            ValueError,
            r"^x must be of rows of embed_dim=8 numbers, got shape \(2, 7\)",
        ),
        (
            lambda: layer.new_state((2,)),
            TypeError,
            r"^batch must be integers, an argument for each \(.*\), got \(2,\)$",
        ),
        (lambda: layer.new_state(x.shape[:1]), TypeError, r"^batch must be integers, an argument for each"),
        (lambda: layer.new_state(-1), ValueError, r"^batch must be an integer >= 0, got -1$"),
        (
            lambda: layer(x.numpy()),
            TypeError,
            r"^x must be a torch.Tensor \(torch.from_numpy shares .*\), got an array",
        ),
        (lambda: layer(x, x[..., :3]), ValueError, r"^context must be of rows of embed_dim=8 numbers"),
        (lambda: layer(None), TypeError, r"^x must be a torch.Tensor, got None$"),
        (
            lambda: layer(x, key_mask=torch.ones(2, 1, 1, 5, dtype=torch.bool)),
            ValueError,
            r"^key_mask must be of shape \(2, 5\) or \(2, 2, 5\) \(its reshape\(\(2, 5\)\)\), got \(2, 1, 1, 5\)$",
        ),
        (
            lambda: ft.NystromAttention(8, 2)(x, key_mask=torch.ones(2, 1, 1, 5, dtype=torch.bool)),
            ValueError,
            r"^key_mask must be of shape \(2, 5\) \(its reshape\(\(2, 5\)\)\), got \(2, 1, 1, 5\)$",
        ),
    ]
    for call, error, text in calls:
        with pytest.raises(error, match=text):
            call()


def test_a_mask_of_numpys_lets_what_is_hidden_decay_nothing() -> None:
    layer, x = ft.LinearAttention(8, 2, causal=True, decay=(-0.5, -1.0)), torch.randn(2, 5, 8)
    mask = torch.arange(5).expand(2, 5) < 3
    torch.testing.assert_close(layer(x, key_mask=mask.numpy()), layer(x, key_mask=mask), rtol=0, atol=0)


def test_a_decay_of_one_number_is_named() -> None:
    with pytest.raises(TypeError, match="decay must be a sequence of 4 numbers, one a head, got"):
        ft.LinearAttention(12, 4, causal=True, decay=-0.1)  # type: ignore[arg-type]


MODULES = ["_attention", "_averaging", "_distributed", "_mitchell", "_modules", "_optim"]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"fastops.torch.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", ft.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    item = getattr(ft, name)
    text = inspect.getdoc(item) or ""
    for section in ("Parameters", "Raises", "Examples"):
        assert re.search(rf"^{section}\n-+$", text, re.MULTILINE), f"{name} has no section {section}"
    assert inspect.signature(item).parameters
    for key, member in vars(item).items() if inspect.isclass(item) else ():
        if not key.startswith("_") and callable(member):
            assert inspect.getdoc(member), f"{name}.{key} has no docstring"
