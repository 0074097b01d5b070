# SPDX-License-Identifier: BSD-3-Clause
"""Layers of fastops.keras over the backend that KERAS_BACKEND names: test_keras.py runs this file in a process of its own."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tolerance

import fastops
import fastops.keras as fk

Array = np.ndarray[Any, np.dtype[Any]]

LAYERS = {
    "softmax": (fk.SoftmaxAttention, {}),
    "softmax-logn": (fk.SoftmaxAttention, {"logn": "keys", "causal": True}),
    "linear": (fk.LinearAttention, {}),
    "linear-causal": (fk.LinearAttention, {"causal": True, "feature_map": "exp"}),
    "linear-decay": (fk.LinearAttention, {"causal": True, "decay": [-0.5, -0.1]}),
    "linear-favor": (fk.LinearAttention, {"feature_map": "favor", "num_features": 24, "seed": 3}),
    "linear-shared": (fk.LinearAttention, {"num_key_value_heads": 1, "value_dim": 3, "output_shape": 5}),
    "nystrom": (fk.NystromAttention, {"num_landmarks": 4}),
    "nystrom-ridge": (fk.NystromAttention, {"num_landmarks": 4, "pinv": "ridge", "ridge": 0.01, "scale": 0.75}),
    "nystrom-normalized": (fk.NystromAttention, {"num_landmarks": 4, "init": "batch", "normalize": True}),
    "nystrom-conv": (fk.NystromAttention, {"num_landmarks": 4, "conv_kernel_size": 3, "pinv": "ridge"}),
}
KINDS = [fk.SoftmaxAttention, fk.LinearAttention, fk.NystromAttention]
# Keras's own way from torch to NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
BACKEND = keras.backend.backend()
trains = pytest.mark.skipif(BACKEND == "numpy", reason="Keras's backend numpy does not train")


@pytest.fixture(autouse=True)
def seed() -> None:
    keras.utils.set_random_seed(0)


def rows(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def array(x: Any) -> Array:
    return np.asarray(keras.ops.convert_to_numpy(x))


def made(name: str, **options: Any) -> Any:
    kind, more = LAYERS[name]
    return kind(2, 4, **{**more, **options})


def near(got: Any, want: Any) -> None:
    """Within a layer's roundings: products of some tens of terms before and after the attention."""
    np.testing.assert_allclose(array(got), array(want), rtol=0, atol=tolerance.KERAS_LAYER)


