#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Check that an object compiled for one CPU level defines nothing outside that level's namespace.

A linker may keep any one of several copies of an inline function. A copy that was compiled for AVX-512 and has a common
name would then run on every CPU, so the per-level objects may define only names in ``fastops::<level>``, and the shared
library may export only the C interface.

Usage: ``python tools/check_symbols.py BUILD_DIR...``
"""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

LEVELS = ("v2", "v3", "v4", "neon")
# What the sanitizers and coverage put into an object: not code that a level could leak through.
INSTRUMENTATION = re.compile(r"^_?_?(asan|ubsan|odr_asan|gcov|llvm)|^DW\.ref\.|^__gxx_personality")


def defined_symbols(path: Path, *, dynamic: bool = False) -> list[str]:
    """Names with external linkage, weak ones included, that an object or a shared library defines."""
    command = ["nm", "--defined-only", "--extern-only", *(["--dynamic"] if dynamic else []), str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split()[-1] for line in lines if len(line.split()) == 3]


def belongs_to(symbol: str, level: str) -> bool:
    """Whether a mangled name (function, static local, guard, type information) lies in ``fastops::<level>``."""
    return re.match(rf"_Z(?:GV|T[ISTV]|Z)*N[KVrRO]*7fastops{len(level)}{level}", symbol) is not None


def foreign_symbols(objects: Iterable[Path], level: str) -> list[str]:
    """Every symbol of these objects that lies outside the level, as "file: symbol"."""
    return [
        f"{path.name}: {symbol}"
        for path in objects
        for symbol in defined_symbols(path)
        if not INSTRUMENTATION.match(symbol) and not belongs_to(symbol, level)
    ]


def level_objects(build: Path) -> dict[str, list[Path]]:
    """Objects of each level in a CMake build folder; levels without objects are left out."""
    found = {level: sorted(build.glob(f"CMakeFiles/fastops_{level}.dir/**/*.o")) for level in LEVELS}
    return {level: objects for level, objects in found.items() if objects}


def foreign_exports(library: Path) -> list[str]:
    """Exported names of the shared library that are not of the C interface."""
    return [symbol for symbol in defined_symbols(library, dynamic=True) if not symbol.startswith("fastops_")]


def main(arguments: list[str]) -> int:
    """Check each build folder; 0 only when there was something to check and all of it was right."""
    bad: list[str] = []
    for build in map(Path, arguments):
        objects = level_objects(build)
        if not objects:
            bad.append(f"{build}: no objects of any level")
        for level, paths in objects.items():
            bad += foreign_symbols(paths, level)
            count = sum(len(defined_symbols(path)) for path in paths)
            print(f"{build.name}: {level}: {len(paths)} objects, {count} external names")
            if not count:
                bad.append(f"{build}: objects of {level} define nothing")
        for library in build.glob("libfastops.so"):
            bad += [f"{library.name} exports {symbol}" for symbol in foreign_exports(library)]
    print(*bad, sep="\n", end="\n" if bad else "")
    return 1 if bad or not arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
