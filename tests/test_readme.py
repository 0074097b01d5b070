# SPDX-License-Identifier: BSD-3-Clause
"""The README and the documentation say what is so: their Python runs, their commands and files exist."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastops
from fastops.__main__ import parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PYTHON = [
    pytest.param(text, id=f"{page.relative_to(ROOT)}-{i}")
    for page in PAGES
    for i, text in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    )
]


@pytest.mark.parametrize("text", PYTHON)
def test_python_of_the_pages_runs(text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A line with a trailing `# array(...)` comment must give that array."""
    for name in ("jax", "torch"):
        if re.search(rf"^(import|from) (fastops\.)?{name}", text, re.MULTILINE):
            pytest.importorskip(name, reason=f"{name} is not installed")
    if re.search(r"^(import|from) (fastops\.)?keras", text, re.MULTILINE):
        _run_with_keras(text, tmp_path)
        return
    native_only = [name for name in ("fastops.target(", ".reduce(") if name in text]
    if native_only and fastops.show_config("dict")["backend"] != "native":
        pytest.skip(f"the text shows what native alone has: {', '.join(native_only)}")
    scope: dict[str, object] = {}
    stated = 0
    for node in ast.parse(text).body:
        source = ast.get_source_segment(text, node)
        assert source is not None
        if isinstance(node, ast.Expr):
            value = eval(compile(ast.Expression(node.value), "page", "eval"), scope)
            comment = text.splitlines()[node.end_lineno - 1][node.end_col_offset :].strip(" #")  # type: ignore[operator]
            if comment.startswith("array("):
                np.testing.assert_array_equal(repr(value), comment)
                stated += 1
        else:
            exec(compile(ast.Module([node], []), "page", "exec"), scope)
    assert stated == text.count("# array(")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_rows_of_tables_have_a_cell_for_each_column(page: Path) -> None:
    """With one too few, all after it say something of another column."""
    columns = 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("|"):
            columns = 0
            continue
        bars = re.sub(r"`[^`]*`|\\\|", "", line).count("|")
        columns = columns or bars
        assert bars == columns, f"line {number}: {line}"


def _run_with_keras(text: str, folder: Path) -> None:
    """In a process of its own, since Keras chooses its backend when it is imported."""
    found = [name for name in ("torch", "jax") if importlib.util.find_spec(name) is not None]
    if importlib.util.find_spec("keras") is None or not found:
        pytest.skip("keras, or both torch and jax, are not installed")
    env = {**os.environ, "KERAS_BACKEND": found[0]}
    ran = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, env=env, cwd=folder, timeout=200, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_readme_has_the_two_commands() -> None:
    commands = re.findall(r"^\$ (.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert commands == [
        "python3 -m venv .venv && . .venv/bin/activate",
        "pip install '.[bench]' && fastops bench",
        "pip install '.[test]' && pytest",
    ]


def test_options_named_in_the_pages_exist() -> None:
    named = set()
    for page in PAGES:
        for arguments in re.findall(
            r"^(?:\$ |`)fastops (bench|config)((?: --?[a-z]+(?: [\w./]+)?)*)", page.read_text(), re.MULTILINE
        ):
            named.add((arguments[0], *re.findall(r"--[a-z]+(?: [\w./]+)?", arguments[1])))
    assert len(named) > 3
    for command, *options in named:
        parser().parse_args([command, *" ".join(options).split()])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
