# SPDX-License-Identifier: BSD-3-Clause
"""Layers of attention for Keras, with the weights of its MultiHeadAttention."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from string import ascii_lowercase
from types import ModuleType
from typing import Any

import keras

from .. import _attention, _nystrom, _validate, attention
from .._validate import Text

__all__ = ["LinearAttention", "NystromAttention", "SoftmaxAttention"]

BACKENDS = ("torch", "jax", "numpy")


def _functions() -> ModuleType:
    """The attentions over the tensors of Keras's backend."""
    name = keras.backend.backend()
    if name == "torch":
        from .. import torch as functions
    elif name == "jax":
        from .. import jax as functions  # type: ignore[no-redef]
    elif name == "numpy":
        import fastops as functions  # type: ignore[no-redef]
    else:
        wanted = " or ".join(map(repr, BACKENDS)) + " (set KERAS_BACKEND)"
        raise _validate.not_offered("the backend of keras", wanted, name)
    return functions


def _own(x: Any) -> Any:
    """An initializer that draws by itself where it has no seed, as each of Keras's layers does it."""
    return type(x).from_config(x.get_config()) if isinstance(x, keras.initializers.Initializer) else x


def _plain(x: Any) -> Any:
    """A list as files have it: Keras puts one of its own in place of a layer's."""
    return list(x) if isinstance(x, list) else x


