#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Builds the fuzz targets of tests/fuzz with clang and runs each for some seconds from the kept corpus: fuzz.sh SECONDS [TARGET...].
# FASTOPS_FUZZ_DIR keeps what was built and found from run to run. The corpus takes what was found by `fuzz.sh merge`.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:?how many seconds each, or merge}
shift
targets=("$@")
[ $# -gt 0 ] || targets=(whitespace word char unicode zh counts)
tokenizers=(whitespace word char unicode zh)
work=${FASTOPS_FUZZ_DIR:-}
if [ -z "$work" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$work/objects"

clang=${CLANG:-}
for name in clang++ clang++-{22..14}; do
  [ -n "$clang" ] || ! command -v "$name" >/dev/null || clang=$name
done
[ -n "$clang" ] || { echo 'fuzz.sh needs clang++ (or CLANG)' >&2; exit 1; }
flags=(-std=c++17 -O1 -g -Icsrc -Icsrc/include -Itests/native -DFASTOPS_STATIC -DFASTOPS_TEST_TINY
  -fsanitize=address,undefined -fno-sanitize-recover=undefined)

# Objects are made anew where a source or header of theirs is newer.
compile() { # compile OBJECT SOURCE FLAGS...
  local object=$work/objects/$1 source=$2 folders=csrc
  shift 2
  [ "${source%%/*}" = csrc ] || folders='csrc tests/native tests/fuzz'
  # shellcheck disable=SC2086
  if [ ! -e "$object" ] || [ -n "$(find $folders -newer "$object" -type f -print -quit)" ]; then
    "$clang" "${flags[@]}" "$@" -c "$source" -o "$object"
  fi
}
common=()
for source in core/dispatch core/parallel wordcount/wordcount_{capi,container,counter,spill,table,text,zh}; do
  compile "${source##*/}.o" "csrc/$source.cpp" -fsanitize=fuzzer-no-link
  common+=("$work/objects/${source##*/}.o")
done
case $(uname -m) in
  x86_64) levels=(v2 v3 v4) ;;
  *) levels=(neon) ;;
esac
for level in "${levels[@]}"; do
  march=()
  [ "$level" = neon ] || march=("-march=x86-64-$level")
  compile "kernels_$level.o" csrc/wordcount/wordcount_kernels.cpp "${march[@]}" "-DFASTOPS_LEVEL=$level" -fno-exceptions -fno-rtti
  common+=("$work/objects/kernels_$level.o")
done
build() { # build TARGET
  local source=tests/fuzz/fuzz_counts.cpp define=() k
  for k in "${!tokenizers[@]}"; do
    [ "${tokenizers[k]}" != "$1" ] || { source=tests/fuzz/fuzz_words.cpp; define=("-DFASTOPS_FUZZ_TOKENIZER=$k"); }
  done
  compile "fuzz_$1.o" "$source" "${define[@]}" -fsanitize=fuzzer-no-link
  "$clang" "${flags[@]}" -fsanitize=fuzzer "$work/objects/fuzz_$1.o" "${common[@]}" -pthread -o "$work/fuzz_$1"
}

for target in "${targets[@]}"; do
  build "$target"
  kept=tests/fuzz/corpus/words  # of all tokenizers
  [ "$target" != counts ] || kept=tests/fuzz/corpus/counts
  mkdir -p "$work/found/$target" "$kept"
  if [ "$what" = merge ]; then
    # The smallest inputs first; those that add least are left to be found again.
    "$work/fuzz_$target" -merge=1 -max_len=400 "$kept" "$work/found/$target" 2>&1 | tail -n 2
    continue
  fi
  # A finding ends the run with a report, and the input lies in the folder of that name.
  status=0
  "$work/fuzz_$target" "-max_total_time=$what" -max_len=600 -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 \
    -artifact_prefix="$work/$target-" "$work/found/$target" "$kept" >"$work/$target.log" 2>&1 || status=$?
  printf '%s: %s runs, %s inputs kept, status %d\n' "$target" \
    "$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/$target.log")" \
    "$(find "$kept" -type f | wc -l)" "$status"
  if [ "$status" != 0 ]; then
    tail -n 60 "$work/$target.log"
    exit 1
  fi
done
