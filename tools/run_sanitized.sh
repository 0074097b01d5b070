#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# The suite under AddressSanitizer and UndefinedBehaviorSanitizer. The environment's fastops was built with FASTOPS_SANITIZE.
# Arguments go to pytest. The interpreter is not instrumented, so the runtimes are preloaded, and its own leaks not reported.
set -euo pipefail
cd "$(dirname "$0")/.."
runtime() { "${CXX:-g++}" -print-file-name="$1"; }
preload="$(runtime libasan.so) $(runtime libubsan.so) $(runtime libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
# The other backends hold no code of ours that is instrumented, and Numba's compilations take most of the time.
export FASTOPS_BACKEND=native FASTOPS_TEST_BACKENDS=native

# Another build that shadows this one would make the whole run worthless (a tree on the path, an editable install).
python -P - <<'PY'
import pathlib, subprocess, sys
import importlib.util
origin = pathlib.Path(importlib.util.find_spec("fastops").origin).resolve()
assert origin.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"fastops comes from {origin}, not from {sys.prefix}"
needed = subprocess.run(["readelf", "-d", origin.parent / "lib" / "libfastops.so"], check=True, capture_output=True, text=True)
assert "libasan" in needed.stdout, "this fastops was built without the sanitizers"
print(f"sanitized fastops: {origin.parent}")
PY
# Programs that are linked with the library would have to be built with the sanitizers, too; those bring symbols of their own, and keep
# freed memory for a while.
left_out=(--ignore=tests/test_downstream.py --ignore=tests/test_symbols.py
  --deselect=tests/faults/test_fork.py::test_thread_churn_leaves_nothing)
# The report of a finding goes to file descriptor 2 right before the process ends: pytest must not have taken that.
LD_PRELOAD="$preload" exec python -P -m pytest --capture=sys "${left_out[@]}" "$@"
