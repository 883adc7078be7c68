#!/usr/bin/env bash
# Runs small tests of the CUDA kernels under NVIDIA's compute-sanitizer:
#   tools/sanitize_cuda.sh memcheck|racecheck|initcheck|synccheck [arguments for pytest]
set -euo pipefail
cd "$(dirname "$0")/.."

# Products and attention in all forms, what is fused with them, and quantizing.
small="whole_row or stack_under or norm_stands or gate_gives or looked_up or prompts_multiply"
small+=" or attention_over or quantizing_errs or quantizing_on"
case "${1:-}" in
  memcheck | initcheck | synccheck) ;;
  racecheck) small="norm_stands or gate_gives or (attention_over and not 20)" ;;
  *) sed -n '2,3p' "$0" >&2; exit 2 ;;
esac
tool="$1"
shift

# Every tensor has an allocation of its own, so that what lies behind it is out of bounds. Bindings
# look for functions that an older driver does not have: that is no error of a kernel.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
exec compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 1 \
  python3 -m pytest -m gpu -k "$small" "$@" tests/test_kernels_cuda.py tests/test_loading_cuda.py
