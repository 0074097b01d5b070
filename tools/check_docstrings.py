#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Check the docstring of every public object: numpydoc's own rules, a Raises section, an example, a signature."""

import inspect
import sys
import tomllib
from pathlib import Path

from numpydoc.docscrape import NumpyDocString
from numpydoc.validate import ERROR_MSGS, validate

import fastops

ROOT = Path(__file__).resolve().parents[1]


def wanted_checks() -> set[str]:
    """The codes that pyproject.toml asks for: "all" and then those taken away, or a plain list."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = set(tomllib.load(file)["tool"]["numpydoc_validation"]["checks"])
    return set(ERROR_MSGS) - listed if "all" in listed else listed


def public_objects() -> dict[str, object]:
    """Every public callable of fastops but the exceptions, and every public method of its classes, by dotted name."""
    found: dict[str, object] = {}
    for name in fastops.__all__:
        value = getattr(fastops, name)
        if not callable(value) or (inspect.isclass(value) and issubclass(value, Exception)):
            continue
        found[name] = value
        if inspect.isclass(value):
            for key, member in vars(value).items():
                if not key.startswith("_") and callable(member):
                    found[f"{name}.{key}"] = member
    return found


def takes_arguments(value: object) -> bool:
    """Whether a call can be wrong; a class says what it raises too, a property or a plain getter need not."""
    try:
        return bool(set(inspect.signature(value).parameters) - {"self"})  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return True


def problems(name: str, value: object, checks: set[str]) -> list[str]:
    """What is wrong with one docstring."""
    text = inspect.getdoc(value) or ""
    out = [f"{code} {message}" for code, message in validate(f"fastops.{name}")["errors"] if code in checks]
    doc = NumpyDocString(text)
    if takes_arguments(value) and not doc["Raises"]:
        out.append("no Raises section")
    if ">>>" not in text:
        out.append("no example")
    try:
        inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        out.append(f"no signature: {error}")
    return out


def main() -> int:
    """Print every problem; 0 only when there are none."""
    checks = wanted_checks()
    objects = public_objects()
    bad = [f"fastops.{name}: {line}" for name, value in objects.items() for line in problems(name, value, checks)]
    print(*bad, sep="\n", end="\n" if bad else "")
    print(f"docstrings: {len(objects)} public objects, {len(bad)} problems")
    return 1 if bad or not objects else 0


if __name__ == "__main__":
    sys.exit(main())
