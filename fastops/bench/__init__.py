# SPDX-License-Identifier: BSD-3-Clause
"""Benchmarks that ship with the package: cases by family, a runner that knows its noise, and reports."""

from __future__ import annotations

# Modules of this package that hold cases.
FAMILIES = ("mitchell", "optim", "attention", "wordcount", "torch", "jax")