def attended(name: str, layer: Any, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """What the functions for arrays give."""
    options = dict(LAYERS[name][1])
    weights = {w.name: array(w) for w in layer.weights}
    for own in ("num_key_value_heads", "value_dim", "output_shape", "seed"):
        options.pop(own, None)
    if name.startswith("softmax"):
        return fastops.softmax_attention(q, k, v, key_mask=mask, layout="bnhd", **options)
    if name.startswith("nystrom"):
        options.pop("conv_kernel_size", None)
        return fastops.nystrom_attention(
            q, k, v, key_mask=mask, conv_weight=weights.get("conv"), layout="bnhd", **options
        )
    if options.pop("num_features", None):
        options["projection"] = weights["projection"]
    if "decay" in options:
        options["decay"] = np.array(options["decay"], np.float32)
    return fastops.linear_attention(q, k, v, key_mask=mask, layout="bnhd", **options)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_the_function_between_projections(name: str, masked: bool) -> None:
    layer = made(name, bias_initializer="normal")
    x = rows(2, 9, 6)
    mask = np.arange(9) < np.array([[9], [5]]) if masked else None
    got = layer(x) if mask is None else layer(x, value_mask=mask)
    q, k, v = (array(dense(x)) for dense in (layer.query_dense, layer.key_dense, layer.value_dense))
    assert q.shape == (2, 9, 2, 4)
    y = attended(name, layer, q, k, v, mask)
    near(got, np.einsum("bnhe,hew->bnw", y, array(layer.output_dense.kernel)) + array(layer.output_dense.bias))
    assert tuple(got.shape) == layer.compute_output_shape(x.shape) == (2, 9, 5 if "shared" in name else 6)


@pytest.mark.parametrize("name", LAYERS)
def test_scores_are_the_weights_of_the_values(name: str) -> None:
    layer = made(name)
    x = rows(2, 7, 6)
    mask = np.arange(7) < np.array([[7], [4]])
    y, scores = layer(x, value_mask=mask, return_attention_scores=True)
    assert tuple(scores.shape) == (2, 2, 7, 7)
    v = np.repeat(array(layer.value_dense(x)), 2 // layer.num_key_value_heads, axis=2)
    if name != "nystrom-conv":  # whose convolution is beside the matrix
        combined = np.einsum("bhnm,bmhe->bnhe", array(scores), v)
        near(y, layer.output_dense(combined))
    assert not array(scores)[1, :, :, 4:].any()
    if not name.startswith("nystrom"):
        near(array(scores).sum(-1), np.ones((2, 2, 7)))
    if getattr(layer, "causal", False):
        assert not np.triu(array(scores), 1).any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_of_multi_head_attention_load(causal: bool, bias: bool) -> None:
    x, context = rows(2, 6, 8), rows(2, 6, 5)
    theirs = keras.layers.MultiHeadAttention(2, 4, value_dim=3, use_bias=bias, bias_initializer="normal")
    ours = fk.SoftmaxAttention(2, 4, value_dim=3, use_bias=bias)
    mask = np.arange(6) < np.array([[6], [3]])
    want, scores = theirs(x, context, value_mask=mask, use_causal_mask=causal, return_attention_scores=True)
    ours(x, context)
    assert [tuple(w.shape) for w in ours.weights] == [tuple(w.shape) for w in theirs.weights]
    ours.set_weights(theirs.get_weights())
    got, matrix = ours(x, context, value_mask=mask, use_causal_mask=causal, return_attention_scores=True)
    near(got, want)
    near(matrix, scores)
    for kind in KINDS:
        layer = kind(2, 4, value_dim=3, use_bias=bias)
        layer(x, context)
        layer.set_weights(theirs.get_weights())
        for got, want in zip(layer.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.skipif(BACKEND == "numpy", reason="NumPy's arrays carry no mask")
@pytest.mark.parametrize("kind", KINDS)
def test_masks_come_from_an_embedding(kind: Any) -> None:
    """Whether rows attend to themselves by one argument or by two, and the mask goes on."""
    tokens = np.array([[5, 2, 7, 1, 3], [4, 6, 0, 0, 0]])
    embedding, layer = keras.layers.Embedding(10, 8, mask_zero=True), kind(2, 4)
    short = layer(array(embedding(tokens[1:, :2])))
    for arguments in (1, 2, 3):
        x = embedding(keras.ops.convert_to_tensor(tokens))
        y = layer(*[x] * arguments)
        near(y[1:, :2], short)
        mask = y._keras_mask
        np.testing.assert_array_equal(array(mask), tokens != 0)
    inputs = keras.Input((None,), dtype="int32")
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(layer(embedding(inputs))))
    near(model(keras.ops.convert_to_tensor(tokens))[1], array(short)[0].mean(0))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_value_and_key_are_both_kept(kind: Any) -> None:
    layer, x = kind(2, 4), rows(1, 4, 6)
    y = x.copy()  # as many rows as x, and others: the queries are not masked
    both = layer(x, y, value_mask=np.array([[1, 1, 1, 0]], bool), key_mask=np.array([[1, 0, 1, 1]], bool))
    near(both, layer(x, x[:, ::2]))
    _, scores = layer(x, y, value_mask=np.array([[1, 0, 1, 0]], bool), return_attention_scores=True)
    _, other = layer(x, x[:, ::2], return_attention_scores=True)
    assert tuple(scores.shape) == (1, 2, 4, 4)
    near(scores[..., ::2], other)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tensors", [False, True], ids=["arrays", "tensors"])
def test_one_object_for_two_arguments_is_one(kind: Any, policy: str, tensors: bool) -> None:
    """Keras makes tensors of arrays, and casts tensors, one argument after the other."""
    layer = kind(2, 4, dtype=policy)
    x, mask = rows(2, 6, 8), np.arange(6) < np.array([[6], [3]])
    other = x[:, ::-1].copy()
    if tensors:
        x, mask, other = map(keras.ops.convert_to_tensor, (x, mask, other))
    want = array(layer(x, mask=mask))
    for arguments in ((x, x), (x, x, x)):
        np.testing.assert_array_equal(array(layer(*arguments, query_mask=mask, value_mask=mask)), want)
    np.testing.assert_array_equal(array(layer(query=x, value=x, value_mask=mask)), want)
    # Other rows and the same mask: it holds for both.
    short = layer(x[1:, :3], other[1:, :3])
    near = {"rtol": 0, "atol": tolerance.KERAS_LAYER if policy == "float32" else tolerance.KERAS_HALF}
    both = layer(x, other, query_mask=mask, value_mask=mask)
    np.testing.assert_allclose(array(both[1:, :3]).astype(float), array(short).astype(float), **near)


def test_directions_are_not_rounded_under_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made("linear-favor", dtype="mixed_bfloat16"), rows(2, 9, 6)
    functions = importlib.import_module("fastops.keras._layers")._functions()
    real, given = functions.linear_attention, []

    def spy(*args: Any, **options: Any) -> Any:
        given.append(options["projection"])
        return real(*args, **options)

    monkeypatch.setattr(functions, "linear_attention", spy)
    layer(x)
    want = fastops.favor_projection(4, 24, rng=3).astype(np.float32)
    np.testing.assert_array_equal(array(given[0]), want, strict=True)


@trains
@pytest.mark.parametrize("name", LAYERS)
def test_layer_learns_and_survives_a_file(name: str, tmp_path: Path) -> None:
    inputs = keras.Input((None, 6))
    hidden = made(name, output_shape=6)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(6)(hidden))
    model.compile(keras.optimizers.Adam(0.02), "mse")
    x = rows(16, 8, 6)
    before = [w.copy() for w in model.get_weights()]
    losses = model.fit(x, np.flip(x, 1).cumsum(1) / 4, batch_size=8, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    for variable, old in zip(model.weights, before, strict=True):
        # Not the directions of "favor"; and softmax's rows do not see what a bias adds to all keys.
        moves = variable.trainable and not variable.path.endswith("key/bias")
        assert not moves or not np.array_equal(array(variable), old), variable.path
        assert variable.trainable or np.array_equal(array(variable), old)
    file = tmp_path / "model.keras"
    model.save(file)
    again = keras.models.load_model(file)
    np.testing.assert_array_equal(array(again(x)), array(model(x)))
    assert again.layers[1].get_config() == model.layers[1].get_config()
    other = type(model).from_config(model.get_config())
    other.set_weights(model.get_weights())
    np.testing.assert_array_equal(array(other(x)), array(model(x)))


@trains
def test_gradients_are_those_of_multi_head_attention() -> None:
    """One step of plain gradient descent moves all weights alike."""
    x, y = rows(4, 6, 8), rows(4, 6, 8)[::-1]
    inputs = keras.Input((6, 8))
    kinds = (keras.layers.MultiHeadAttention, fk.SoftmaxAttention)
    models = [keras.Model(inputs, kind(2, 4)(inputs, inputs)) for kind in kinds]
    models[1].set_weights(models[0].get_weights())
    for model in models:
        model.compile(keras.optimizers.SGD(1.0), "mse")
        model.fit(x, y, batch_size=4, verbose=0)
    for got, want in zip(models[1].get_weights(), models[0].get_weights(), strict=True):
        near(got, want)


@trains
@pytest.mark.parametrize("kind", KINDS)
def test_layer_of_a_subclassed_model(kind: Any) -> None:
    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = kind(2, 4), keras.layers.Dense(1)

        def call(self, x: Any) -> Any:
            return self.head(self.attention(x))

    model = Model()
    model.compile("sgd", "mse")
    model.fit(rows(4, 5, 6), rows(4, 5, 1), verbose=0)
    assert model.attention.built


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float64"])
def test_layer_follows_the_dtype_policy(name: str, policy: str) -> None:
    if policy == "float64" and BACKEND != "torch":
        pytest.skip("jax has no float64 unless it is asked for, and Keras over numpy multiplies in float32")
    x = rows(2, 9, 6)
    wide, layer = made(name), made(name, dtype=policy)
    want, _ = wide(x), layer(x)
    layer.set_weights(wide.get_weights())
    y = layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == policy.removeprefix("mixed_")
    of = {keras.backend.standardize_dtype(w.dtype) for w in layer.weights}
    assert of == {"float32" if policy.startswith("mixed") else policy}
    got = array(y).astype(np.float64)
    size = np.abs(array(want)).max()
    np.testing.assert_allclose(got, array(want), rtol=0, atol=size * (tolerance.KERAS_HALF if "bf" in policy else 1e-5))


@pytest.mark.parametrize("kind", KINDS)
def test_symbolic_shapes(kind: Any) -> None:
    query, value = keras.Input((None, 8)), keras.Input((7, 5))
    y, scores = kind(2, 4)(query, value, return_attention_scores=True)
    assert y.shape == (None, None, 8)
    assert scores.shape == (None, 2, None, 7)
    mask = keras.Input((7,), dtype="bool")
    assert kind(2, 4)(query, value, value_mask=mask).shape == (None, None, 8)
    assert kind(2, 4)(value, value, value, mask).shape == (None, 7, 5)
    layer = kind(2, 4, output_shape=3)
    assert layer.compute_output_shape((2, 6, 8)) == (2, 6, 3)
    assert tuple(layer(rows(2, 3, 6, 8)).shape) == (2, 3, 6, 3)


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (fk.LinearAttention, {"num_heads": 0}, "num_heads must be an integer >= 1, got 0"),
        (fk.LinearAttention, {"key_dim": 1.5}, "key_dim must be an integer >= 1, got 1.5"),
        (fk.LinearAttention, {"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of num_heads=2, got 3"),
        (fk.LinearAttention, {"feature_map": "elus"}, "did you mean 'elu'"),
        (fk.LinearAttention, {"feature_map": "favor"}, "num_features must be given with feature_map='favor'"),
        (fk.LinearAttention, {"decay": [-1.0]}, "decay must be of 2 numbers, one a head, got 1"),
        (fk.LinearAttention, {"decay": [-1.0, 1.0]}, "decay must be a finite number in"),
        (fk.LinearAttention, {"causal": 1}, "causal must be True or False, got 1"),
        (fk.NystromAttention, {"conv_kernel_size": 4}, "conv_kernel_size must be an odd number, got 4"),
        (fk.NystromAttention, {"ridge": 0.1}, "ridge must be None with pinv='newton'"),
        (fk.NystromAttention, {"pinv": "ridge", "init": "batch"}, "init must be 'matrix' with pinv='ridge'"),
        (fk.NystromAttention, {"num_landmarks": 5000}, "num_landmarks must be an integer in [1, 4096], got 5000"),
        (fk.NystromAttention, {"pinv": "svd"}, "pinv must be 'newton' or 'ridge', got 'svd'"),
        (fk.SoftmaxAttention, {"logn": "rows"}, "logn must be 'keys', got 'rows'"),
        (fk.SoftmaxAttention, {"output_shape": 0}, "output_shape must be an integer >= 1, got 0"),
    ],
)
def test_bad_options_say_what_is_wanted(kind: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(text)):
        kind(**{"num_heads": 2, "key_dim": 4, **options})


def test_bad_calls_say_what_is_wanted() -> None:
    with pytest.raises(ValueError, match="query must be of shape"):
        fk.LinearAttention(2, 4)(rows(5, 6))
    with pytest.raises(ValueError, match="key must be of value's shape"):
        fk.LinearAttention(2, 4)(rows(2, 5, 6), rows(2, 5, 6), rows(2, 4, 6))
    with pytest.raises(ValueError, match="use_causal_mask must be False for Nystrom attention"):
        fk.NystromAttention(2, 4)(rows(2, 5, 6), use_causal_mask=True)


def test_another_backend_of_keras_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    with pytest.raises(NotImplementedError, match="the backend of keras must be 'torch' or 'jax' or 'numpy'"):
        fk.LinearAttention(2, 4)


@trains
@pytest.mark.parametrize("name", ["_averaging", "_layers"])
def test_the_examples_of_a_module_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"fastops.keras.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", fk.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    item = getattr(fk, name)
    text = inspect.getdoc(item) or ""
    for section in ("Parameters", "Raises", "Examples"):
        assert re.search(rf"^{section}\n-+$", text, re.MULTILINE), f"{name} has no section {section}"
    assert inspect.signature(item).parameters
    for key, member in vars(item).items():
        if not key.startswith("_") and callable(member):
            assert inspect.getdoc(member), f"{name}.{key} has no docstring"