class _Heads(keras.layers.Layer):
    """Projections of rows to heads and back: shapes and order of weights are those of Keras's MultiHeadAttention."""

    # (q, k, v, causal, mask, matrix=False) -> what the heads give; for a matrix without what is beside it.
    _attend: Callable[..., Any]
    # Arguments of the constructor beyond those here.
    _options: tuple[str, ...]

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        *,
        num_key_value_heads: int | None = None,
        use_bias: bool = True,
        output_shape: int | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        _functions()
        super().__init__(**kwargs)
        self.supports_masking = True
        self.num_heads = _validate.integer("num_heads", num_heads, 1)
        self.key_dim = _validate.integer("key_dim", key_dim, 1)
        self.value_dim = self.key_dim if value_dim is None else _validate.integer("value_dim", value_dim, 1)
        shared = num_key_value_heads
        self.num_key_value_heads = (
            self.num_heads if shared is None else _validate.integer("num_key_value_heads", shared, 1)
        )
        if self.num_heads % self.num_key_value_heads:
            wanted = f"a divisor of num_heads={self.num_heads}"
            raise _validate.wrong_value("num_key_value_heads", wanted, self.num_key_value_heads)
        self.use_bias = _validate.boolean("use_bias", use_bias)
        self._output_dim = None if output_shape is None else _validate.integer("output_shape", output_shape, 1)
        self._kernel_initializer = keras.initializers.get(kernel_initializer)
        self._bias_initializer = keras.initializers.get(bias_initializer)
        self._kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self._bias_regularizer = keras.regularizers.get(bias_regularizer)
        self._kernel_constraint = keras.constraints.get(kernel_constraint)
        self._bias_constraint = keras.constraints.get(bias_constraint)

    def get_config(self) -> dict[str, Any]:
        """What makes the same layer, for `from_config` and files.

        Returns
        -------
        dict
            The arguments of the constructor.
        """
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "num_key_value_heads": self.num_key_value_heads,
            "use_bias": self.use_bias,
            "output_shape": self._output_dim,
            "kernel_initializer": keras.initializers.serialize(self._kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self._bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self._kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self._bias_regularizer),
            "kernel_constraint": keras.constraints.serialize(self._kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self._bias_constraint),
            **{name: _plain(getattr(self, name)) for name in self._options},
        }

    def build(
        self, query_shape: Sequence[Any], value_shape: Sequence[Any] | None = None, key_shape: Any = None
    ) -> None:
        """Make the weights.

        Parameters
        ----------
        query_shape : tuple
            Of `call`'s `query`.
        value_shape : tuple, optional
            Of its `value`; `query_shape` by default.
        key_shape : tuple, optional
            Of its `key`; `value_shape` by default.

        Raises
        ------
        ValueError
            Shapes that do not fit, named with what was got and wanted.
        """
        query, value, key = self._shapes(query_shape, value_shape, key_shape)
        self._query_dense = self._dense("query", query, (self.num_heads, self.key_dim))
        self._key_dense = self._dense("key", key, (self.num_key_value_heads, self.key_dim))
        self._value_dense = self._dense("value", value, (self.num_key_value_heads, self.value_dim))
        heads = (*query[:-1], self.num_heads, self.value_dim)
        self._output_dense = self._dense("attention_output", heads, (self._output_dim or query[-1],), bound=2)
        self._own_weights()
        self.built = True

    def _own_weights(self) -> None:
        """Those beyond the projections."""

    def _dense(self, name: str, shape: tuple[Any, ...], sizes: tuple[int, ...], bound: int = 1) -> Any:
        """A product over the last `bound` axes of `shape`, which become axes of `sizes`."""
        rows, summed, made = len(shape) - bound, bound, len(sizes)
        letters = ascii_lowercase[: rows + summed + made]
        free, inner, new = letters[:rows], letters[rows : rows + summed], letters[rows + summed :]
        layer = keras.layers.EinsumDense(
            f"{free}{inner},{inner}{new}->{free}{new}",
            output_shape=(*(None,) * (rows - 1), *sizes),
            bias_axes=new if self.use_bias else None,
            name=name,
            dtype=self.dtype_policy,
            kernel_initializer=_own(self._kernel_initializer),
            bias_initializer=_own(self._bias_initializer),
            kernel_regularizer=self._kernel_regularizer,
            bias_regularizer=self._bias_regularizer,
            kernel_constraint=self._kernel_constraint,
            bias_constraint=self._bias_constraint,
        )
        # Else it would warn that it drops the mask of its input, which is dealt with here.
        layer.supports_masking = True
        layer.build(shape)
        return layer

    @property
    def query_dense(self) -> Any:
        """The layer that makes the queries (..., N, H, key_dim), as MultiHeadAttention has it."""
        return self._query_dense

    @property
    def key_dense(self) -> Any:
        """The layer that makes the keys (..., M, H_kv, key_dim)."""
        return self._key_dense

    @property
    def value_dense(self) -> Any:
        """The layer that makes the values (..., M, H_kv, value_dim)."""
        return self._value_dense

    @property
    def output_dense(self) -> Any:
        """The layer that makes the result of all heads' rows (..., N, H, value_dim)."""
        return self._output_dense

    def _shapes(
        self, query: Sequence[Any], value: Sequence[Any] | None, key: Sequence[Any] | None
    ) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        value = query if value is None else value
        shapes = (tuple(query), tuple(value), tuple(value if key is None else key))
        for name, shape in zip(("query", "value", "key"), shapes, strict=True):
            if not 3 <= len(shape) <= 20 or shape[-1] is None:
                wanted = "of shape (batch, ..., length, width) with a known width"
                raise _validate.wrong_value(name, wanted, Text(_validate.clip(str(shape))))
        if shapes[1][1:-1] != shapes[2][1:-1]:
            wanted = f"of value's shape {_validate.clip(str(shapes[1]))} but for its width"
            raise _validate.wrong_value("key", wanted, Text(_validate.clip(str(shapes[2]))))
        return shapes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Attend: `call`, of arrays of NumPy too.

        Parameters
        ----------
        *args, **kwargs
            Of `call`.

        Returns
        -------
        tensor, or two tensors
            What `call` gives.
        """
        given = [*args, *kwargs.values()]
        twice = {id(x): x for i, x in enumerate(given) if any(x is y for y in given[:i]) and self._is_cast(x)}
        if twice:
            # Keras converts each argument by itself, and what is one object would come as two.
            cast = keras.layers.Identity(dtype=self.dtype_policy, name="cast")
            once = {key: cast(x) for key, x in twice.items()}
            args = tuple(once.get(id(x), x) for x in args)
            kwargs = {name: once.get(id(x), x) for name, x in kwargs.items()}
        return super().__call__(*args, **kwargs)

    def _is_cast(self, x: Any) -> bool:
        """Whether Keras makes another object of an argument."""
        if not keras.ops.is_tensor(x):
            return hasattr(x, "__array__") and not isinstance(x, keras.KerasTensor)
        dtype = keras.backend.standardize_dtype(x.dtype)
        return dtype != self.input_dtype and bool(keras.backend.is_float_dtype(dtype))

    def call(
        self,
        query: Any,
        value: Any = None,
        key: Any = None,
        mask: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        training: bool | None = None,
        use_causal_mask: bool = False,
        return_attention_scores: bool = False,
    ) -> Any:
        """Attend.

        Parameters
        ----------
        query : (B, ..., N, width) tensor
            Rows.
        value : (B, ..., M, width) tensor, optional
            What they attend to, in place of themselves.
        key : (B, ..., M, width) tensor, optional
            What the keys are made of, in place of `value`.
        mask : (B, ..., N) bool tensor, optional
            True where a row of `query` counts. Keras passes it on from a layer such as ``Embedding(mask_zero=True)``.
        query_mask : (B, ..., N) bool tensor, optional
            The same, as Keras names it where `value` is given.
        value_mask : (B, ..., M) bool tensor, optional
            True where a row of `value` counts; by default `mask` where `value` is left out. Rows attend to themselves where `value` is
            left out or the very object that `query` is, and where this mask is the one given for the query: NystromAttention then
            leaves masked rows out of the landmarks of both.
        key_mask : (B, ..., M) bool tensor, optional
            A further mask of the same rows.
        training : bool, optional
            Nothing depends on it.
        use_causal_mask : bool
            Row i sees the rows up to its own, as with ``causal=True``.
        return_attention_scores : bool
            Return the matrix of weights too: an array of N x M, made as the attention of a unit matrix.

        Returns
        -------
        tensor, or two tensors
            (B, ..., N, width), and with `return_attention_scores` (B, ..., H, N, M).
        """
        rows = mask if query_mask is None else query_mask
        alone = value is None or value is query or (rows is not None and rows is value_mask)
        if value is None:
            value, value_mask = query, rows if value_mask is None else value_mask
        key = value if key is None else key
        given = [keras.ops.cast(x, "bool") for x in (value_mask, key_mask) if x is not None]
        both = None if not given else given[0] if len(given) == 1 else keras.ops.logical_and(*given)
        q, k, v = self._query_dense(query), self._key_dense(key), self._value_dense(value)
        if both is not None and not alone:
            k, v, both = self._apart(q, k, v, both)
        y = self._output_dense(self._attend(q, k, v, use_causal_mask, both))
        if not return_attention_scores:
            return y
        *outer, m, heads, _ = keras.ops.shape(k)
        # Of as many columns as there are rows of `value`: what stands behind them counts for nothing.
        columns = keras.ops.shape(value)[-2]
        unit = keras.ops.reshape(keras.ops.eye(m, columns, dtype=self.compute_dtype), (m, 1, columns))
        unit = keras.ops.broadcast_to(unit, (*outer, m, heads, columns))
        scores = self._attend(q, k, unit, use_causal_mask, both, matrix=True)
        return y, keras.ops.swapaxes(scores, -2, -3)

    def _apart(self, q: Any, k: Any, v: Any, mask: Any) -> tuple[Any, Any, Any]:
        """Keys, values and a mask that says nothing about the queries."""
        return k, v, mask

    def compute_output_shape(
        self, query_shape: Sequence[Any], value_shape: Sequence[Any] | None = None, key_shape: Any = None
    ) -> tuple[Any, ...]:
        """The shape of the result.

        Parameters
        ----------
        query_shape : tuple
            Of `call`'s `query`.
        value_shape : tuple, optional
            Of its `value`.
        key_shape : tuple, optional
            Of its `key`.

        Returns
        -------
        tuple
            Of the result without scores.
        """
        query, _, _ = self._shapes(query_shape, value_shape, key_shape)
        return (*query[:-1], self._output_dim or query[-1])

    def compute_output_spec(
        self,
        query: Any,
        value: Any = None,
        key: Any = None,
        *masks: Any,
        return_attention_scores: bool = False,
        **others: Any,
    ) -> Any:
        """Shape and dtype of what `call` gives, for functional models.

        Parameters
        ----------
        query : KerasTensor
            As for `call`, as are all arguments.
        value : KerasTensor, optional
            What it attends to.
        key : KerasTensor, optional
            What the keys are made of.
        *masks
            Masks.
        return_attention_scores : bool
            Return the matrix of weights too.
        **others
            The other arguments of `call`.

        Returns
        -------
        KerasTensor, or two
            As `call`.
        """
        value = query if value is None else value
        shape = self.compute_output_shape(query.shape, value.shape, None if key is None else key.shape)
        y = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return y
        lengths = (self.num_heads, query.shape[-2], value.shape[-2])
        return y, keras.KerasTensor((*query.shape[:-2], *lengths), dtype=self.compute_dtype)


class LinearAttention(_Heads):
    """A layer of linear attention: its time grows with the length, not with its square.

    Parameters
    ----------
    num_heads : int
        Heads of queries.
    key_dim : int
        Numbers in a row of a head's queries and keys.
    value_dim : int, optional
        Those of its values; `key_dim` by default.
    causal : bool
        Row i sees the keys up to its own.
    feature_map : str
        As in `fastops.linear_attention`.
    num_features : int, optional
        Features of "favor"; its directions are a weight that is not trained.
    decay : sequence of float, optional
        Logarithms <= 0 of the decay of each head of keys at each token that is not masked. Needs a causal call.
    seed : int, optional
        Of the directions; drawn by default, so that ``keras.utils.set_random_seed`` governs it.
    num_key_value_heads : int, optional
        Heads of keys and values, shared by groups of queries; `num_heads` by default.
    use_bias : bool
        Of the four projections, as are the next options, which are those of ``keras.layers.MultiHeadAttention``.
    output_shape : int, optional
        Numbers in a row of the result; those of a row of the query by default.
    kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer, kernel_constraint, bias_constraint : optional
        Keras's.
    **kwargs
        ``name``, ``dtype`` (a policy such as "mixed_bfloat16"), ``trainable``, ``activity_regularizer``.

    Raises
    ------
    TypeError, ValueError
        Sizes that do not fit, an unknown `feature_map`.
    NotImplementedError
        A backend of Keras other than torch, jax and numpy.

    Notes
    -----
    Called as ``keras.layers.MultiHeadAttention`` is, with the same weights in the same order: `get_weights` of one goes into
    `set_weights` of the other. `value` may be left out where rows attend to themselves. There is no
    dropout of weights and no mask of pairs; what padded rows of the query give is of no use, as there.
    The tensors must be on the CPU with torch.

    Examples
    --------
    >>> import keras, numpy as np
    >>> from fastops.keras import LinearAttention
    >>> layer = LinearAttention(num_heads=2, key_dim=4, causal=True)
    >>> x = np.ones((1, 5, 8), np.float32)
    >>> y, scores = layer(x, return_attention_scores=True)
    >>> tuple(y.shape), tuple(scores.shape)
    ((1, 5, 8), (1, 2, 5, 5))
    >>> keras.ops.convert_to_numpy(scores)[0, 0, 3].round(3)  # equal rows: equal weights
    array([0.25, 0.25, 0.25, 0.25, 0.  ], dtype=float32)
    """

    _options = ("causal", "feature_map", "num_features", "decay", "seed")

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        *,
        causal: bool = False,
        feature_map: str = "elu",
        num_features: int | None = None,
        decay: Sequence[float] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim, **kwargs)
        self.causal = _validate.boolean("causal", causal)
        self.feature_map, self.num_features = _attention.layer_features(feature_map, num_features)
        self.decay = None if decay is None else [_validate.number("decay", x, -float("inf"), 0.0) for x in decay]
        if self.decay is not None and len(self.decay) != self.num_key_value_heads:
            wanted = f"of {self.num_key_value_heads} numbers, one a head"
            raise _validate.wrong_value("decay", wanted, Text(str(len(self.decay))))
        self.seed = None if seed is None else _validate.integer("seed", seed, 0)

    def _own_weights(self) -> None:
        self._projection = None
        if self.num_features is not None:
            # As keras.random draws a seed that is not given.
            seed = random.randint(1, 10**9) if self.seed is None else self.seed
            rows = attention.favor_projection(self.key_dim, self.num_features, rng=seed)

            def initial(shape: Any, dtype: Any = None) -> Any:
                return keras.ops.convert_to_tensor(rows, dtype=dtype)

            self._projection = self.add_weight(
                name="projection", shape=rows.shape, initializer=initial, trainable=False, autocast=False
            )

    def _attend(self, q: Any, k: Any, v: Any, causal: bool, mask: Any, matrix: bool = False) -> Any:
        return _functions().linear_attention(
            q,
            k,
            v,
            causal=self.causal or causal,
            feature_map=self.feature_map,
            projection=None if self._projection is None else self._projection.value,
            key_mask=mask,
            decay=self._logs(mask),
            layout="bnhd",
        )

    def _logs(self, mask: Any) -> Any:
        """The decay of each head; of each key where there is a mask, so that what is masked decays nothing."""
        if self.decay is None:
            return None
        logs = keras.ops.convert_to_tensor(self.decay, dtype="float32")
        return logs if mask is None else keras.ops.where(mask[..., None, :], logs[:, None], 0.0)


class NystromAttention(_Heads):
    """A layer of Nystrom attention: softmax attention, approximated through landmarks.

    Parameters
    ----------
    num_heads : int
        Heads of queries.
    key_dim : int
        Numbers in a row of a head's queries and keys.
    value_dim : int, optional
        Those of its values; `key_dim` by default.
    num_landmarks : int
        As in `fastops.nystrom_attention`, as are all options up to `normalize`.
    iterations : int
        Steps towards the inverse.
    pinv : {"newton", "ridge"}
        How it is found.
    ridge : float, optional
        Of pinv="ridge".
    scale : float, optional
        Factor of q.k.
    init : {"matrix", "batch"}
        The coefficient with which the iteration begins.
    normalize : bool
        Divide each row by the sum of its weights.
    conv_kernel_size : int, optional
        Taps of a learned convolution of the values that is added to each head, an odd number; 33 in the paper's models.
    num_key_value_heads : int, optional
        Heads of keys and values, shared by groups of queries; `num_heads` by default.
    use_bias : bool
        Of the four projections, as are the next options, which are those of ``keras.layers.MultiHeadAttention``.
    output_shape : int, optional
        Numbers in a row of the result; those of a row of the query by default.
    kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer, kernel_constraint, bias_constraint : optional
        Keras's.
    **kwargs
        ``name``, ``dtype`` (a policy such as "mixed_bfloat16"), ``trainable``, ``activity_regularizer``.

    Raises
    ------
    TypeError, ValueError
        Sizes that do not fit, an even `conv_kernel_size`, options that exclude each other; a call with ``use_causal_mask=True``, which landmarks do not know.
    NotImplementedError
        A backend of Keras other than torch, jax and numpy.

    Notes
    -----
    Called as `LinearAttention` is, and its weights are the same. The scores that a call returns are those of the approximation,
    without the convolution; a row of them sums to 1 within its error, or exactly with `normalize`.
    Where rows attend to themselves, those that are padded take no part in the landmarks, and their results are 0 before the last
    projection. Padded rows of a query that attends to other rows do take part.

    Examples
    --------
    >>> import numpy as np
    >>> from fastops.keras import NystromAttention
    >>> layer = NystromAttention(num_heads=2, key_dim=4, num_landmarks=4, conv_kernel_size=3)
    >>> tuple(layer(np.ones((1, 20, 8), np.float32)).shape)
    (1, 20, 8)
    """

    _options = ("num_landmarks", "iterations", "pinv", "ridge", "scale", "init", "normalize", "conv_kernel_size")

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        *,
        num_landmarks: int = 64,
        iterations: int = 6,
        pinv: str = "newton",
        ridge: float | None = None,
        scale: float | None = None,
        init: str = "matrix",
        normalize: bool = False,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim, **kwargs)
        made = _nystrom.options(self.key_dim, num_landmarks, iterations, pinv, ridge, scale, init, normalize)
        self.num_landmarks, self.iterations, self.pinv, self.init = made.landmarks, made.iterations, pinv, init
        self.ridge, self.scale = None if ridge is None else made.ridge, None if scale is None else made.scale
        self.normalize = made.normalize
        self.conv_kernel_size = _nystrom.kernel_size(conv_kernel_size)

    def _own_weights(self) -> None:
        self._conv = None
        size = self.conv_kernel_size
        if size is not None:
            initial = keras.initializers.RandomUniform(-(size**-0.5), size**-0.5)
            self._conv = self.add_weight(name="conv", shape=(self.num_heads, size), initializer=initial)

    def _apart(self, q: Any, k: Any, v: Any, mask: Any) -> tuple[Any, Any, Any]:
        """One more key that is masked: with as many queries as keys the mask would hold for the queries too."""
        if keras.ops.shape(q)[-3] != keras.ops.shape(k)[-3]:
            return k, v, mask
        pads = [[0, 0]] * (len(k.shape) - 3)
        k, v = (keras.ops.pad(x, [*pads, [0, 1], [0, 0], [0, 0]]) for x in (k, v))
        return k, v, keras.ops.pad(mask, [*pads, [0, 1]], constant_values=False)

    def _attend(self, q: Any, k: Any, v: Any, causal: bool, mask: Any, matrix: bool = False) -> Any:
        if causal:
            raise _validate.wrong_value("use_causal_mask", "False for Nystrom attention", causal)
        return _functions().nystrom_attention(
            q,
            k,
            v,
            num_landmarks=self.num_landmarks,
            iterations=self.iterations,
            pinv=self.pinv,
            ridge=self.ridge,
            scale=self.scale,
            init=self.init,
            normalize=self.normalize,
            key_mask=mask,
            conv_weight=None if matrix or self._conv is None else self._conv.value,
            layout="bnhd",
        )


class SoftmaxAttention(_Heads):
    """A layer of exact softmax attention, without an array of N x M: what MultiHeadAttention computes, and log-n scaling.

    Parameters
    ----------
    num_heads : int
        Heads of queries.
    key_dim : int
        Numbers in a row of a head's queries and keys.
    value_dim : int, optional
        Those of its values; `key_dim` by default.
    causal : bool
        Row i sees the keys up to its own.
    logn : "keys", optional
        Scale a row's logits by the logarithm of the number of its keys, as in `fastops.softmax_attention`.
    num_key_value_heads : int, optional
        Heads of keys and values, shared by groups of queries; `num_heads` by default.
    use_bias : bool
        Of the four projections, as are the next options, which are those of ``keras.layers.MultiHeadAttention``.
    output_shape : int, optional
        Numbers in a row of the result; those of a row of the query by default.
    kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer, kernel_constraint, bias_constraint : optional
        Keras's.
    **kwargs
        ``name``, ``dtype`` (a policy such as "mixed_bfloat16"), ``trainable``, ``activity_regularizer``.

    Raises
    ------
    TypeError, ValueError
        Sizes that do not fit, an unknown `logn`.
    NotImplementedError
        A backend of Keras other than torch, jax and numpy.

    Notes
    -----
    Called as `LinearAttention` is, and its weights are the same.

    Examples
    --------
    >>> import keras, numpy as np
    >>> from fastops.keras import SoftmaxAttention
    >>> x = np.random.default_rng(0).standard_normal((1, 5, 8)).astype(np.float32)
    >>> theirs, ours = (layer(num_heads=2, key_dim=4) for layer in (keras.layers.MultiHeadAttention, SoftmaxAttention))
    >>> want, _ = theirs(x, x), ours(x, x)
    >>> ours.set_weights(theirs.get_weights())
    >>> bool(keras.ops.max(keras.ops.abs(ours(x, x) - want)) < 1e-5)
    True
    """

    _options = ("causal", "logn")

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        *,
        causal: bool = False,
        logn: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim, **kwargs)
        self.causal = _validate.boolean("causal", causal)
        self.logn = None if logn is None else _validate.choice("logn", logn, ("keys",))

    def _attend(self, q: Any, k: Any, v: Any, causal: bool, mask: Any, matrix: bool = False) -> Any:
        causal = self.causal or causal
        return _functions().softmax_attention(q, k, v, causal=causal, key_mask=mask, logn=self.logn, layout="bnhd")


# Files name them so; they load where this module is imported. No decorator: without Keras the documentation would lose the classes.
for _kind in (LinearAttention, NystromAttention, SoftmaxAttention):
    keras.saving.register_keras_serializable(package="fastops")(_kind)
