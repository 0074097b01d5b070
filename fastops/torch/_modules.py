# SPDX-License-Identifier: BSD-3-Clause
"""Layers of torch with approximate products, the conversion of whole models, and layers of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _attention, _nystrom, _validate, attention, mitchell
from .._multiplier import Multiplier
from .._validate import Text
from . import _ops
from ._attention import _given, linear_attention, linear_attention_step_, nystrom_attention
from ._mitchell import mitchell_conv2d, mitchell_matmul

__all__ = ["LinearAttention", "MitchellConv2d", "MitchellLinear", "NystromAttention", "approximate", "exact"]

M = TypeVar("M", bound=Any)


class _Approximate:
    """What both layers add to torch's own."""

    multiplier: Multiplier
    mode: str

    def _become(self, multiplier: Multiplier | None, mode: str) -> None:
        self.multiplier = mitchell._multiplier(multiplier)
        self.mode = _validate.choice("mode", mode, _validate.GRADIENT_MODES)

    def _told(self, text: str) -> str:
        return f"{text}, multiplier={self.multiplier!r}, mode={self.mode!r}"


class MitchellLinear(_Approximate, torch.nn.Linear):
    """``torch.nn.Linear`` whose products are approximate; sums and the bias are exact.

    Parameters
    ----------
    in_features : int
        Numbers in a row of the input.
    out_features : int
        Numbers in a row of the result.
    bias : bool
        Add a learned bias.
    multiplier : fastops.Multiplier, optional
        Mitchell's multiplier by default.
    mode : {"exact", "ste", "mimic"}
        The gradient, as in `fastops.mitchell_matmul_grad`.
    **options
        ``device`` and ``dtype`` of torch's.

    Raises
    ------
    TypeError, ValueError
        A `multiplier` that is not one, an unknown `mode`.

    Examples
    --------
    >>> import torch
    >>> from fastops.torch import MitchellLinear
    >>> layer = MitchellLinear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(layer.weight, 1.5)
    >>> layer(torch.tensor([[1.5]])).item()
    2.0
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        multiplier: Multiplier | None = None,
        mode: str = "exact",
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **options)
        self._become(multiplier, mode)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's result.

        Parameters
        ----------
        input : (..., in_features) Tensor
            Rows.

        Returns
        -------
        (..., out_features) Tensor
            Their images.
        """
        y = mitchell_matmul(input, self.weight.t(), multiplier=self.multiplier, mode=self.mode)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """The sizes and the multiplier, for `repr`."""
        return self._told(super().extra_repr())


