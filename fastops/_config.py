# SPDX-License-Identifier: BSD-3-Clause
"""What is compiled in, what this machine runs, what was chosen and why; the CPU level and the number of threads."""

from __future__ import annotations

import math
import os
import sys
from types import ModuleType, TracebackType
from typing import Any, Literal, Self, overload

from . import _backend, _validate

_KNOWN_TARGETS = ("v2", "v3", "v4", "neon")

_core: ModuleType | None = None
_target_reason = "native alone has targets"
_threads_reason = "min(affinity mask, cgroup quota)"
# The setting where the backend has no pool of its own to hold it.
_threads = 1


def targets() -> list[str]:
    """The CPU levels that are compiled in and that this CPU runs, the plainest first.

    Returns
    -------
    list of str
        Empty where the backend is not native.
    """
    return list(_core.targets()) if _core is not None else []


def get_target() -> str | None:
    """The CPU level in force, None where the backend is not native.

    Returns
    -------
    str or None
        One of `targets()`.
    """
    return str(_core.get_target()) if _core is not None else None


def _set_target(argument: str, name: object, why: str) -> None:
    global _target_reason
    if not isinstance(name, str):
        raise _validate.wrong_type(argument, "the name of a target", name)
    if _core is None:
        raise _validate.wrong_value(argument, f"absent: the {_backend.name} backend has no targets", name)
    known = targets()
    if name not in known:
        if name in _core.compiled_targets():
            listed = " or ".join(repr(item) for item in known)
            raise _validate.wrong_value(
                argument, f"{listed} on this CPU", _validate.Text(f"{name!r}, which it does not run")
            )
        raise _validate.wrong_choice(argument, known, name)
    _core.set_target(name)
    _target_reason = why


