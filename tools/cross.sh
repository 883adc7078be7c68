#!/usr/bin/env bash
# Builds the native kernels for 64-bit ARM and runs the programs in tests/native under qemu.
set -euo pipefail
cd "$(dirname "$0")/.."

cmake -S . -B build/aarch64 -DLLAMACHAT_SELFTEST=ON \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER="${CXX:-aarch64-linux-gnu-g++}" -DCMAKE_EXE_LINKER_FLAGS=-static \
  -DCMAKE_CROSSCOMPILING_EMULATOR="${EMULATOR:-qemu-aarch64}"
cmake --build build/aarch64 --parallel "$(nproc)"
ctest --test-dir build/aarch64 --output-on-failure --parallel "$(nproc)"
