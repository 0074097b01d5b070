# SPDX-License-Identifier: BSD-3-Clause
"""A callback of Keras that averages the weights of a model along its training."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from .. import _schedules, _shadows, _tensors, _validate, optim
from .._backend import backend as _backend
from .._tensors import TensorList
from .._validate import AnyArray, Text

__all__ = ["EMA"]

# The EMA whose averages are in a model now; a second one would take them for the weights.
_SWAPPED: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class _Guard:
    """Stands before a model's `evaluate` during `fit`: what ends an evaluation early puts the weights back.

    Keras tells callbacks nothing of an exception, so this is the one place that hears of all of them. A `fit` that raises between
    evaluations leaves it standing: it then lets through what is not called by a `fit`.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._validates = False
        functools.update_wrapper(self, type(model).evaluate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        before = self._validates
        # `fit` gives the list of callbacks that it has made.
        self._validates = isinstance(kwargs.get("callbacks"), keras.callbacks.CallbackList)
        try:
            return type(model).evaluate(model, *args, **kwargs)
        except BaseException:
            if self._validates:
                ema = _SWAPPED.get(model)
                if ema is not None:
                    ema._swap_out()
                self.remove(model)
            raise
        finally:
            self._validates = before

    @staticmethod
    def validates(model: Any) -> bool:
        """Whether this is a validation of `fit` that one stands before."""
        guard = vars(model).get("evaluate")
        return isinstance(guard, _Guard) and guard._validates

    @staticmethod
    def remove(model: Any) -> None:
        """Make `evaluate` the model's own again."""
        if isinstance(vars(model).get("evaluate"), _Guard):
            del vars(model)["evaluate"]


def _is_float(variable: Any) -> bool:
    return bool(keras.backend.is_float_dtype(variable.dtype))


class EMA(keras.callbacks.Callback):
    """A moving average of a model's weights, whatever its optimizer, with the averages swapped in for validation.

    Parameters
    ----------
    decay : float in [0, 1] or "equal"
        The average moves by s += (1 - decay) (p - s) after each batch. "equal" is the plain mean of the weights at all updates
        (SWA).
    warmup : {"none", "timm", "tf"}
        As in `fastops.EMA`, as are the next three.
    inv_gamma : float
        Of "timm".
    power : float
        Of "timm".
    min_decay : float
        Of "timm" and "tf".
    update_every : int
        Only every so many batches move the averages.
    update_after_step : int, optional
        Up to this batch the average is a copy: 1 by default, so that the first update copies, as in Keras's ``use_ema``, and 0
        with a warmup or "equal", whose first decay is 0 anyway.
    buffers : {"skip", "average"}
        What becomes of floating-point variables that are not trainable when `fit` begins, such as the moving statistics of
        ``BatchNormalization`` and frozen layers: "skip" leaves those of the model in place when averages are swapped in,
        "average" averages them too. Integers and seeds are never touched.
    nonfinite : {"propagate", "skip"}
        "skip" leaves out an update where a variable holds an inf or nan, and counts it in `skipped`.
    swap : bool
        Whether the validations of `fit` see the averages.
    finalize : bool
        Write the averages into the model when `fit` has come to its end.
    callbacks : callback or sequence of callbacks
        Those that shall see the averages at the end of an epoch, such as ``ModelCheckpoint``. Their hooks of batches are not
        called.

    Attributes
    ----------
    names : list of str
        The paths of the variables that have an average.
    shadows : list of arrays
        The averages in the order of `names`, float64 for float64 variables and float32 for all others.
    step : int
        Batches so far.
    updates : int
        Those that moved the averages.
    skipped : int
        Those left out because of an inf or nan.

    Raises
    ------
    TypeError, ValueError
        An option of the wrong type, a number out of range, a ``ModelCheckpoint`` among `callbacks` that saves between epochs.

    Notes
    -----
    A second `fit` of the same model goes on with the averages; another model begins anew. One EMA of a model may swap.
    An exception or Ctrl-C within a validation of `fit` puts the weights back. ``evaluate(callbacks=[ema])`` of the user raises,
    since Keras tells no callback of an exception there: use `average_parameters`. ``fit`` with ``steps_per_execution=n`` is
    one update for n batches.
    With torch on the CPU the averages are moved from the model's own memory; with jax after the step is done, from its memory
    on a CPU and from a copy elsewhere. Memory: the averages, and a copy of the weights while they are swapped in (jax keeps the
    old ones).

    Examples
    --------
    >>> import keras, numpy as np
    >>> from fastops.keras import EMA
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    >>> model.compile(keras.optimizers.SGD(0.25), "mse")
    >>> ema = EMA(0.5)
    >>> x = np.ones((2, 1))
    >>> _ = model.fit(x, x, batch_size=1, shuffle=False, verbose=0, callbacks=[ema])
    >>> with ema.average_parameters():
    ...     model.get_weights()[0].item()
    0.625
    >>> model.get_weights()[0].item()
    0.75
    """

    def __init__(
        self,
        decay: float | str = 0.999,
        *,
        warmup: str = "none",
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_decay: float = 0.0,
        update_every: int = 1,
        update_after_step: int | None = None,
        buffers: str = "skip",
        nonfinite: str = "propagate",
        swap: bool = True,
        finalize: bool = False,
        callbacks: Any = (),
    ) -> None:
        super().__init__()
        ramp = (inv_gamma, power, min_decay)
        self._schedule = _schedules.single(decay, warmup, *ramp, update_every, update_after_step)
        self._averages_buffers = _validate.choice("buffers", buffers, ("skip", "average")) == "average"
        self._skips = _validate.choice("nonfinite", nonfinite, ("propagate", "skip")) == "skip"
        self._swaps = _validate.boolean("swap", swap)
        self._finalizes = _validate.boolean("finalize", finalize)
        self._callbacks: list[Any] = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
        for x in self._callbacks:
            if not isinstance(x, keras.callbacks.Callback):
                raise _validate.wrong_type("callbacks", "a list of Keras's callbacks", x)
            if isinstance(x, keras.callbacks.ModelCheckpoint) and x.save_freq != "epoch":
                raise _validate.wrong_value("save_freq of a ModelCheckpoint here", "'epoch'", x.save_freq)
        self._begin()

    def _begin(self) -> None:
        """No model seen, no averages."""
        self._progress = _schedules.Progress(0, 0, 0, 0, 0, (0.0,))
        self._variables: list[Any] = []
        self._shadows: list[AnyArray] = []
        self._averages = TensorList([])
        self._live: tuple[list[Any], TensorList] = ([], TensorList([]))
        self._held: list[Any] | None = None
        self._swapped_by_test = False
        self._positions: list[tuple[str, int]] = []

    @property
    def names(self) -> list[str]:
        """The paths of the variables that have an average."""
        return [v.path for v in self._variables]

    @property
    def shadows(self) -> list[Any]:
        """The averages, in the order of `names`."""
        return list(self._shadows)

    @property
    def step(self) -> int:
        """Batches so far."""
        return self._progress.step

    @property
    def updates(self) -> int:
        """Batches that moved the averages."""
        return self._progress.updates

    @property
    def skipped(self) -> int:
        """Batches left out because of an inf or nan."""
        return self._progress.skipped

    def decay_at(self, step: int) -> float:
        """The decay with which batch number `step` moves the averages.

        Parameters
        ----------
        step : int
            From 1.

        Returns
        -------
        float
            0 where the averages become copies, 1 where `update_every` leaves them as they are.

        Raises
        ------
        TypeError, ValueError
            `step` is no such number.
        """
        step = _validate.integer("step", step, 1)
        every, after = self._schedule.every, self._schedule.after
        if step % every:
            return 1.0
        return self._schedule.decay(0, step, step - every, step // every - after // every - 1)

    # --- the model --------------------------------------------------------------------------------------------------------------

    def set_model(self, model: Any) -> None:
        """Take the model whose weights are averaged; Keras calls it, and so do loops of one's own.

        Parameters
        ----------
        model : keras.Model
            Any, compiled or not. Another one than before begins anew.
        """
        if model is not self._model:
            if self._held is not None:
                self._swap_out()
            self._begin()
        super().set_model(model)
        for x in self._callbacks:
            x.set_model(model)

    def set_params(self, params: Any) -> None:
        """Take the parameters of `fit`; Keras calls it.

        Parameters
        ----------
        params : dict
            Numbers of epochs and steps.
        """
        super().set_params(params)
        for x in self._callbacks:
            x.set_params(params)

    def _bare(self) -> Any:
        """The model without torch's DistributedDataParallel around it, and without jax's walk that the property `model` makes."""
        return self._model if keras.backend.backend() == "jax" else self.model

    def _want_model(self, call: str) -> Any:
        """The model, with the values of its variables in place."""
        model = self.model
        if model is None or not model.built:
            raise _validate.wrong_moment(call, "called with a built model (fit, or set_model)", "none")
        return model

    def _follow(self) -> None:
        """Averages for what is trainable now; those that are there go on."""
        model = self._want_model("update")
        trainable = {id(v) for v in model.trainable_variables}
        kept = {id(v): s for v, s in zip(self._variables, self._shadows, strict=True)}
        self._variables = [v for v in model.weights if _is_float(v) and (id(v) in trainable or self._averages_buffers)]
        self._shadows = []
        for v in self._variables:
            shadow = kept.get(id(v))
            if shadow is None:
                value = _in_memory(v.path, v.value)
                wide = np.dtype(np.float64 if value.dtype == np.float64 else np.float32)
                shadow = _shadows.aligned(value, wide)
                shadow[...] = value
            self._shadows.append(shadow)
        self._averages = TensorList(self._shadows)
        # Where jax has the values during an epoch.
        found = {id(v): ("trainable_variables", i) for i, v in enumerate(model.trainable_variables)}
        found |= {id(v): ("non_trainable_variables", i) for i, v in enumerate(model.non_trainable_variables)}
        self._positions = [found[id(v)] for v in self._variables]

    def _values(self) -> list[Any]:
        """The weights of the moment, without a copy where they are in host memory."""
        name = keras.backend.backend()
        if name == "torch":
            values = [v.value for v in self._variables]
            if all(x.device.type == "cpu" for x in values):
                return values
        elif name == "jax":
            # Within an epoch the values are in the state of the loop. To put them into the variables, as the property `model` does,
            # would cost every batch a walk over all variables, the optimizer's among them.
            state = getattr(self._model, "_jax_state", None)
            if state and not getattr(self._model, "_jax_state_synced", True):
                return [np.asarray(state[kind][i]) for kind, i in self._positions]
        return [_in_memory(v.path, v.value) for v in self._variables]

    def update(self) -> bool:
        """Count a batch and move the averages towards the weights: what Keras's `fit` calls, and loops of one's own can.

        Returns
        -------
        bool
            Whether the averages moved: False between the batches of `update_every`, and where ``nonfinite="skip"`` found an
            inf or nan.

        Raises
        ------
        RuntimeError
            Averages are swapped in; there is no built model.
        """
        if self._held is not None:
            self._want_restored("update")
        if not self._variables:
            self._follow()
        old = self._progress
        step = old.step + 1
        if step % self._schedule.every:
            self._progress = old._replace(step=step)
            return False
        values = self._values()
        tensors: Any = values
        if keras.backend.backend() == "torch":
            if len(values) != len(self._live[0]) or any(x is not y for x, y in zip(values, self._live[0], strict=True)):
                self._live = values, TensorList(values)
            tensors = self._live[1]
        if self._skips and not _backend.all_finite(tensors):
            self._progress = old._replace(step=step, skipped=old.skipped + 1)
            return False
        decay = self._schedule.decay(0, step, old.last, old.averaged)
        averaged = old.averaged + (step > self._schedule.after)
        # Counted first: an interrupt that comes when the kernel is done must not leave an update uncounted.
        self._progress = _schedules.Progress(step, step, old.updates + 1, averaged, old.skipped, (0.0,))
        try:
            optim.ema_update_(self._averages, tensors, decay)
        except Exception:
            self._progress = old
            raise
        return True

    # --- in and out -------------------------------------------------------------------------------------------------------------

    def _want_restored(self, call: str) -> None:
        """The weights in the model are its own."""
        other = _SWAPPED.get(self._want_model(call))
        if other is not None:
            got = "those of this one" if other is self else "those of another EMA (give it swap=False)"
            raise _validate.wrong_moment(call, "called when no averages are swapped in", got)

    def _swap_in(self, call: str) -> None:
        self._want_restored(call)
        model = self._bare()
        if not self._variables:
            self._follow()
        # Kept first: whatever interrupts the writing, the weights can be put back.
        self._held = [_kept(v) for v in self._variables]
        _SWAPPED[model] = self
        interrupt = _assign(self._variables, self._shadows)
        if interrupt is not None:
            self._swap_out()
            raise interrupt

    def _swap_out(self) -> None:
        held, model = self._held, self._bare()
        if held is None:
            return
        try:
            # An evaluation that ended early leaves jax's values, the averages among them, in its loop: they must not come later.
            _ = self.model
        finally:
            interrupt = _assign(self._variables, held)
            self._held = None
            self._swapped_by_test = False
            _SWAPPED.pop(model, None)
        if interrupt is not None:
            raise interrupt

    @contextlib.contextmanager
    def average_parameters(self) -> Iterator[Any]:
        """Evaluate, predict or save with the averages as the model's weights: within ``with``, and with its own again afterwards.

        Yields
        ------
        keras.Model
            The model. When the context ends, also by an exception, its weights are what they were before.

        Raises
        ------
        RuntimeError
            Averages are swapped in already; there is no built model.
        """
        self._want_restored("average_parameters")
        try:
            self._swap_in("average_parameters")
            yield self._bare()
        finally:
            self._swap_out()

    def copy_to_(self) -> None:
        """Write the averages into the model for good.

        Raises
        ------
        RuntimeError
            Averages are swapped in; there is no built model.
        """
        self._want_restored("copy_to_")
        interrupt = _assign(self._variables, self._shadows)
        if interrupt is not None:
            raise interrupt

    # --- the state --------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as a flat dict of numbers and arrays.

        Returns
        -------
        dict
            "step", "last", "updates", "averaged", "skipped", and a copy of each average as "shadow.<i>" in the order of `names`.
            ``numpy.savez(file, **state)`` writes it without pickle.
        """
        state = self._progress._asdict()
        del state["totals"]
        return state | {f"shadow.{i}": s.copy() for i, s in enumerate(self._shadows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state that `state_dict` gave, for a model of the same form (`set_model` first).

        Parameters
        ----------
        state : mapping
            The dict, or what ``numpy.load`` makes of it.

        Raises
        ------
        TypeError, ValueError
            A key that is missing or unknown, an array of another shape or dtype, a number out of range. Nothing was changed.
        RuntimeError
            Averages are swapped in; there is no built model.
        """
        self._want_restored("load_state_dict")
        if not self._variables:
            self._follow()
        counts = ("step", "last", "updates", "averaged", "skipped")
        keys = [f"shadow.{i}" for i in range(len(self._shadows))]
        odd = sorted({*counts, *keys} ^ set(state))
        if odd:
            text = f"a mapping with{'out' if odd[0] in state else ''} the key {_validate.clip(str(odd[0]), 40)!r}"
            raise _validate.wrong_value("state", text, Text(f"one of {len(state)} keys"))
        step = _validate.integer("state['step']", _plain(state["step"]), 0)
        numbers = [_validate.integer(f"state[{key!r}]", _plain(state[key]), 0, step) for key in counts[1:]]
        arrays = [
            _shadows.read(f"state[{key!r}]", state[key], shadow)
            for key, shadow in zip(keys, self._shadows, strict=True)
        ]
        for shadow, array in zip(self._shadows, arrays, strict=True):
            shadow[...] = array
        last, updates, averaged, skipped = numbers
        self._progress = _schedules.Progress(step, last, updates, averaged, skipped, (0.0,))

    # --- what Keras calls -------------------------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Keras calls it.

        Parameters
        ----------
        logs : dict, optional
            Numbers of the moment.

        Raises
        ------
        RuntimeError
            Averages are swapped in, of this EMA or another.
        """
        if self._swapped_by_test:
            self._swap_out()
        self._want_restored("fit")
        self._follow()
        model = self._bare()
        if self._swaps and "evaluate" not in vars(model):
            vars(model)["evaluate"] = _Guard(model)
        for x in self._callbacks:
            x.on_train_begin(logs)

    def on_train_end(self, logs: Any = None) -> None:
        """Keras calls it.

        Parameters
        ----------
        logs : dict, optional
            Numbers of the moment.
        """
        self._swap_out()
        _Guard.remove(self._bare())
        if self._finalizes:
            self.copy_to_()
        # Last, so that an EarlyStopping has the last word about the weights.
        for x in self._callbacks:
            x.on_train_end(logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Keras calls it; it updates.

        Parameters
        ----------
        batch : int
            Its number within the epoch.
        logs : dict, optional
            Numbers of the moment.
        """
        self.update()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Keras calls it.

        Parameters
        ----------
        epoch : int
            Its number.
        logs : dict, optional
            Numbers of the moment.
        """
        self._swap_out()
        for x in self._callbacks:
            x.on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Keras calls it; the callbacks given to this one see the averages.

        Parameters
        ----------
        epoch : int
            Its number.
        logs : dict, optional
            Numbers of the moment.
        """
        if self._callbacks:
            with self.average_parameters():
                for x in self._callbacks:
                    x.on_epoch_end(epoch, logs)

    def on_test_begin(self, logs: Any = None) -> None:
        """Keras calls it; within `fit` the averages are swapped in.

        Parameters
        ----------
        logs : dict, optional
            Numbers of the moment.

        Raises
        ------
        RuntimeError
            An evaluation outside `fit` and `average_parameters`; another EMA has swapped its averages in.
        """
        if self._swaps and self._held is None:
            if not _Guard.validates(self._bare()):
                self._refuse("evaluate")
            self._swap_in("a validation with swap=True")
            self._swapped_by_test = True
        for x in self._callbacks:
            x.on_test_begin(logs)

    def on_test_end(self, logs: Any = None) -> None:
        """Keras calls it; the weights are put back.

        Parameters
        ----------
        logs : dict, optional
            Numbers of the moment.
        """
        for x in self._callbacks:
            x.on_test_end(logs)
        if self._swapped_by_test:
            self._swap_out()

    def on_predict_begin(self, logs: Any = None) -> None:
        """Keras calls it.

        Parameters
        ----------
        logs : dict, optional
            Numbers of the moment.

        Raises
        ------
        RuntimeError
            A prediction outside `average_parameters`.
        """
        if self._swaps and self._held is None:
            self._refuse("predict")

    def _refuse(self, call: str) -> None:
        wanted = f"left to with ema.average_parameters(): model.{call}(...)"
        raise _validate.wrong_moment(f"averages in {call}", wanted, f"an EMA among the callbacks of {call}")


def _plain(value: Any) -> Any:
    """A number of a file of arrays."""
    return value.item() if isinstance(value, np.ndarray) and not value.ndim else value


def _in_memory(name: str, x: Any) -> AnyArray:
    """The values of a tensor: its own memory where NumPy can see it."""
    backend = keras.backend.backend()
    if backend == "jax":
        return np.asarray(x)
    if backend == "torch" and x.device.type == "cpu":
        return _tensors.as_ndarray(name, x)
    return np.asarray(keras.ops.convert_to_numpy(x))


def _kept(variable: Any) -> Any:
    """The value of a variable, which no later assignment changes."""
    x = variable.value
    name = keras.backend.backend()
    if name == "torch":
        return x.detach().clone()
    # jax's arrays never change, and one that has left its variable is given to no step.
    return x if name == "jax" else keras.ops.convert_to_numpy(x)


def _assign(variables: Sequence[Any], values: Sequence[Any]) -> KeyboardInterrupt | None:
    """Assign to all; an interrupt that came meanwhile, to be raised when the caller is done."""
    interrupt: KeyboardInterrupt | None = None
    copies = keras.backend.backend() != "torch"
    i = 0
    while i < len(variables):
        try:
            x = values[i]
            # jax may take over an array's memory, and these change in place.
            variables[i].assign(x.copy() if copies and isinstance(x, np.ndarray) else x)
            i += 1
        except KeyboardInterrupt as error:
            interrupt = error
    return interrupt
