#!/usr/bin/env bash
# Builds the native kernels with a sanitizer of GCC and runs tests on them (Linux):
#   tools/sanitize.sh address|thread [arguments for pytest; all tests of the native kernels if none]
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  address) sanitizers=address,undefined runtime=libasan.so ;;
  thread) sanitizers=thread runtime=libtsan.so ;;
  *) sed -n '2,3p' "$0" >&2; exit 2 ;;
esac
build="build/$1"
shift
[[ $# -gt 0 ]] || set -- tests/test_kernels_native*.py tests/test_kernels_invariance.py

export CXX="${CXX:-g++}"
cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1 \
  -DLLAMACHAT_SANITIZE="$sanitizers" -DLLAMACHAT_SELFTEST=ON
cmake --build "$build" --parallel "$(nproc)"
ctest --test-dir "$build" --output-on-failure --parallel "$(nproc)"

# Python is not instrumented: it gets the runtime beforehand (with libstdc++, whose __cxa_throw the
# runtime looks for), keeps its leaks to itself, and leaves every allocation to the runtime.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS="ignore_noninstrumented_modules=1 die_after_fork=0"
export LLAMACHAT_NATIVE_LIBRARY="$PWD/$build/llamachat_native.so" PYTHONMALLOC=malloc
preloaded="$("$CXX" -print-file-name="$runtime") $("$CXX" -print-file-name=libstdc++.so)"
exec env LD_PRELOAD="$preloaded" python -m pytest --capture=sys "$@"  # what kills it must be seen