class MitchellConv2d(_Approximate, torch.nn.Conv2d):
    """``torch.nn.Conv2d`` whose products are approximate; sums and the bias are exact.

    Parameters
    ----------
    *args
        Those of ``torch.nn.Conv2d``.
    multiplier : fastops.Multiplier, optional
        Mitchell's multiplier by default.
    mode : {"exact", "ste", "mimic"}
        The gradient, as in `fastops.mitchell_conv2d_grad`.
    **options
        Those of ``torch.nn.Conv2d``: every padding and padding mode.

    Raises
    ------
    TypeError, ValueError
        A `multiplier` that is not one, an unknown `mode`.

    Examples
    --------
    >>> import torch
    >>> from fastops.torch import MitchellConv2d
    >>> MitchellConv2d(1, 2, 3, padding="same")(torch.ones(1, 1, 5, 5)).shape
    torch.Size([1, 2, 5, 5])
    """

    def __init__(self, *args: Any, multiplier: Multiplier | None = None, mode: str = "exact", **options: Any) -> None:
        super().__init__(*args, **options)
        self._become(multiplier, mode)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's result.

        Parameters
        ----------
        input : (N, C, H, W) or (C, H, W) Tensor
            Images.

        Returns
        -------
        (N, O, OH, OW) or (O, OH, OW) Tensor
            Their images.
        """
        x = input.unsqueeze(0) if input.ndim == 3 else input
        padding: Any = self.padding
        if self.padding_mode != "zeros" or padding == "same":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = torch.nn.functional.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        y = mitchell_conv2d(
            x,
            self.weight,
            stride=self.stride,
            padding=(0, 0) if padding == "valid" else padding,
            dilation=self.dilation,
            groups=self.groups,
            multiplier=self.multiplier,
            mode=self.mode,
        )
        y = y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]
        return y.squeeze(0) if input.ndim == 3 else y

    def extra_repr(self) -> str:
        """The sizes and the multiplier, for `repr`."""
        return self._told(super().extra_repr())


_APPROXIMATE: dict[type, type] = {torch.nn.Linear: MitchellLinear, torch.nn.Conv2d: MitchellConv2d}
_EXACT: dict[type, type] = {approximate: plain for plain, approximate in _APPROXIMATE.items()}


def approximate(
    model: M,
    multiplier: Multiplier | None = None,
    *,
    mode: str = "exact",
    where: Callable[[str, torch.nn.Module], bool] | None = None,
) -> M:
    """Turn the linear and convolutional layers of a model into approximate ones, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Its layers of the types ``torch.nn.Linear`` and ``torch.nn.Conv2d`` become `MitchellLinear` and `MitchellConv2d`;
        subclasses, such as those within ``torch.nn.MultiheadAttention``, stay as they are. Layers that are approximate already
        get the new multiplier.
    multiplier : fastops.Multiplier, optional
        Mitchell's multiplier by default.
    mode : {"exact", "ste", "mimic"}
        The gradient, as in `fastops.mitchell_matmul_grad`.
    where : callable, optional
        Says of the name and module of each layer whether it shall be changed: ``lambda name, layer: name != "head"``.

    Returns
    -------
    torch.nn.Module
        The model. Parameters, hooks and state dict are the same objects and names, so an optimizer goes on with them.

    Raises
    ------
    TypeError
        A `model` that is no module, a `multiplier` that is not one.
    ValueError
        An unknown `mode`; no layer to change.

    Examples
    --------
    >>> import torch
    >>> from fastops.torch import approximate, exact
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    >>> approximate(model)[0]
    MitchellLinear(in_features=2, out_features=2, bias=True, multiplier=Multiplier(), mode='exact')
    >>> exact(model)[0]
    Linear(in_features=2, out_features=2, bias=True)
    """
    _want_module(model)
    chosen, gradient = mitchell._multiplier(multiplier), _validate.choice("mode", mode, _validate.GRADIENT_MODES)
    layers = [
        layer
        for name, layer in model.named_modules()
        if (type(layer) in _APPROXIMATE or type(layer) in _EXACT) and (where is None or where(name, layer))
    ]
    if not layers:
        raise _validate.wrong_value("model", "a module with a Linear or Conv2d to change", Text("none"))
    for layer in layers:
        layer.__class__ = _APPROXIMATE.get(type(layer), type(layer))
        layer._become(chosen, gradient)
    return model


def exact(model: M) -> M:
    """Turn the approximate layers of a model back into torch's own, in place.

    Parameters
    ----------
    model : torch.nn.Module
        As `approximate` left it, trained since or not.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    TypeError
        A `model` that is no module.

    Examples
    --------
    >>> from fastops.torch import MitchellLinear, exact
    >>> exact(MitchellLinear(2, 3))
    Linear(in_features=2, out_features=3, bias=True)
    """
    _want_module(model)
    for layer in model.modules():
        plain = _EXACT.get(type(layer))
        if plain is not None:
            del layer.multiplier, layer.mode
            layer.__class__ = plain
    return model


def _want_module(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise _validate.wrong_type("model", "a torch.nn.Module", model)


# --- attention ---------------------------------------------------------------------------------------------------------------------


class _Heads(torch.nn.Module):
    """Projections of rows to heads and back."""

    def __init__(
        self, embed_dim: int, num_heads: int, kv_heads: int | None, bias: bool, device: Any, dtype: Any
    ) -> None:
        super().__init__()
        self.embed_dim = _validate.integer("embed_dim", embed_dim, 1)
        self.num_heads = _validate.integer("num_heads", num_heads, 1)
        self.kv_heads = num_heads if kv_heads is None else _validate.integer("kv_heads", kv_heads, 1)
        if embed_dim % num_heads:
            raise _validate.wrong_value("num_heads", f"a divisor of embed_dim={embed_dim}", num_heads)
        if num_heads % self.kv_heads:
            raise _validate.wrong_value("kv_heads", f"a divisor of num_heads={num_heads}", self.kv_heads)
        self.head_dim = embed_dim // num_heads
        options = {"bias": bias, "device": device, "dtype": dtype}
        width = self.kv_heads * self.head_dim
        self.q_proj = torch.nn.Linear(embed_dim, embed_dim, **options)
        self.k_proj = torch.nn.Linear(embed_dim, width, **options)
        self.v_proj = torch.nn.Linear(embed_dim, width, **options)
        self.out_proj = torch.nn.Linear(embed_dim, embed_dim, **options)

    def _split(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (..., N, H, D)."""
        source = x if context is None else context
        for name, given in (("x", x), ("context", source)):
            _ops.want_tensor(name, given)
            if not given.ndim or given.shape[-1] != self.embed_dim:
                wanted = f"of rows of embed_dim={self.embed_dim} numbers"
                raise _validate.wrong_value(name, wanted, Text(f"shape {_validate.clip(str(tuple(given.shape)))}"))
        rows = (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in rows)
        return q, k, v


