# SPDX-License-Identifier: BSD-3-Clause
"""Where a C or CMake build finds what it needs of the installed package; without NumPy, which such a build may not have."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# Options of the command line: the folder within the package, and what is in it.
FOLDERS = {
    "--include-dir": ("include", "C headers"),
    "--lib-dir": ("lib", "C library"),
    "--cmake-dir": ("share/cmake/fastops", "CMake package"),
}


def asked_alone() -> bool:
    """Whether this process is `python -m fastops` with such options alone, and `__main__` not yet found."""
    # Python's own promise: "-m" stands for the module until it is found.
    options = sys.argv[1:]
    if sys.argv[:1] != ["-m"] or not options or not FOLDERS.keys() >= set(options):
        return False
    return sys.orig_argv[-len(options) - 1] in ("fastops", "-mfastops")


def folder(option: str) -> Path | None:
    """The folder; in an editable install it lies beside the compiled module."""
    from importlib.util import find_spec
    from pathlib import Path

    places = [Path(__file__).parent]
    core = find_spec("fastops._core")
    if core is not None and core.origin:
        places.append(Path(core.origin).parent)
    return next((x / FOLDERS[option][0] for x in places if (x / FOLDERS[option][0]).is_dir()), None)
