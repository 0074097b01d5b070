# SPDX-License-Identifier: BSD-3-Clause
"""Moving averages and optimizer steps over lists of tensors, in place, one pass over the memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from . import _dlpack, _validate
from ._backend import backend as _backend
from ._tensors import AdamStep, EgStep, FixedList, SgdStep, as_list
from ._validate import AnyArray, Text

if TYPE_CHECKING:
    from .averaging import EMA

__all__ = [
    "adamw_step_",
    "adaptive_eg_step_",
    "eg_step_",
    "ema_update_",
    "lazy_adamw_rows_",
    "lookahead_sync_",
    "sgd_step_",
]

Tensors = Iterable[Any]


def ema_update_(
    shadows: Tensors,
    params: Tensors,
    decay: float | Sequence[float],
    *,
    rounding: str = "nearest",
    seed: int | None = None,
) -> None:
    """Move every shadow towards its parameter: s += (1 - decay) (p - s).

    Parameters
    ----------
    shadows : list of arrays, float32 or float64 (bfloat16 with ``rounding="stochastic"``)
        Changed in place. NumPy arrays, torch CPU tensors, anything with the buffer protocol or DLPack; any strides.
    params : list of arrays, float16, bfloat16, float32 or float64
        As many as `shadows`, of the same shapes; converted to the shadow's dtype on the way.
    decay : float or sequence of float
        In [0, 1], one for all tensors or one for each. 1 changes nothing, 0 copies.
    rounding : {"nearest", "stochastic"}
        How bfloat16 shadows round. To nearest, an update below half a unit would be lost for ever, so they need "stochastic".
    seed : int, optional
        In [0, 2**64), needed for stochastic rounding. Take another one for each call, such as the number of the step.

    Raises
    ------
    TypeError
        A dtype that is not in the table above, an element that is no array in host memory.
    ValueError
        Lists of different lengths, shapes that differ, a shadow that is read-only or shares memory with another array, a decay
        outside [0, 1] or nan. The message names the tensor's index, and nothing was written.

    Notes
    -----
    With w = 1 - decay in double: fma(w, p - s, s) for w < 1/2, else fma(w - 1, p - s, p), as ``torch.lerp``; bit-equal to it in
    float32 for w < 1/2. The same bits for every thread count and every CPU level with FMA; without FMA, and in Numba, within
    2 eps max(abs(s), abs(p)). Stochastic rounding depends on (seed, index of the tensor, element) alone. An inf or nan of a
    parameter stays in the shadow; `EMA` can skip such updates.
    12 bytes of traffic an element in float32 and no memory beyond a few bytes a tensor: over a few huge tensors the memory sets
    the pace, and torch is as fast. Releases the GIL; a call that has begun is finished before Ctrl-C is heard.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> shadows = [np.zeros(2, np.float32), np.zeros((1, 3), np.float32)]
    >>> params = [np.ones(2, np.float32), np.full((1, 3), 2.0, np.float32)]
    >>> fastops.ema_update_(shadows, params, decay=0.75)
    >>> shadows[1]
    array([[0.5, 0.5, 0.5]], dtype=float32)
    """
    shadows, weights = _ema_weights(shadows, decay)
    _backend.ema_update((shadows,), params, (weights,), _seed(rounding, seed))


def _ema_weights(shadows: Tensors, decay: float | Sequence[float]) -> tuple[Tensors, float | list[float]]:
    """The shadows as something that can be read more than once, and 1 - decay, one for all or one for each."""
    if type(decay) is float or not _is_sequence(decay):
        return shadows, 1.0 - _validate.number("decay", decay, 0.0, 1.0)
    many = cast("Sequence[float]", decay)
    weights = [1.0 - _validate.number(f"decay[{i}]", d, 0.0, 1.0) for i, d in enumerate(many)]
    shadows, count = _sized("shadows", shadows)
    if len(weights) != count:
        wanted = f"a number or {count} of them, one for each of shadows"
        raise _validate.wrong_value("decay", wanted, Text(str(len(weights))))
    return shadows, weights


def _is_sequence(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _sized(name: str, tensors: Tensors) -> tuple[Tensors, int]:
    """The tensors as something that can be read more than once, and how many they are."""
    many = tensors if isinstance(tensors, (list, tuple, FixedList)) else as_list(name, tensors)
    return many, len(many)


def _seed(rounding: str, seed: int | None) -> int | None:
    if rounding == "nearest" and seed is None:
        return None
    _validate.choice("rounding", rounding, ("nearest", "stochastic"))
    if rounding == "nearest":
        raise _validate.wrong_value("seed", "None with rounding='nearest'", seed)
    return _validate.integer("seed", seed, 0, 2**64 - 1)


@contextlib.contextmanager
def _average(ema: Any, ema_decay: object, moves: bool = True) -> Iterator[tuple[Tensors | None, float]]:
    """The shadows of a step and 1 - their decay; an `EMA` counts the step where it succeeds."""
    if hasattr(ema, "_fused"):
        if ema_decay is not None:
            raise _validate.wrong_value("ema_decay", "None with an EMA, which has its own", ema_decay)
        if not moves:
            yield None, 0.0
            return
        with ema._fused() as (shadows, decay):
            yield shadows, 1.0 - decay
        return
    if (ema is None) != (ema_decay is None):
        missing, other = ("ema_decay", "ema") if ema_decay is None else ("ema", "ema_decay")
        raise _validate.wrong_value(missing, f"given with {other}, or an EMA as ema", None)
    yield ema, 0.0 if ema is None else 1.0 - _validate.number("ema_decay", ema_decay, 0.0, 1.0)


def sgd_step_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors | None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    accumulate: tuple[int, int] | None = None,
    ema: Tensors | EMA | None = None,
    ema_decay: float | None = None,
    zero_grad: bool = False,
) -> None:
    """Take one step of stochastic gradient descent with momentum, and update a moving average in the same pass.

    m = momentum m + (1 - dampening) (g + weight_decay p); p -= lr m.

    Parameters
    ----------
    params : list of arrays, float32 or float64
        Changed in place.
    grads : list of arrays
        Of the parameters' dtypes and shapes; float16 or bfloat16 beside float32 parameters too.
    momentum_buffers : list of arrays or None
        Of the parameters' dtypes and shapes, changed in place, zeros before the first step (torch takes the first gradient
        undamped in place of zeros: fill them with it for the same). None without momentum: p -= lr (g + weight_decay p).
    lr : float
        Step size, >= 0.
    momentum : float
        In [0, 1].
    dampening : float
        In [0, 1]; the form m = b m + (1 - b) g has dampening = momentum = b.
    nesterov : bool
        Step along g + momentum m. Needs buffers, dampening 0 as in torch, and no `accumulate`.
    weight_decay : float
        L2 penalty, >= 0.
    accumulate : (i, k), optional
        Call number i, counted on or from 0 in each group, of groups of k whose gradients are averaged within the momentum, without another buffer:
        m = (momentum where k divides i, else 1) m + (1 - dampening) / k g, and the parameters move where k divides i + 1.
        Equal to a step on the mean of the k gradients.
    ema : EMA or list of arrays, optional
        Shadows of the parameters' dtypes; they follow the new parameters whenever these move. An `EMA` of one profile that
        follows exactly `params` brings its own decay, and counts the step when it has succeeded and the parameters moved.
    ema_decay : float, optional
        In [0, 1], given with a list as `ema`.
    zero_grad : bool
        Set the gradients to zero in the same pass.

    Raises
    ------
    TypeError
        A dtype that does not fit, an option of the wrong type.
    ValueError
        Lists or shapes that differ, overlapping or read-only arrays, numbers out of range. Nothing was written.

    Notes
    -----
    20 bytes of traffic an element in float32, 28 with `ema`, where two calls would take 32; 12 for an accumulating call.
    Su Jianlin, "Gradient accumulation hidden in the momentum", kexue.fm/archives/8634; Sutskever et al., ICML 2013.
    The same bits for every thread count and CPU level with FMA.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> p, g, m = [np.array([1.0])], [np.array([0.5])], [np.zeros(1)]
    >>> fastops.sgd_step_(p, g, m, lr=0.1, momentum=0.9)
    >>> p[0]
    array([0.95])
    """
    numbers = _sgd_step(momentum_buffers, lr, momentum, dampening, nesterov, weight_decay, accumulate, zero_grad)
    with _average(ema, ema_decay, numbers.moves) as (shadows, weight):
        _backend.sgd_step(params, grads, momentum_buffers, shadows, numbers._replace(ema_weight=weight))


def _sgd_step(
    momentum_buffers: Tensors | None,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    accumulate: tuple[int, int] | None,
    zero_grad: bool,
) -> SgdStep:
    lr = _validate.number("lr", lr, 0.0)
    momentum = _validate.number("momentum", momentum, 0.0, 1.0)
    dampening = _validate.number("dampening", dampening, 0.0, 1.0)
    weight_decay = _validate.number("weight_decay", weight_decay, 0.0)
    nesterov = _validate.boolean("nesterov", nesterov)
    zero_grad = _validate.boolean("zero_grad", zero_grad)
    if momentum_buffers is None and (momentum or nesterov or accumulate is not None):
        raise _validate.wrong_value("momentum_buffers", "a list of arrays with momentum, nesterov or accumulate", None)
    if nesterov and (dampening or accumulate is not None):
        raise _validate.wrong_value("nesterov", "False with dampening or accumulate", nesterov)
    keep, gain, moves = momentum, 1.0 - dampening, True
    if accumulate is not None:
        i, k = _accumulate(accumulate)
        keep, gain, moves = momentum if i % k == 0 else 1.0, gain / k, (i + 1) % k == 0
    return SgdStep(lr, momentum, keep, gain, weight_decay, nesterov, moves, 0.0, zero_grad)


def _accumulate(value: object) -> tuple[int, int]:
    i, k = _pair("accumulate", value)
    return _validate.integer("accumulate[0]", i, 0), _validate.integer("accumulate[1]", k, 1)


def _adam_step(
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    zero_grad: bool = False,
) -> AdamStep:
    step = _validate.integer("step", step, 1)
    lr = _validate.number("lr", lr, 0.0)
    first, second = _pair("betas", betas)
    beta1 = _validate.number("betas[0]", first, 0.0, 1.0, open_high=True)
    beta2 = _validate.number("betas[1]", second, 0.0, 1.0, open_high=True)
    eps = _validate.number("eps", eps, 0.0)
    weight_decay = _validate.number("weight_decay", weight_decay, 0.0)
    decoupled = _validate.boolean("decoupled", decoupled)
    zero_grad = _validate.boolean("zero_grad", zero_grad)
    return AdamStep(
        decay=1.0 - lr * weight_decay if decoupled else 1.0,
        l2=0.0 if decoupled else weight_decay,
        w1=1.0 - beta1,
        beta2=beta2,
        w2=1.0 - beta2,
        step_size=lr / (1.0 - beta1**step),
        scale=1.0 / math.sqrt(1.0 - beta2**step),
        eps=eps,
        ema_weight=0.0,
        zero_grad=zero_grad,
    )


def adamw_step_(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    ema: Tensors | EMA | None = None,
    ema_decay: float | None = None,
    zero_grad: bool = False,
) -> None:
    """Take one AdamW step, and update a moving average of the parameters in the same pass.

    p = (1 - lr weight_decay) p; m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2;
    p -= lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps).

    Parameters
    ----------
    params : list of arrays, float32 or float64
        Changed in place.
    grads : list of arrays
        Of the parameters' dtypes and shapes; float16 or bfloat16 beside float32 parameters too.
    exp_avg : list of arrays
        First moments m, of the parameters' dtypes and shapes, changed in place; zeros before the first step.
    exp_avg_sq : list of arrays
        Second moments v, likewise.
    step : int
        Number of this step, from 1.
    lr : float
        Step size, >= 0.
    betas : (float, float)
        Decays of the moments, in [0, 1).
    eps : float
        Added to the root, >= 0.
    weight_decay : float
        >= 0; torch's default is 0.01.
    decoupled : bool
        False adds the weight decay to the gradient (Adam with an L2 penalty).
    ema : EMA or list of arrays, optional
        Shadows of the parameters' dtypes, which follow the new parameters. An `EMA` of one profile that follows exactly
        `params` brings its own decay, and counts the step when it has succeeded.
    ema_decay : float, optional
        In [0, 1], given with a list as `ema`.
    zero_grad : bool
        Set the gradients to zero in the same pass.

    Raises
    ------
    TypeError
        A dtype that does not fit, an option of the wrong type.
    ValueError
        Lists or shapes that differ, overlapping or read-only arrays, numbers out of range. Nothing was written.

    Notes
    -----
    28 bytes of traffic an element in float32, 36 with `ema` where two calls take 40; no memory beyond a few bytes a tensor.
    The same bits for every thread count and CPU level with FMA.
    Kingma and Ba, ICLR 2015; Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> p, g, m, v = ([np.array([x])] for x in (1.0, 0.5, 0.0, 0.0))
    >>> fastops.adamw_step_(p, g, m, v, step=1, lr=0.01, weight_decay=0.1)
    >>> p[0].round(10)
    array([0.989])
    """
    numbers = _adam_step(step, lr, betas, eps, weight_decay, decoupled, zero_grad=zero_grad)
    with _average(ema, ema_decay) as (shadows, weight):
        _backend.adamw_step(params, grads, exp_avg, exp_avg_sq, shadows, numbers._replace(ema_weight=weight))


def lookahead_sync_(slow: Tensors, fast: Tensors, alpha: float = 0.5) -> None:
    """Synchronise slow and fast weights: slow += alpha (fast - slow), then fast = slow.

    Parameters
    ----------
    slow : list of arrays, float32 or float64
        Changed in place; a copy of the parameters before training.
    fast : list of arrays
        The parameters, of the same dtypes and shapes, changed in place.
    alpha : float
        In [0, 1].

    Raises
    ------
    TypeError
        A dtype that does not fit.
    ValueError
        Lists or shapes that differ, overlapping or read-only arrays, `alpha` out of range. Nothing was written.

    Notes
    -----
    Call it after every k steps of the optimizer (k = 5 or 6 in the paper). 16 bytes of traffic an element in float32.
    Zhang, Lucas, Hinton and Ba, "Lookahead optimizer: k steps forward, 1 step back", NeurIPS 2019.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> slow, fast = [np.array([1.0])], [np.array([0.6])]
    >>> fastops.lookahead_sync_(slow, fast)
    >>> fast[0]
    array([0.8])
    """
    _backend.lookahead_sync(slow, fast, _validate.number("alpha", alpha, 0.0, 1.0))


def lazy_adamw_rows_(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    rows: Tensors | None = None,
    *,
    state: str = "frozen",
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
) -> None:
    """Take an AdamW step on the rows that have a gradient, as embedding tables want it.

    Parameters
    ----------
    params : list of arrays of shape (R, ...), float32 or float64
        Changed in place in the live rows.
    grads : list of arrays
        With `rows`, of shape (len(rows), ...): a gradient for each of them. Without, of the parameters' shape: a row is live
        where an element of its gradient is not 0.
    exp_avg : list of arrays
        First moments, of the parameters' dtypes and shapes.
    exp_avg_sq : list of arrays
        Second moments, likewise.
    rows : list of 1-D arrays of int, optional
        Distinct indices of the live rows, in any order.
    state : {"frozen", "decay"}
        What happens to the moments of the other rows: nothing (as ``torch.optim.SparseAdam``), or the decay that a gradient of
        zero brings (as in keras_lazyoptimizer).
    step : int
        Number of this step, from 1, the same for all rows.
    lr : float
        Step size, >= 0.
    betas : (float, float)
        Decays of the moments, in [0, 1).
    eps : float
        Added to the root, >= 0.
    weight_decay : float
        >= 0, of live rows only.
    decoupled : bool
        False adds the weight decay to the gradient.

    Raises
    ------
    TypeError
        A dtype that does not fit.
    ValueError
        Shapes that do not fit, rows out of range or repeated, overlapping or read-only arrays. Nothing was written.

    Notes
    -----
    28 bytes of traffic for each element of a live row; with ``state="decay"`` also a pass over both moments, 16 bytes an
    element. Some 0.1 ms of checks a call: for tables of few or narrow rows a dense `adamw_step_` is faster.
    Gradients of equal rows are added up first: of torch, ``g = p.grad.coalesce()`` has ``g.indices()[0]`` and ``g.values()``;
    in NumPy sort the rows and use ``numpy.add.reduceat``.
    Su Jianlin, keras_lazyoptimizer.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> table, m, v = ([np.full((3, 2), x)] for x in (1.0, 0.0, 0.0))
    >>> fastops.lazy_adamw_rows_(table, [np.ones((1, 2))], m, v, [np.array([2])], step=1, lr=0.5)
    >>> table[0].round(6)
    array([[1. , 1. ],
           [1. , 1. ],
           [0.5, 0.5]])
    """
    decays = _validate.choice("state", state, ("frozen", "decay")) == "decay"
    numbers = _adam_step(step, lr, betas, eps, weight_decay, decoupled)
    _backend.lazy_adamw_rows(params, grads, exp_avg, exp_avg_sq, rows, decays, numbers)


def eg_step_(params: Tensors, grads: Tensors, *, lr: float) -> None:
    """Take one step of the exponentiated gradient: p = p exp(-lr g).

    Parameters
    ----------
    params : list of arrays, float32 or float64
        Changed in place; every element keeps its sign.
    grads : list of arrays
        Of the parameters' dtypes and shapes; float16 or bfloat16 beside float32 parameters too.
    lr : float
        Step size, >= 0.

    Raises
    ------
    TypeError
        A dtype that does not fit.
    ValueError
        Lists or shapes that differ, overlapping or read-only arrays, `lr` out of range. Nothing was written.

    Notes
    -----
    12 bytes of traffic an element in float32; the exponential is right to 1 unit in the last place (1.3 without FMA).
    Kivinen and Warmuth, "Exponentiated gradient versus gradient descent for linear predictors", 1997.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> p = [np.array([1.0, 2.0, 0.5])]
    >>> fastops.eg_step_(p, [np.array([0.1, -0.2, 0.3])], lr=0.5)
    >>> p[0].round(8)
    array([0.95122942, 2.21034184, 0.43035399])
    """
    _backend.eg_step(params, grads, _validate.number("lr", lr, 0.0))


def adaptive_eg_step_(
    params: Tensors,
    grads: Tensors,
    momentum: Tensors,
    update: Tensors,
    gain: Tensors,
    scales: AnyArray,
    *,
    lr: float,
    beta: float = 0.9,
    mu: float = 0.9,
    gain_lr: float = 0.01,
    gain_bounds: tuple[float, float] = (0.01, 100.0),
    scale_lr: float = 0.001,
    scale_bounds: tuple[float, float] = (0.1, 10.0),
) -> None:
    """Take a gradient step whose step sizes are tuned by exponentiated gradients.

    gain = gain exp(gain_lr sign(m) sign(g)); scale = scale exp(scale_lr cos(h, g)); m = beta m + (1 - beta) g;
    h = mu h + lr gain g; p -= scale h.

    Parameters
    ----------
    params : list of arrays, float32 or float64
        Changed in place, as are the four states.
    grads : list of arrays
        Of the parameters' dtypes and shapes; float16 or bfloat16 beside float32 parameters too.
    momentum : list of arrays
        The m above, zeros at first.
    update : list of arrays
        The h above, zeros at first.
    gain : list of arrays
        A step size for each element, ones at first.
    scales : 1-D float64 array
        A step size for each tensor, ones at first.
    lr : float
        Step size, >= 0.
    beta : float
        In [0, 1), of the momentum.
    mu : float
        In [0, 1), of the update.
    gain_lr : float
        >= 0, of the gains.
    gain_bounds : (float, float)
        The gains stay between these.
    scale_lr : float
        >= 0, of the scales.
    scale_bounds : (float, float)
        The scales stay between these.

    Raises
    ------
    TypeError
        A dtype that does not fit.
    ValueError
        Lists or shapes that differ, overlapping or read-only arrays, numbers out of range. Nothing was written.

    Notes
    -----
    Two passes over h and g (the angle between them, then the step): 44 bytes of traffic an element in float32. The sums of the
    first pass are taken in double, in an order that no thread count changes.
    Amid, Anil, Fifty and Warmuth, "Step-size adaptation using exponentiated gradient updates", arXiv 2202.00145, with the
    signs and unit vectors of its published implementation.

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> p, g, m, h, gain = ([np.array(x)] for x in ([1.0, -1.0], [1.0, -2.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]))
    >>> fastops.adaptive_eg_step_(p, g, m, h, gain, np.ones(1), lr=0.1)
    >>> p[0]
    array([ 0.9, -0.8])
    """
    numbers = EgStep(
        _validate.number("lr", lr, 0.0),
        _validate.number("beta", beta, 0.0, 1.0, open_high=True),
        _validate.number("mu", mu, 0.0, 1.0, open_high=True),
        _validate.number("gain_lr", gain_lr, 0.0),
        *_bounds("gain_bounds", gain_bounds),
        _validate.number("scale_lr", scale_lr, 0.0),
        *_bounds("scale_bounds", scale_bounds),
    )
    params, count = _sized("params", params)
    _backend.adaptive_eg_step(params, grads, momentum, update, gain, _scales(scales, count), numbers)


def _bounds(name: str, value: object) -> tuple[float, float]:
    first, second = _pair(name, value)
    low = _validate.number(f"{name}[0]", first, 0.0, open_low=True)
    return low, _validate.number(f"{name}[1]", second, low)


def _pair(name: str, value: object) -> tuple[object, object]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise _validate.wrong_type(name, "a pair", value)
    return value[0], value[1]


def _scales(value: object, count: int) -> AnyArray:
    if hasattr(value, "mask"):
        raise _validate.wrong_type("scales", "an array without a mask", Text("a masked array"))
    if _dlpack.is_own_memory(value):
        value = _validate.array("scales", value)
    if not isinstance(value, np.ndarray) or value.dtype != np.float64 or not value.dtype.isnative:
        raise _validate.wrong_type("scales", "a float64 array", value)
    if value.shape != (count,):
        raise _validate.wrong_value(
            "scales", f"of shape ({count},), a number for each of params", Text(str(value.shape))
        )
    if not value.flags.writeable:
        raise _validate.wrong_value("scales", "writable", Text("a read-only array"))
    if _validate.overlaps_itself(value):
        wanted = "an array whose elements are all distinct in memory"
        raise _validate.wrong_value("scales", wanted, Text("overlapping strides"))
    if not all(0.0 < scale < math.inf for scale in value.tolist()):
        raise _validate.wrong_value("scales", "positive and finite everywhere", Text("others"))
    return value