def _decay_of_heads(decay: object, heads: int) -> list[float]:
    if isinstance(decay, Tensor):
        decay = decay.tolist()
    if isinstance(decay, str) or not isinstance(decay, Sequence):
        raise _validate.wrong_type("decay", f"a sequence of {heads} numbers, one a head", decay)
    if len(decay) != heads:
        raise _validate.wrong_value("decay", f"of {heads} numbers, one a head", Text(str(len(decay))))
    return [_validate.number("decay", x, -math.inf, 0.0) for x in decay]


class LinearAttention(_Heads):
    """A layer of linear attention, with the next token of a sequence at a cost that does not grow.

    Parameters
    ----------
    embed_dim : int
        Numbers in a row of the input and of the result.
    num_heads : int
        Heads; it divides `embed_dim`.
    kv_heads : int, optional
        Heads of keys and values, shared by groups of queries.
    causal : bool
        Row i sees the keys up to its own.
    feature_map : str
        As in `fastops.linear_attention`.
    num_features : int, optional
        Features of "favor"; its directions are a buffer.
    decay : sequence of float, optional
        Logarithms <= 0 of the decay of each of the `kv_heads` at each token that is not masked; a buffer. Needs `causal`.
    bias : bool
        Of the four projections.
    device, dtype : optional
        Of the weights.

    Raises
    ------
    TypeError, ValueError
        Sizes that do not fit, an unknown `feature_map`.

    Examples
    --------
    >>> import torch
    >>> from fastops.torch import LinearAttention
    >>> layer = LinearAttention(8, 2, causal=True).eval()
    >>> x = torch.randn(1, 5, 8)
    >>> y, state = layer(x[:, :4], return_state=True)
    >>> torch.allclose(layer.step(x[:, 4], state), layer(x)[:, 4], atol=1e-5)
    True
    """

    projection: Tensor | None
    decay: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        causal: bool = False,
        feature_map: str = "elu",
        num_features: int | None = None,
        decay: Sequence[float] | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, kv_heads, bias, device, dtype)
        self.causal = _validate.boolean("causal", causal)
        self.feature_map, count = _attention.layer_features(feature_map, num_features)
        w = None
        if count is not None:
            seed = int(torch.randint(2**62, ()))
            rows = attention.favor_projection(self.head_dim, count, rng=seed)
            w = torch.from_numpy(rows).to(device=device, dtype=dtype or torch.get_default_dtype())
        self.register_buffer("projection", w)
        logs = None if decay is None else _decay_of_heads(decay, self.kv_heads)
        if logs is not None and not self.causal:
            raise _validate.wrong_value("decay", "None without causal=True", decay)
        self.register_buffer("decay", None if logs is None else torch.tensor(logs, device=device, dtype=torch.float32))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        state: Sequence[Tensor] | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attend.

        Parameters
        ----------
        x : (..., N, embed_dim) Tensor
            Rows.
        context : (..., M, embed_dim) Tensor, optional
            What they attend to, in place of themselves.
        key_mask : (..., M) bool Tensor, optional
            True where a row of the context counts.
        state : tuple of Tensors, optional
            The sums to begin with, as `return_state` gives them.
        return_state : bool
            Return the sums over all keys too.

        Returns
        -------
        Tensor, or a Tensor and a tuple of Tensors
            (..., N, embed_dim), and the state with `return_state`.
        """
        decay = self.decay
        key_mask = _given("key_mask", key_mask)
        if decay is not None and key_mask is not None and key_mask.dtype == torch.bool:
            # Of each key, so that what is masked decays nothing.
            seen = key_mask if key_mask.ndim == x.ndim else key_mask[..., None, :]
            decay = torch.where(seen, decay[:, None], 0.0)
        found = linear_attention(
            *self._split(x, context),
            causal=self.causal,
            feature_map=self.feature_map,
            projection=self.projection,
            key_mask=key_mask,
            decay=decay,
            initial_state=state,
            return_state=return_state,
            layout="bnhd",
        )
        y, after = found if return_state else (found, None)
        y = self.out_proj(y.flatten(-2))
        return (y, after) if return_state else y

    def step(self, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        """Take the next token, without gradients.

        Parameters
        ----------
        x : (..., embed_dim) Tensor
            Its row.
        state : tuple of Tensors
            As `forward` or `new_state` gives it; changed in place.

        Returns
        -------
        (..., embed_dim) Tensor
            The token's result.

        Raises
        ------
        ValueError
            A layer that is not causal.
        """
        if not self.causal:
            raise _validate.wrong_value("causal", "True for steps", self.causal)
        s = state[0] if isinstance(state, (tuple, list)) and state else None
        if isinstance(x, Tensor) and isinstance(s, Tensor) and x.ndim != s.ndim - 2:
            wanted = f"of shape {(*s.shape[:-3], self.embed_dim)}, the row of one token for each state"
            raise _validate.wrong_value("x", wanted, Text(_validate.clip(str(tuple(x.shape)))))
        with torch.no_grad():
            y = linear_attention_step_(
                *self._split(x, None),
                state,
                feature_map=self.feature_map,
                projection=self.projection,
                decay=self.decay,
            )
            return self.out_proj(y.flatten(-2))

    def new_state(self, *batch: int) -> tuple[Tensor, ...]:
        """The state before the first token.

        Parameters
        ----------
        *batch : int
            Sizes of the leading dimensions.

        Returns
        -------
        tuple of Tensors
            S, z, and m for "exp", "softmax" and "favor".

        Raises
        ------
        TypeError, ValueError
            What is no size, such as a tuple of them.
        """
        given: tuple[Any, ...] = batch
        for size in given:
            if isinstance(size, (tuple, list)):
                raise _validate.wrong_type("batch", "integers, an argument for each (new_state(*sizes))", size)
            _validate.integer("batch", size, 0)
        with torch.no_grad():
            found = self(self.q_proj.weight.new_zeros((*batch, 0, self.embed_dim)), return_state=True)
        state: tuple[Tensor, ...] = found[1]
        return state

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return (
            f"{self.embed_dim}, {self.num_heads}, kv_heads={self.kv_heads}, causal={self.causal}, "
            f"feature_map={self.feature_map!r}"
        )


class NystromAttention(_Heads):
    """A layer of Nystrom attention.

    Parameters
    ----------
    embed_dim : int
        Numbers in a row of the input and of the result.
    num_heads : int
        Heads; it divides `embed_dim`.
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
        Taps of a learned convolution of the values that is added to each head, an odd number; 33 in the paper's models. Not with a
        `context` of another length.
    bias : bool
        Of the four projections.
    device, dtype : optional
        Of the weights.

    Raises
    ------
    TypeError, ValueError
        Sizes that do not fit, an even `conv_kernel_size`, options that exclude each other.

    Examples
    --------
    >>> import torch
    >>> from fastops.torch import NystromAttention
    >>> NystromAttention(8, 2, num_landmarks=4, conv_kernel_size=3)(torch.randn(1, 20, 8)).shape
    torch.Size([1, 20, 8])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_landmarks: int = 64,
        iterations: int = 6,
        pinv: str = "newton",
        ridge: float | None = None,
        scale: float | None = None,
        init: str = "matrix",
        normalize: bool = False,
        conv_kernel_size: int | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, None, bias, device, dtype)
        made = _nystrom.options(self.head_dim, num_landmarks, iterations, pinv, ridge, scale, init, normalize)
        self.num_landmarks, self.iterations, self.pinv, self.init = made.landmarks, made.iterations, pinv, init
        self.ridge, self.scale = None if ridge is None else made.ridge, None if scale is None else made.scale
        self.normalize = made.normalize
        taps, size = None, _nystrom.kernel_size(conv_kernel_size)
        if size is not None:
            taps = torch.nn.Parameter(torch.empty(num_heads, size, device=device, dtype=dtype))
            torch.nn.init.uniform_(taps, -(size**-0.5), size**-0.5)
        self.register_parameter("conv_weight", taps)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Parameters
        ----------
        x : (..., N, embed_dim) Tensor
            Rows.
        context : (..., M, embed_dim) Tensor, optional
            What they attend to, in place of themselves.
        key_mask : (..., M) bool Tensor, optional
            True where a row counts. Where M = N it holds for the rows of `x` too, also with a `context`: where one can be as long as
            `x` by chance, add a masked row to it.

        Returns
        -------
        (..., N, embed_dim) Tensor
            The results.
        """
        y = nystrom_attention(
            *self._split(x, context),
            num_landmarks=self.num_landmarks,
            iterations=self.iterations,
            pinv=self.pinv,
            ridge=self.ridge,
            scale=self.scale,
            init=self.init,
            normalize=self.normalize,
            key_mask=key_mask,
            conv_weight=self.conv_weight,
            layout="bnhd",
        )
        return self.out_proj(y.flatten(-2))

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.embed_dim}, {self.num_heads}, num_landmarks={self.num_landmarks}"
