# SPDX-License-Identifier: BSD-3-Clause
"""No code of one CPU level may hide under a name that all levels share."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

import fastops

ROOT = Path(__file__).resolve().parents[1]
NEEDS_TOOLS = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("nm") is None, reason="needs g++ and nm to look into objects"
)


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_symbols", ROOT / "tools" / "check_symbols.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_source(folder: Path, text: str) -> Path:
    source, target = folder / "unit.cpp", folder / "unit.o"
    source.write_text(text)
    subprocess.run(["g++", "-std=c++17", "-O0", "-c", str(source), "-o", str(target)], check=True)
    return target


@NEEDS_TOOLS
def test_symbols_of_the_levels_namespace_pass(checker: ModuleType, tmp_path: Path) -> None:
    unit = compile_source(
        tmp_path,
        """
        namespace fastops::v3 {
        template <class T> T twice(T x) { return x + x; }
        struct Table { virtual ~Table() = default; virtual int size() const { return 3; } };
        inline int counter() { static int calls = [] { return 7; }(); return ++calls; }
        int use(const Table& t) { return twice(t.size()) + counter(); }
        Table made;
        }
        """,
    )
    assert len(checker.defined_symbols(unit)) > 5
    assert checker.foreign_symbols([unit], "v3") == []


@NEEDS_TOOLS
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("#include <vector>\nnamespace fastops::v4 { void f(std::vector<float>& v) { v.push_back(1); } }", "vector"),
        (
            "namespace fastops { inline int shared() { return 1; } namespace v4 { int f() { return shared(); } } }",
            "shared",
        ),
        ("namespace fastops::v3 { int f() { return 1; } }", "v3"),
        ("namespace fastops::v42 { int f() { return 1; } }", "v42"),
        ('extern "C" int fastops_f() { return 1; }', "fastops_f"),
    ],
    ids=["container", "shared-inline", "other-level", "longer-name", "c-name"],
)
def test_symbols_outside_the_namespace_are_found(checker: ModuleType, tmp_path: Path, text: str, name: str) -> None:
    found = checker.foreign_symbols([compile_source(tmp_path, text)], "v4")
    assert any(name in symbol for symbol in found)


@NEEDS_TOOLS
def test_symbols_of_this_build_stay_in_their_level(checker: ModuleType) -> None:
    given = os.environ.get("FASTOPS_BUILD_DIR")
    candidates = [Path(given)] if given else sorted((ROOT / "build").glob("*"))
    builds = [path for path in candidates if checker.level_objects(path)]
    if given:
        assert builds, f"FASTOPS_BUILD_DIR={given} holds no objects of any level"
    if not builds:
        pytest.skip("no build folder with objects beside the tests (set FASTOPS_BUILD_DIR to name one)")
    assert checker.main([str(path) for path in builds]) == 0


def test_library_exports_only_the_c_interface(checker: ModuleType) -> None:
    library = Path(fastops.__file__).parent / "lib" / "libfastops.so"
    if not library.exists() or shutil.which("nm") is None:
        pytest.skip("needs nm and an installation with the native backend")
    exports = checker.defined_symbols(library, dynamic=True)
    assert "fastops_abi_version" in exports
    assert checker.foreign_exports(library) == []
