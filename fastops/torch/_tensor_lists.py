# SPDX-License-Identifier: BSD-3-Clause
"""The tensors of a model, its gradients and its averages as lists that steps take: where they are, and whether they still are."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import chain, repeat
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _tensors, optim
from .._tensors import TensorList

try:
    from .._core import GradientReader, hold
except ImportError:
    # What an install without compiled parts has.

    class GradientReader:  # type: ignore[no-redef]
        """The gradients of parameters."""

        def read(self, params: Iterable[Tensor]) -> tuple[list[Any], bool]:
            """A list of them, and whether every parameter has one."""
            found = list(map(attrgetter("grad"), params))
            return found, type(None) not in {*map(type, found)}

    def hold(dicts: list[dict[str, Any]], names: tuple[str, ...], entries: list[Any]) -> bool:
        """Whether dicts hold these objects under these names: those of the first dict first."""
        try:
            return same(chain.from_iterable(map(itemgetter(*names), dicts)), entries)
        except KeyError:
            return False


__all__ = [
    "GradientReader",
    "Pairs",
    "Slots",
    "by_device",
    "counted_with",
    "hold",
    "kept_list",
    "local",
    "same",
    "steps_of",
    "want_averaged",
]

_WIDE = (torch.float32, torch.float64)


def local(x: Any) -> Any:
    """The part of a tensor that is on this rank: of a DTensor its shard, else the tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def same(items: Iterable[Any], others: Iterable[Any]) -> bool:
    """Whether two of one length have the same objects."""
    return all(map(operator.is_, items, others))


class Places(NamedTuple):
    """Entries of dicts."""

    dicts: list[dict[str, Any]]
    names: list[str]

    def add(self, entries: dict[str, Any], name: str) -> None:
        """Another one."""
        self.dicts.append(entries)
        self.names.append(name)

    def read(self) -> list[Any]:
        """What the entries are."""
        return list(map(operator.getitem, self.dicts, self.names))


class Slots:
    """The places of a module's parameters and buffers, from which those of the moment are read without a walk over the module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.params, self.buffers = Places([], []), Places([], [])
        self._vacant = Places([], [])
        # Where tensors are that were met before, and where those were.
        self._repeated, self._first = Places([], []), Places([], [])
        self._dicts: list[dict[str, Any]] = []
        self._children: list[tuple[dict[str, Any], list[Any]]] = []
        seen: dict[int, tuple[dict[str, Any], str]] = {}
        for part in module.modules():
            if part._modules:
                self._children.append((part._modules, list(part._modules.values())))
            else:
                self._dicts.append(part._modules)
            for places, tensors in ((self.params, part._parameters), (self.buffers, part._buffers)):
                self._dicts.append(tensors)
                for name, x in tensors.items():
                    if x is None:
                        self._vacant.add(tensors, name)
                    elif id(x) in seen:
                        self._repeated.add(tensors, name)
                        self._first.add(*seen[id(x)])
                    else:
                        seen[id(x)] = tensors, name
                        places.add(tensors, name)
        self._sizes = list(map(len, self._dicts))

    def counts(self) -> tuple[int, int]:
        """How many parameters and buffers there are."""
        return len(self.params.names), len(self.buffers.names)

    def current(self) -> bool:
        """Whether the module still has the parts it had, with tensors under the same names, the same ones shared."""
        if not all(len(parts) == len(had) and same(parts.values(), had) for parts, had in self._children):
            return False
        nothing = repeat(None)
        try:
            return (
                list(map(len, self._dicts)) == self._sizes
                and same(self._vacant.read(), nothing)
                and same(self._repeated.read(), self._first.read())
                and all(map(operator.is_not, self.params.read(), nothing))
                and all(map(operator.is_not, self.buffers.read(), nothing))
            )
        except KeyError:
            return False


def steps_of(tensor: Tensor) -> Any:
    """The functions that step tensors where this one is: of `fastops.cuda` on a GPU, else of `fastops`."""
    if tensor.is_cuda:
        from .. import cuda

        return cuda
    return optim


def kept_list(tensors: list[Any]) -> Any:
    """A list of tensors that many calls use, where the first one is; None where they stand for shards."""
    if any(hasattr(x, "to_local") for x in tensors):
        return None
    return steps_of(tensors[0]).TensorList(tensors) if tensors and tensors[0].is_cuda else TensorList(tensors)


class Pairs:
    """Averages and the tensors that they follow, device by device, and the lists of them that calls use again and again."""

    def __init__(self) -> None:
        self._known: tuple[list[Any], list[Any]] = [], []
        self._devices: list[Any] = []
        self._groups: list[tuple[list[int], Any, Any]] = []

    def of(self, averages: list[Any], live: list[Any]) -> list[tuple[Any, Any, Any]]:
        """The functions to call, the averages and the tensors, for each device."""
        found = averages, live
        known = all(len(x) == len(y) and same(x, y) for x, y in zip(found, self._known, strict=True))
        # One list says by itself where a tensor is elsewhere.
        if not known or (len(self._groups) != 1 and self.moved()):
            self._make(*found)
        return [
            (
                steps_of(averages[index[0]]) if index else optim,
                # The local part of a DTensor is another object each time.
                [local(averages[i]) for i in index] if first is None else first,
                [local(live[i]) for i in index] if second is None else second,
            )
            for index, first, second in self._groups
        ]

    def moved(self) -> bool:
        """Whether averages have gone to another device, as the same objects; they are then grouped anew in the next call."""
        devices = [x.device for x in self._known[0]]
        gone = devices != self._devices
        if gone:
            self._known = [], []
            self._groups = []
        return gone

    def _make(self, averages: list[Any], live: list[Any]) -> None:
        devices = [x.device for x in averages]
        places: dict[Any, list[int]] = {}
        for i, x in enumerate(averages):
            places.setdefault((x.is_cuda, x.device), []).append(i)
        groups = [
            (index, kept_list([averages[i] for i in index]), kept_list([live[i] for i in index]))
            for index in places.values()
        ]
        # Last, for a list may refuse its tensors: what is known and the groups are of one call.
        self._known, self._devices, self._groups = (averages, live), devices, groups


def counted_with(counter: Tensor, x: Tensor) -> Tensor:
    """`x` as a tensor whose versions torch counts together with those of `counter`, where it can be one.

    Tensors that are always written in one call need not be told of one by one then.
    """
    if type(x) is not Tensor or not x.is_cpu or x.layout is not torch.strided:
        return x
    made = counter.detach()
    made.data = x
    return made


def by_device(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors of each device."""
    found: dict[Any, list[Tensor]] = {}
    for x in tensors:
        found.setdefault((x.is_cuda, x.device), []).append(x)
    return list(found.values())


def want_averaged(steps: Any, shadows: list[Any], params: list[Any]) -> None:
    """Raises what moving these averages would, before any is written: after a look where nothing is unusual."""
    roles = _tensors.ema_roles(1)
    if steps is not optim:
        steps._optim.want(roles, [params, shadows])
        return
    pairs = zip(params, shadows, strict=True)
    if not all(
        p.dtype in _WIDE and s.dtype in _WIDE and p.is_cpu and s.is_cpu and s.shape == p.shape for p, s in pairs
    ):
        _tensors.check(roles, [params, shadows])
