#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Every static check, in an environment that holds fastops and the "lint" dependency group. Stops at the first failure.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
mapfile -t cxx < <(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/native/*.h' 'tests/native/*.cpp' 'tests/downstream/*/*.c*' 'tests/fuzz/*.cpp' 'examples/*.c' 'examples/*.cpp')

step() {
  printf '  lint: %s\n' "$*"
  "$@"
}

step ruff check .
step ruff format --check .
step codespell
step validate-pyproject pyproject.toml
step sp-repo-review .
step zizmor --offline --quiet .github
step clang-format --dry-run -Werror "${cxx[@]}"

# The installed package is what users type-check against; away from the tree, where the build-time version file is absent.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
step mypy --config-file "$root/pyproject.toml" -p fastops
step stubtest fastops --mypy-config-file "$root/pyproject.toml" --allowlist "$root/tools/stubtest_allowlist.txt"
cd "$root"

if command -v clang-tidy >/dev/null; then
  cmake -S . -B "$work/build" -DFASTOPS_PYTHON=OFF -DFASTOPS_BUILD_TESTS=OFF >/dev/null
  # One level stands for all, and the path-sensitive checks, which take minutes on kernels, look at the core alone.
  python - "$work/build/compile_commands.json" <<'PY'
import json, sys
with open(sys.argv[1]) as file:
    entries = json.load(file)
with open(sys.argv[1], "w") as file:
    json.dump(list({entry["file"]: entry for entry in entries}.values()), file)
PY
  step clang-tidy --quiet -p "$work/build" csrc/core/*.cpp
  step clang-tidy --quiet -p "$work/build" '--checks=-clang-analyzer-*' csrc/*/*_capi.cpp csrc/*/*_kernels.cpp
else
  echo '  lint: clang-tidy is not installed: not run'
fi
