# SPDX-License-Identifier: BSD-3-Clause
"""Moving averages of a model's parameters along training: `EMA`, its schedules, and averages made up afterwards."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _schedules, _shadows, _tensors, _validate
from ._backend import backend as _backend
from ._shadows import Params
from ._tensors import Role, TensorList
from ._validate import AnyArray, Text

__all__ = ["EMA", "posthoc_ema_weights"]


class _Alone:
    """A context for one call at a time. A call that a fork interrupts does not go on in the child."""

    __slots__ = ("_lock", "_process")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()

    def __enter__(self) -> None:
        if self._process != os.getpid():
            self.__init__()  # type: ignore[misc]
        if not self._lock.acquire(blocking=False):
            raise _validate.busy("an EMA")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class EMA:
    """Moving averages of parameters, of one or several decays, moved in one pass over the memory.

    Parameters
    ----------
    params : iterable of arrays, or mapping of names to arrays
        What to follow: NumPy arrays, torch CPU tensors, objects with the buffer protocol or DLPack. The arrays themselves are
        kept, so they must be changed in place (as optimizers do); where they are replaced, give `update` the new ones.
        float16, bfloat16, float32 and float64 arrays are averaged; integer and bool arrays are buffers.
    decay : float in [0, 1], "equal", or a sequence of these
        The shadow moves by s += (1 - decay) (p - s). "equal" is the plain mean of the parameters at all updates (SWA). A
        sequence keeps an average ("profile") for each of its decays. Not used with ``warmup="power"``.
    warmup : {"none", "timm", "tf", "power"}
        With t = max(0, step - update_after_step - 1): "timm" is 1 - (1 + t / inv_gamma)^-power, "tf" is (1 + t) / (10 + t),
        both 0 at t = 0 and otherwise within [min_decay, decay]. "power" gives the average a width relative to the length of
        training: (1 - dt / t')^(gamma + 1) with t' = t + 1 and dt the steps since the update before.
    inv_gamma : float
        Of "timm", > 0.
    power : float
        Of "timm", > 0. 2/3 suits a million steps and more (0.999 is reached at 31 600), 3/4 shorter training (at 10 000).
    sigma : float in (0, 12^-1/2], or a sequence of these, optional
        Relative width of "power", one per profile; 0.05 and 0.1 in the paper.
    update_every : int
        Only every so many calls of `update` move the shadows.
    update_after_step : int
        Up to this call the shadows are copies of the parameters.
    min_decay : float
        In [0, decay], of "timm" and "tf".
    debias : bool
        Start the shadows at 0 and divide by the sum of the weights when they are read, so that the average holds nothing of
        the initial parameters. False starts them as copies of the parameters.
    buffers : {"copy", "average", "skip"}
        What becomes of integer and bool arrays: the shadow is a copy made at each update; an average in float64, rounded to
        nearest (half to even) when it is read; or they are left out.
    nonfinite : {"propagate", "skip"}
        "skip" leaves out an update where a parameter holds an inf or nan, and counts it in `skipped`; one more pass over the
        parameters. Otherwise an inf or nan stays in the shadow for ever.
    shadow_dtype : {"float32", "float64", "bfloat16"}, optional
        Of all shadows of floating-point arrays. By default float64 for float64 and float32 for the others. bfloat16 rounds
        stochastically, without which small updates were lost.
    seed : int
        In [0, 2**64), of the stochastic rounding.

    Attributes
    ----------
    names : list of str
        Of the arrays that have a shadow: the keys of a mapping, else the positions.
    shadows : list of arrays
        The averages (before debiasing) in the order of `names`: NumPy arrays on cache lines, ours, in the memory order of
        their parameters. A list of such lists where `decay` or `sigma` is a sequence.
    step : int
        Calls of `update` so far.
    updates : int
        Those that moved the shadows.
    skipped : int
        Those left out because of an inf or nan.

    Raises
    ------
    TypeError
        An array of another dtype or not in host memory, an option of the wrong type.
    ValueError
        A decay outside [0, 1] or nan, options that exclude each other, an unknown name.

    Notes
    -----
    Every method is all or nothing: what it raises, it raises before it writes. Ctrl-C is heard when the writing is done.
    One thread at a time; a call during another raises RuntimeError. Pickles, the parameters included: in one pickle with the
    model it follows that model's copy, alone it follows copies of its own (as after ``copy.deepcopy``).
    Memory: a shadow per profile; a copy of the parameters while averages are swapped in.

    Karras et al., "Analyzing and improving the training dynamics of diffusion models", CVPR 2024 (arXiv 2312.02696), for
    "power"; Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018, for "equal".

    Examples
    --------
    >>> import numpy as np
    >>> import fastops
    >>> weights = {"w": np.zeros(2, np.float32), "b": np.zeros((), np.float32)}
    >>> ema = fastops.EMA(weights, decay=0.75)
    >>> weights["w"] += 1.0
    >>> ema.update()
    True
    >>> with ema.average_parameters():
    ...     print(weights["w"])
    [0.25 0.25]
    >>> weights["w"]
    array([1., 1.], dtype=float32)
    """

    def __init__(
        self,
        params: Params,
        decay: float | str | Sequence[float | str] = 0.999,
        *,
        warmup: str = "none",
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        sigma: float | Sequence[float] | None = None,
        update_every: int = 1,
        update_after_step: int = 0,
        min_decay: float = 0.0,
        debias: bool = False,
        buffers: str = "copy",
        nonfinite: str = "propagate",
        shadow_dtype: Any = None,
        seed: int = 0,
    ) -> None:
        warmup = _validate.choice("warmup", warmup, _schedules.WARMUPS)
        decays, gammas, several = _schedules.profiles(decay, warmup, sigma)
        ramp = (inv_gamma, power, min_decay)
        self._schedule = _schedules.schedule(warmup, decays, gammas, *ramp, update_every, update_after_step)
        self._several = several
        self._debias = _validate.boolean("debias", debias)
        self._skips = _validate.choice("nonfinite", nonfinite, ("propagate", "skip")) == "skip"
        self._seed = _validate.integer("seed", seed, 0, 2**64 - 1)
        buffers = _validate.choice("buffers", buffers, ("copy", "average", "skip"))
        asked = _shadows.chosen_dtype(shadow_dtype)
        self._named = isinstance(params, Mapping)
        self._entries, self._sources = _shadows.entries(params, buffers)
        first = []
        for entry, array in zip(self._entries, self._arrays(self._sources), strict=True):
            if entry.kind == "skip":
                continue
            shadow = _shadows.aligned(array, _shadows.dtype_of(entry, asked))
            if self._debias and entry.kind != "copy":
                shadow[...] = 0
            else:
                with np.errstate(all="ignore"):
                    shadow[...] = array
            first.append(shadow)
        self._shadows = [first, *([_shadows.copy(shadow, shadow) for shadow in first] for _ in decays[1:])]
        self._progress = _schedules.Progress(0, 0, 0, 0, 0, (0.0,) * len(decays))
        self._held: tuple[int, list[AnyArray]] | None = None
        self._make_plans()
        if self._skips and not self._debias and not _backend.all_finite(self._live):
            raise _validate.wrong_value(
                "params", "finite where nonfinite='skip' and debias=False", Text("arrays with an inf or nan")
            )

    def _make_plans(self) -> None:
        """What follows from the other fields and does not pickle."""
        self._kept = [i for i, entry in enumerate(self._entries) if entry.kind != "skip"]
        self._buffers = [i for i in self._kept if self._entries[i].kind != "float"]
        # Positions among the shadows; apart, so that an update of thousands of tensors loops over none of them.
        self._moving = [j for j, i in enumerate(self._kept) if self._entries[i].kind != "copy"]
        self._copied = [(j, i) for j, i in enumerate(self._kept) if self._entries[i].kind == "copy"]
        # The kernel reads floating-point arrays alone, so integers that are averaged pass through these.
        self._staged = {i: np.zeros(self._entries[i].shape) for i in self._kept if self._entries[i].kind == "average"}
        self._live = TensorList(self._moving_of(self._sources))
        self._sets = tuple(TensorList([shadows[j] for j in self._moving]) for shadows in self._shadows)
        narrow = any(shadow.dtype.itemsize == 2 for shadow in self._sets[0] if shadow.dtype.kind not in "iub")
        self._rounds_randomly = narrow
        self._alone = _Alone()

    def __getstate__(self) -> dict[str, Any]:
        with self._alone:
            made = (
                "_kept",
                "_buffers",
                "_moving",
                "_copied",
                "_staged",
                "_live",
                "_sets",
                "_rounds_randomly",
                "_alone",
            )
            return {key: value for key, value in vars(self).items() if key not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # Pickles keep neither cache lines nor the order of axes, and a shallow copy must not share the shadows.
        arrays = self._arrays(self._sources)
        likes = [array for entry, array in zip(self._entries, arrays, strict=True) if entry.kind != "skip"]
        self._shadows = [
            [_shadows.copy(s, like) for s, like in zip(shadows, likes, strict=True)] for shadows in self._shadows
        ]
        self._make_plans()

    def __repr__(self) -> str:
        schedule = self._schedule
        if schedule.warmup == "power":
            what = "gamma=" + ", ".join(f"{gamma:.6g}" for gamma in schedule.gammas)
        else:
            what = "decay=" + ", ".join("equal" if d is None else f"{d:g}" for d in schedule.decays)
        return f"<fastops.EMA of {len(self._kept)} arrays, {what}, warmup={schedule.warmup!r}, step {self.step}>"

    @property
    def names(self) -> list[str]:
        """Names of the arrays that have a shadow."""
        return [self._entries[i].name for i in self._kept]

    @property
    def shadows(self) -> list[Any]:
        """The averages before debiasing, in the order of `names`; a list of lists for several profiles."""
        return [list(shadows) for shadows in self._shadows] if self._several else list(self._shadows[0])

    @property
    def step(self) -> int:
        """Calls of `update` so far."""
        return self._progress.step

    @property
    def updates(self) -> int:
        """Calls of `update` that moved the shadows."""
        return self._progress.updates

    @property
    def skipped(self) -> int:
        """Updates left out because of an inf or nan."""
        return self._progress.skipped

    def decay_at(self, step: int, profile: int = 0) -> float:
        """The decay with which call number `step` of `update` moves a shadow.

        Parameters
        ----------
        step : int
            From 1.
        profile : int
            Which decay, where there are several.

        Returns
        -------
        float
            0 where the shadow becomes a copy, 1 where `update_every` leaves it as it is. Of the schedule as it is planned: a
            skipped update changes later decays of "power" and "equal".

        Raises
        ------
        TypeError, ValueError
            `step` or `profile` is no integer in range.

        Examples
        --------
        >>> import fastops
        >>> round(fastops.EMA([], 0.9999, warmup="timm").decay_at(31601), 6)
        0.999
        """
        step = _validate.integer("step", step, 1)
        profile = self._profile(profile)
        every, after = self._schedule.every, self._schedule.after
        if step % every:
            return 1.0
        return self._schedule.decay(profile, step, step - every, step // every - after // every - 1)

    def update(self, params: Params | None = None) -> bool:
        """Count a step, and move the shadows towards the parameters where the schedule says so.

        Parameters
        ----------
        params : iterable or mapping, optional
            Other arrays to read this time, of the same names or number and shapes: where a library replaces its parameters
            instead of changing them (jax), or another process has them.

        Returns
        -------
        bool
            Whether the shadows moved: False between the steps of `update_every`, and where ``nonfinite="skip"`` found an inf
            or nan.

        Raises
        ------
        TypeError, ValueError
            An array that changed its shape or dtype since. Nothing was written, and the step is not counted.
        RuntimeError
            Averages are swapped in, or another thread is using this EMA.

        Notes
        -----
        One pass for all profiles: 12 bytes of traffic an element for one in float32, 20 for two, 28 for three.

        Examples
        --------
        >>> import numpy as np
        >>> import fastops
        >>> p = np.zeros(1)
        >>> ema = fastops.EMA([p], decay=(0.5, 0.9))
        >>> p[0] = 1.0
        >>> ema.update(), [float(shadow[0].item()) for shadow in ema.shadows]
        (True, [0.5, 0.09999999999999998])
        """
        with self._alone:
            self._want_restored("update")
            sources = self._sources if params is None else self._given(params)
            before = self._progress
            step = before.step + 1
            if step % self._schedule.every:
                self._progress = before._replace(step=step)
                return False
            try:
                return self._move(step, sources, self._live if params is None else None)
            except (TypeError, ValueError):
                self._progress = before
                # The backend knows positions among the arrays that move; users know their own.
                for entry, array in zip(self._entries, self._arrays(sources), strict=True):
                    if entry.kind != "skip":
                        entry.check(entry.label, array)
                raise
            except Exception:
                self._progress = before
                raise

    def _move(self, step: int, sources: list[Any], live: TensorList | None) -> bool:
        buffers = {}
        for i in self._buffers:
            entry = self._entries[i]
            buffers[i] = _tensors.as_ndarray(entry.label, sources[i])
            entry.check(entry.label, buffers[i])
        for i, staged in self._staged.items():
            staged[...] = buffers[i]
        tensors: Sequence[Any] = self._moving_of(sources) if live is None else live
        if self._skips and not _backend.all_finite(tensors):
            self._progress = self._progress._replace(step=step, skipped=self._progress.skipped + 1)
            return False
        # Counted first: an interrupt that comes when the kernel is done must not leave an update uncounted.
        weights = tuple(1.0 - decay for decay in self._count(step))
        # Fibonacci's multiplier, so that the streams of neighbouring seeds do not meet after a few steps.
        seed = (self._seed * 0x9E3779B97F4A7C15 + step) % 2**64 if self._rounds_randomly else None
        _backend.ema_update(self._sets, tensors, weights, seed)
        for j, i in self._copied:
            for shadows in self._shadows:
                shadows[j][...] = buffers[i]
        return True

    def _count(self, step: int) -> list[float]:
        """The decays of an update at `step`, which then counts."""
        old = self._progress
        decays = [self._schedule.decay(k, step, old.last, old.averaged) for k in range(len(self._shadows))]
        totals = tuple(total + (1.0 - total) * (1.0 - d) for total, d in zip(old.totals, decays, strict=True))
        averaged = old.averaged + (step > self._schedule.after)
        self._progress = _schedules.Progress(step, step, old.updates + 1, averaged, old.skipped, totals)
        return decays

    def advance(self) -> float:
        """Count a step whose update is made elsewhere from `shadows`, and give the decay for it.

        An optimizer step takes the EMA itself (``ema=ema``), and counts only when it has succeeded.

        Returns
        -------
        float
            1, which changes nothing, between the steps of `update_every`.

        Raises
        ------
        ValueError
            Several profiles, integer arrays with a shadow, or ``nonfinite="skip"``: a fused step does none of these.
        RuntimeError
            Averages are swapped in, or another thread is using this EMA.

        Examples
        --------
        >>> import numpy as np
        >>> import fastops
        >>> p, g, m = [np.ones(2)], [np.full(2, 0.5)], [np.zeros(2)]
        >>> ema = fastops.EMA(p, decay=0.5)
        >>> fastops.sgd_step_(p, g, m, lr=1.0, momentum=0.9)
        >>> fastops.ema_update_(ema.shadows, p, ema.advance())
        >>> p[0], ema.shadows[0]
        (array([0.5, 0.5]), array([0.75, 0.75]))
        """
        with self._alone:
            return self._advance("advance")

    def _advance(self, call: str) -> float:
        self._want_restored(call)
        if self._several:
            raise _validate.wrong_value(
                "ema", f"of one profile for {call} (else call update after the step)", Text("several")
            )
        if self._skips:
            raise _validate.wrong_value(
                "nonfinite", f"'propagate' for {call} (else call update after the step)", "skip"
            )
        if self._buffers:
            kind = self._entries[self._buffers[0]].kind
            raise _validate.wrong_value("buffers", f"'skip' for {call} (else call update after the step)", kind)
        step = self._progress.step + 1
        if step % self._schedule.every:
            self._progress = self._progress._replace(step=step)
            return 1.0
        return self._count(step)[0]

    @contextlib.contextmanager
    def _fused(self) -> Iterator[tuple[Any, float]]:
        """The shadows and their decay for an optimizer step, which counts where it comes to its end."""
        with self._alone:
            before = self._progress
            try:
                yield self._sets[0], self._advance("a fused step")
            except BaseException:
                self._progress = before
                raise

    @contextlib.contextmanager
    def average_parameters(self, profile: int = 0) -> Iterator[None]:
        """A context in which the parameters hold the averages.

        Parameters
        ----------
        profile : int
            Which average, where there are several.

        Yields
        ------
        None
            When the context ends, also by an exception, the parameters are what they were before.

        Raises
        ------
        TypeError, ValueError
            As `swap_`.
        RuntimeError
            Averages are swapped in already, or another thread is using this EMA.

        Examples
        --------
        >>> import numpy as np
        >>> import fastops
        >>> p = np.zeros(1)
        >>> ema = fastops.EMA([p], decay=0.75)
        >>> p += 1.0
        >>> _ = ema.update()
        >>> with ema.average_parameters():
        ...     print(p)
        [0.25]
        """
        self._want_restored("average_parameters")
        try:
            self.swap_(profile)
            yield
        finally:
            held = self._held
            if held is not None:
                self.swap_(held[0])

    def swap_(self, profile: int = 0) -> None:
        """Put the averages into the parameters; the next call puts the parameters back as they were.

        Parameters
        ----------
        profile : int
            Which average, where there are several; the same in both calls.

        Raises
        ------
        TypeError, ValueError
            A parameter that is read-only, overlaps another or changed its shape; a profile that there is not. Nothing was
            written.
        RuntimeError
            Another thread is using this EMA.

        Notes
        -----
        Changes that are made to the parameters between the two calls are lost. `update` refuses to work there, `state_dict`
        gives what it gives outside. Before the first update the averages are the parameters.

        Examples
        --------
        >>> import numpy as np
        >>> import fastops
        >>> p = np.zeros(1)
        >>> ema = fastops.EMA([p], decay=0.75)
        >>> p += 1.0
        >>> _ = ema.update()
        >>> ema.swap_(); print(p)
        [0.25]
        >>> ema.swap_(); print(p)
        [1.]
        """
        with self._alone:
            profile = self._profile(profile)
            targets = self._targets(self._sources)
            if self._held is None:
                values = self._averages(profile, targets)
                # Kept first: whatever interrupts the writing, a second call puts the parameters back.
                self._held = profile, [np.array(target, order="K", subok=False) for target in targets]
                interrupt = _shadows.write(targets, values)
            else:
                held, backup = self._held
                if profile != held:
                    raise _validate.wrong_value("profile", f"{held}, which is swapped in", profile)
                interrupt = _shadows.write(targets, [(array, 1.0) for array in backup])
                self._held = None
            self._tell(self._sources)
        if interrupt is not None:
            raise interrupt

    def copy_to_(self, params: Params | None = None, profile: int = 0) -> None:
        """Write the averages into arrays.

        Parameters
        ----------
        params : iterable or mapping, optional
            Arrays of the same names or number and shapes, of any floating-point dtype (buffers: of their own). By default the
            parameters that are followed, whose values are then lost.
        profile : int
            Which average, where there are several.

        Raises
        ------
        TypeError, ValueError
            Arrays that do not fit, are read-only or overlap; a profile that there is not. Nothing was written.
        RuntimeError
            Averages are swapped in, or another thread is using this EMA.

        Examples
        --------
        >>> import numpy as np
        >>> import fastops
        >>> p, out = np.zeros(1), np.empty(1, np.float16)
        >>> ema = fastops.EMA([p], decay=0.75)
        >>> p += 1.0
        >>> _ = ema.update()
        >>> ema.copy_to_([out])
        >>> out
        array([0.25], dtype=float16)
        """
        with self._alone:
            profile = self._profile(profile)
            self._want_restored("copy_to_")
            sources = self._sources if params is None else self._given(params)
            targets = self._targets(sources)
            current = self._arrays(self._sources) if self._unread(profile) else []
            values = self._averages(profile, [current[i] for i in self._kept] if current else targets)
            interrupt = _shadows.write(targets, values)
            self._tell(sources)
        if interrupt is not None:
            raise interrupt

    def state_dict(self) -> dict[str, Any]:
        """The state as a flat dict of numbers and arrays.

        Returns
        -------
        dict
            "step", "last", "updates", "averaged", "skipped", "debias" (numbers), "totals" (the debiasing sums) and a copy of each
            shadow as "shadow.<profile>.<name>"; bfloat16 as uint16. ``numpy.savez(file, **state)`` writes it without pickle.

        Raises
        ------
        RuntimeError
            Another thread is using this EMA.

        Examples
        --------
        >>> import io
        >>> import numpy as np
        >>> import fastops
        >>> ema = fastops.EMA({"w": np.ones(2)})
        >>> file = io.BytesIO()
        >>> np.savez(file, **ema.state_dict())
        >>> _ = file.seek(0)
        >>> ema.load_state_dict(np.load(file, allow_pickle=False))
        >>> sorted(ema.state_dict())[3:]
        ['shadow.0.w', 'skipped', 'step', 'totals', 'updates']
        """
        with self._alone:
            state: dict[str, Any] = self._progress._asdict()
            state["totals"] = np.array(self._progress.totals)
            state["debias"] = int(self._debias)
            for key, shadow in self._keyed():
                state[key] = np.array(_shadows.portable(shadow), order="K")
            return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state that `state_dict` gave.

        Parameters
        ----------
        state : mapping
            The dict, or what ``numpy.load`` makes of it. bfloat16 shadows may be bfloat16, uint16 or void of 2 bytes.

        Raises
        ------
        TypeError, ValueError
            A key that is missing or unknown, an array of another shape or dtype than the shadow here (which keeps its own), a
            number out of range. Nothing was changed.
        RuntimeError
            Averages are swapped in, or another thread is using this EMA.

        Notes
        -----
        Decays and schedules are no part of the state: those of this EMA go on from the step that was loaded.

        Examples
        --------
        >>> import numpy as np
        >>> import fastops
        >>> first, second = (fastops.EMA([np.full(2, value)]) for value in (1.0, 2.0))
        >>> second.load_state_dict(first.state_dict())
        >>> second.shadows[0]
        array([1., 1.])
        """
        with self._alone:
            self._want_restored("load_state_dict")
            if not isinstance(state, Mapping):
                raise _validate.wrong_type("state", "a mapping of names to arrays and numbers", state)
            keyed = list(self._keyed())
            wanted = {*_schedules.Progress._fields, "debias", *(key for key, _ in keyed)}
            for found, other, text in ((set(state), wanted, "with"), (wanted, set(state), "without")):
                odd = sorted(map(str, other - found))
                if odd:
                    raise _validate.wrong_value(
                        "state",
                        f"a mapping {text} the key {_validate.clip(odd[0])!r}",
                        Text(f"one of {len(state)} keys"),
                    )
            progress = self._read_progress(state)
            arrays = [_shadows.read(f"state[{_validate.clip(key, 40)!r}]", state[key], shadow) for key, shadow in keyed]
            interrupt = _shadows.write([shadow for _, shadow in keyed], [(array, 1.0) for array in arrays])
            self._progress = progress
        if interrupt is not None:
            raise interrupt

    def _read_progress(self, state: Mapping[str, Any]) -> _schedules.Progress:
        debias = _validate.integer("state['debias']", state["debias"], 0, 1)
        if debias != self._debias:
            raise _validate.wrong_value("state['debias']", f"{int(self._debias)}, as this EMA has it", debias)
        step = _validate.integer("state['step']", state["step"], 0)
        last, updates, averaged, skipped = (
            _validate.integer(f"state[{key!r}]", state[key], 0, step)
            for key in ("last", "updates", "averaged", "skipped")
        )
        name = "state['totals']"
        totals = _tensors.as_ndarray(name, state["totals"])
        if totals.dtype != np.float64:
            raise _validate.wrong_type(name, "a float64 array", totals)
        if totals.shape != (len(self._shadows),):
            raise _validate.wrong_value(name, f"of shape {(len(self._shadows),)}", totals)
        if not ((totals >= 0) & (totals <= 1)).all():
            raise _validate.wrong_value(name, "of numbers in [0, 1]", Text("an array with others"))
        return _schedules.Progress(step, last, updates, averaged, skipped, tuple(totals.tolist()))

    def _keyed(self) -> Iterator[tuple[str, AnyArray]]:
        """Every shadow with its key in the state."""
        names = self.names
        for k, shadows in enumerate(self._shadows):
            for name, shadow in zip(names, shadows, strict=True):
                yield f"shadow.{k}.{name}", shadow

    def _want_restored(self, method: str) -> None:
        if self._held is not None:
            raise _validate.wrong_moment(
                f"{method} of an EMA", "called when the parameters are back (swap_)", "swapped in"
            )

    def _profile(self, profile: object) -> int:
        return _validate.integer("profile", profile, 0, len(self._shadows) - 1)

    def _given(self, params: Params) -> list[Any]:
        """The arrays of another argument `params` in the order of ours."""
        if isinstance(params, Mapping) != self._named:
            wanted = "a mapping of names to arrays" if self._named else "a list of arrays"
            raise _validate.wrong_type("params", f"{wanted}, as the EMA was made with", params)
        if not isinstance(params, Mapping):
            arrays = _tensors.as_list("params", params)
            if len(arrays) != len(self._entries):
                raise _validate.wrong_value("params", f"a list of {len(self._entries)} arrays", Text(str(len(arrays))))
            return arrays
        names = {entry.name for entry in self._entries}
        if set(params) != names:
            odd = min(map(str, names ^ set(params)))
            text = f"a mapping with{'out' if odd not in names else ''} the key {_validate.clip(odd, 40)!r}"
            raise _validate.wrong_value("params", text, Text(f"one of {len(params)} keys"))
        return [params[entry.name] for entry in self._entries]

    def _arrays(self, sources: list[Any]) -> list[AnyArray]:
        return [_tensors.as_ndarray(entry.label, source) for entry, source in zip(self._entries, sources, strict=True)]

    def _moving_of(self, sources: list[Any]) -> list[Any]:
        """What the kernel reads for the shadows that move."""
        return [self._staged.get(i, sources[i]) for i in (self._kept[j] for j in self._moving)]

    def _targets(self, sources: list[Any]) -> list[AnyArray]:
        """The arrays to write averages into, checked."""
        targets = []
        seen = set()
        distinct: list[list[AnyArray]] = [[], []]
        nothing = np.empty(0)
        kept = iter(range(len(self._kept)))
        for entry, array in zip(self._entries, self._arrays(sources), strict=True):
            if entry.kind == "skip":
                for items in distinct:
                    items.append(nothing)
                continue
            entry.check(entry.label, array)
            _validate.writable(entry.label, array)
            targets.append(array)
            j = next(kept)
            # Tied weights: the same array under two names gets the same average twice.
            place = (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype)
            distinct[0].append(nothing if place in seen else array)
            distinct[1].append(self._shadows[0][j])
            seen.add(place)
        _tensors.refuse_overlap([Role("params", True), Role("shadows", False)], distinct)
        return targets

    def _unread(self, profile: int) -> bool:
        """Whether the shadow holds nothing yet."""
        return self._debias and self._progress.totals[profile] == 0.0

    def _averages(self, profile: int, current: list[AnyArray]) -> list[tuple[AnyArray, float]]:
        """What to write for every kept array, and what to divide it by; `current` where there is no average yet."""
        if self._unread(profile):
            return [(array, 1.0) for array in current]
        total = self._progress.totals[profile] if self._debias else 1.0
        values: list[tuple[AnyArray, float]] = []
        for i, shadow in zip(self._kept, self._shadows[profile], strict=True):
            entry = self._entries[i]
            if entry.kind == "average":
                values.append((_shadows.to_integers(shadow / total, entry.dtype), 1.0))
            else:
                values.append((shadow, total if entry.kind == "float" else 1.0))
        return values

    def _tell(self, sources: list[Any]) -> None:
        _tensors.bump_versions([[sources[i] for i in self._kept]])


def posthoc_ema_weights(
    t: ArrayLike, sigma: ArrayLike, t_out: ArrayLike, sigma_out: ArrayLike, *, normalize: bool = True
) -> NDArray[np.float64]:
    """Give the weights that turn stored power-function averages into one of any width.

    Parameters
    ----------
    t : (N,) array
        Steps at which shadows of ``EMA(..., warmup="power")`` were stored, counted from `update_after_step`; > 0.
    sigma : (N,) array or float
        Their relative widths, in (0, 12^-1/2].
    t_out : float or (M,) array
        Step of the average that is wanted, > 0; at most the last of `t` makes sense.
    sigma_out : float or (M,) array
        Its relative width, in (0, 12^-1/2].
    normalize : bool
        Scale the weights to a sum of 1, so that parameters that never change are their own average. False leaves them as the
        least-squares fit gives them.

    Returns
    -------
    (N,) or (N, M) float64 array
        The average is the sum of weight times shadow.

    Raises
    ------
    TypeError
        Arrays that are not of numbers.
    ValueError
        Shapes that do not fit, numbers out of range, the same pair (t, sigma) twice, pairs so near each other that float64
        cannot tell them apart.

    Notes
    -----
    Solves A x = b, the least-squares fit of power functions: <p_a, p_b> = (g_a + 1) (g_b + 1) (t_a / t_b)^e / ((g_a + g_b + 1)
    max(t_a, t_b)), e = g_b where t_a < t_b, else -g_a. N^3 flops. Karras et al., arXiv 2312.02696, appendix C.

    Examples
    --------
    >>> import fastops
    >>> fastops.posthoc_ema_weights([5, 10, 5, 10], [0.05, 0.05, 0.1, 0.1], 10, 0.075, normalize=False).round(6)
    array([ 1.40000e-04,  3.54483e-01, -2.50800e-03,  6.81456e-01])
    """
    times, widths = _positive("t", t), _positive("sigma", sigma, _schedules.WIDEST)
    out_times, out_widths = _positive("t_out", t_out), _positive("sigma_out", sigma_out, _schedules.WIDEST)
    normalize = _validate.boolean("normalize", normalize)
    if times.ndim != 1 or not times.size:
        raise _validate.wrong_value("t", "of shape (N,), N >= 1", times)
    for name, item, shape in (("sigma", widths, times.shape), ("sigma_out", out_widths, out_times.shape)):
        if item.ndim > 1 or (item.ndim == 1 and shape not in ((), item.shape)):
            raise _validate.wrong_value(name, f"a number or of shape {shape}", item)
    if out_times.ndim > 1:
        raise _validate.wrong_value("t_out", "a number or of shape (M,)", out_times)
    scalar = out_times.ndim == out_widths.ndim == 0
    widths = np.broadcast_to(widths, times.shape)
    out_times, out_widths = np.broadcast_arrays(np.atleast_1d(out_times), out_widths)
    if len(set(zip(times.tolist(), widths.tolist(), strict=True))) != len(times):
        raise _validate.wrong_value("t", "of pairs (t, sigma) that are all distinct", Text("repeated ones"))
    weights = _schedules.posthoc_weights(times, widths, out_times, out_widths)
    if normalize:
        weights /= weights.sum(axis=0)
    return weights[:, 0] if scalar else weights


def _positive(name: str, value: ArrayLike, high: float = math.inf) -> NDArray[np.float64]:
    array = _validate.array(name, value)
    if array.dtype.kind not in "iuf":
        raise _validate.wrong_type(name, "an array of real numbers", array)
    array = array.astype(np.float64)
    if not ((array > 0) & (array <= min(high, np.finfo(np.float64).max))).all():
        wanted = "of finite numbers > 0" if high == math.inf else f"of numbers in (0, {high:g}]"
        raise _validate.wrong_value(name, wanted, Text("an array with others" if array.ndim else repr(array.item())))
    return array
