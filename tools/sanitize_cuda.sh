#!/usr/bin/env bash
# Runs small tests of the CUDA kernels under NVIDIA's compute-sanitizer:
#   tools/sanitize_cuda.sh memcheck|racecheck|initcheck|synccheck [arguments for pytest]
set -euo pipefail
cd "$(dirname "$0")/.."

# Products and attention in all forms, what is fused with them, prompts, and quantizing.
small="whole_row or stack_under or norm_stands or gate_gives or looked_up or prompts_multiply"
small+=" or norms_and_gates or attention_over or quantizing_errs or quantizing_on"
case "${1:-}" in
  memcheck | initcheck | synccheck) ;;
  racecheck) small="norm_stands or gate_gives or (attention_over and not 20)" ;;
  *) sed -n '2,3p' "$0" >&2; exit 2 ;;
esac
tool="$1"
shift

# Bindings look for functions that an older driver does not have: that is no error of a kernel. Barriers
# in shared memory are not found by the tool where NVRTC compiled them. Torch's flash attention (2.11)
# writes past its list of sums where it splits keys, but never past what torch's allocator rounds it up to.
sanitized() {
  compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 1 --num-cuda-barriers 64 \
    --kernel-name-exclude kernel_substring=pytorch_flash python3 -m pytest -m gpu -k "$@"
}

# Every tensor has an allocation of its own, so that what lies behind it is out of bounds. A pass as one
# kernel runs when all of it is noted, over memory that only the allocator keeps; that a lane speaks for
# its warp is more than racecheck can follow.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  sanitized "$small" "$@" tests/test_kernels_cuda.py tests/test_loading_cuda.py
LLAMACHAT_TEST_ARRIVING=32 \
  sanitized "own_give and (1-mixed or 3-mixed)" "$@" tests/test_kernels_cuda_step.py