class target:
    """Choose the CPU level of the native kernels, at once and for the whole process.

    Used as a context manager it puts the former level back at the end. Other threads see the level too.

    Parameters
    ----------
    name : str
        "v2", "v3" or "v4" (the x86-64 psABI levels) or "neon"; `show_config` lists what this machine runs.

    Raises
    ------
    TypeError
        `name` is not a str.
    ValueError
        `name` is not compiled in or this CPU does not run it; the message lists the choices.

    Notes
    -----
    Element-wise results are the same bits at every level; sums of products may differ by rounding between levels.
    The environment variable FASTOPS_TARGET sets the level at import.

    Examples
    --------
    >>> import fastops
    >>> level = fastops.show_config("dict")["target"]
    >>> with fastops.target(level):  # doctest: +SKIP
    ...     float(fastops.mitchell_mul(3.0, 3.0))
    8.0
    """

    def __init__(self, name: str) -> None:
        self.previous = get_target()
        self._previous_reason = _target_reason
        _set_target("name", name, "fastops.target")
        self.name = name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.previous is not None:
            _set_target("name", self.previous, self._previous_reason)

    def __repr__(self) -> str:
        return f"fastops.target({self.name!r})"


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use, the caller included.

    Parameters
    ----------
    n : int
        In [1, 1024]; 1 keeps every call on the calling thread.

    Raises
    ------
    TypeError
        `n` is not an integer.
    ValueError
        `n` is out of range.

    Notes
    -----
    The setting holds for the whole process. Results do not depend on it: the split of the work is fixed. The default is
    min(affinity mask, cgroup quota); the environment variable FASTOPS_NUM_THREADS sets it at import. The reference
    backend uses one thread whatever is set.

    Examples
    --------
    >>> import fastops
    >>> before = fastops.get_num_threads()
    >>> fastops.set_num_threads(2)
    >>> fastops.get_num_threads()
    2
    >>> fastops.set_num_threads(before)
    """
    _set_num_threads("n", n, "fastops.set_num_threads")


def _set_num_threads(argument: str, n: object, why: str) -> None:
    global _threads, _threads_reason
    count = _validate.integer(argument, n, 1, _validate.MAX_THREADS)
    if _core is not None:
        _core.set_num_threads(count)
    else:
        setter = getattr(_backend.backend, "set_num_threads", None)
        if setter is not None:
            setter(count)
        _threads = count
    _threads_reason = why


def get_num_threads() -> int:
    """How many threads a call may use, the caller included.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> import fastops
    >>> fastops.get_num_threads() >= 1
    True
    """
    return int(_core.get_num_threads()) if _core is not None else _threads


def affinity() -> int:
    """The number of CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def cgroup_quota(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float | None:
    """The CPUs that the control groups of this process grant, None without a limit.

    Parameters
    ----------
    proc, root : str
        The file that names the groups, and where the group file system is mounted.

    Returns
    -------
    float or None
        The smallest quota on the way from the group to the root, in CPUs; versions 1 and 2 are read.
    """
    try:
        with open(proc, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            # Beside version 1's hierarchies version 2's is mounted below the root.
            bases, read = [root, f"{root}/unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            bases, read = [f"{root}/cpu", f"{root}/{controllers}"], _quota_v1
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for base in bases:
            for depth in range(len(parts), -1, -1):
                quota = read("/".join([base, *parts[:depth]]))
                if quota is not None:
                    quotas.append(quota)
    return min(quotas, default=None)


def _words(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().split()
    except OSError:
        return []


def _quota_v2(group: str) -> float | None:
    return _quota(_words(f"{group}/cpu.max"))


def _quota_v1(group: str) -> float | None:
    return _quota(_words(f"{group}/cpu.cfs_quota_us") + _words(f"{group}/cpu.cfs_period_us"))


def _quota(words: list[str]) -> float | None:
    if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])


def default_num_threads() -> int:
    """min(affinity mask, cgroup quota), at least 1."""
    if _core is not None:
        return int(_core.default_num_threads())
    quota = cgroup_quota()
    return affinity() if quota is None else max(1, min(affinity(), math.ceil(quota)))


def _import_version(module: str) -> str:
    """The version of a module that may not be there, without importing it."""
    if not _backend.installed(module):
        return "not installed"
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return "installed"


def _jax_handlers() -> str:
    """Whether the build has handlers for jax, and where `fastops.jax` is imported, whether it could register them."""
    if not _backend.installed(f"{__package__}._jax"):
        return "not built"
    ops = sys.modules.get(f"{__package__}.jax._ops")
    unusable = ops is not None and getattr(ops, "MODULE", ops) is None
    return "built, but not to be used here: callbacks are" if unusable else "built"


def _settings() -> dict[str, Any]:
    import platform

    import numpy as np

    from . import __version__

    quota = cgroup_quota()
    granted = "no limit" if quota is None else f"{quota:g} CPUs"
    if _core is not None:
        compiled = list(_core.compiled_targets())
        info = dict(_core.cpu_info())
        cpu = f"{info.get('brand', 'unknown')} ({info.get('architecture', platform.machine())})".strip()
        abi = int(_core.abi_version())
    else:
        compiled, cpu, abi = [], f"{platform.processor() or 'unknown'} ({platform.machine() or 'unknown'})", 0
    return {
        "fastops": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": cpu,
        "backend": _backend.name,
        "backend_reason": _backend.reason,
        "abi_version": abi if _core is not None else "none: native is not in use",
        "targets_compiled": compiled or ["none: native is not in use"],
        "targets_runnable": targets() or ["none: native is not in use"],
        "target": get_target() or "none: native is not in use",
        "target_reason": _target_reason,
        "threads": get_num_threads(),
        "threads_reason": f"{_threads_reason} (affinity {affinity()}, cgroup quota {granted})",
        "cuda": "built" if _backend.installed(f"{__package__}._cuda") else "not built",
        "jax": _import_version("jax"),
        "jax_handlers": _jax_handlers() if _core is not None else "not built",
        "ml_dtypes": _import_version("ml_dtypes"),
        "numba": _import_version("numba"),
    }


@overload
def show_config(mode: Literal["text"] = "text") -> None: ...


@overload
def show_config(mode: Literal["dict"]) -> dict[str, Any]: ...


@overload
def show_config(mode: Literal["json"]) -> str: ...


def show_config(mode: str = "text") -> dict[str, Any] | str | None:
    """Say what is compiled in, what this machine runs, what was chosen and why.

    Parameters
    ----------
    mode : {"text", "dict", "json"}
        "text" prints the settings, one a line; "dict" and "json" return them.

    Returns
    -------
    None, dict or str
        By `mode`. The keys are the same in each; every value is non-empty.

    Raises
    ------
    TypeError
        `mode` is not a str.
    ValueError
        `mode` is not one of the three.

    Examples
    --------
    >>> import fastops
    >>> fastops.show_config("dict")["cuda"] in ("built", "not built")
    True
    """
    _validate.choice("mode", mode, ("text", "dict", "json"))
    settings = _settings()
    if mode == "dict":
        return settings
    if mode == "json":
        import json

        return json.dumps(settings, indent=2)
    width = max(len(key) for key in settings)
    for key, value in settings.items():
        print(f"{key:<{width}}  {', '.join(value) if isinstance(value, list) else value}")
    return None


def _start() -> None:
    """Reads FASTOPS_TARGET and FASTOPS_NUM_THREADS; called once, at import."""
    global _core, _target_reason
    if _backend.name == "native":
        from . import _core as core

        _core = core
        _target_reason = "the best that this CPU runs"
    asked = os.environ.get("FASTOPS_TARGET", "")
    if asked:
        if _core is not None:
            _set_target("FASTOPS_TARGET", asked, f"FASTOPS_TARGET={asked}")
        elif asked not in _KNOWN_TARGETS:
            raise _validate.wrong_choice("FASTOPS_TARGET", _KNOWN_TARGETS, asked)
    count = os.environ.get("FASTOPS_NUM_THREADS", "")
    if count:
        if not (count.isascii() and count.isdecimal()) or len(count) > 9:
            raise _validate.wrong_value("FASTOPS_NUM_THREADS", f"an integer in [1, {_validate.MAX_THREADS}]", count)
        _set_num_threads("FASTOPS_NUM_THREADS", int(count), f"FASTOPS_NUM_THREADS={count}")
    elif _core is None:
        _set_num_threads("FASTOPS_NUM_THREADS", min(default_num_threads(), _validate.MAX_THREADS), _threads_reason)


_start()
