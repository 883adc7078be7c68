"""What this machine has: instruction sets, cores, memory. Torch-free."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def instruction_sets() -> frozenset[str]:
    """The CPU's features in the kernel's spelling: "avx2", "avx512_bf16", "asimd", "bf16"..."""
    if platform.system() == "Linux":
        try:
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return frozenset()
        lines = (line.partition(":") for line in text.splitlines())
        return frozenset(
            word for key, _, value in lines if key.strip() in ("flags", "Features")
            for word in value.split()
        )  # fmt: skip
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return frozenset({"asimd"})
    return frozenset()


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions that multiply bfloat16 (elsewhere float32 is faster)."""
    return bool(instruction_sets() & {"avx512_bf16", "amx_bf16", "bf16"})


def cpu_name() -> str:
    """The processor as it calls itself."""
    if platform.system() == "Linux":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Physical cores that this process may use: affinity and the cgroup's quota count."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    physical = psutil.cpu_count(logical=False)
    counts = [count for count in (allowed, physical, _cgroup_cores()) if count]
    return max(1, min(counts)) if counts else 1


def _cgroup_cores() -> int | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None


def memory_bytes() -> tuple[int, int]:
    """(total, available) bytes of memory; a cgroup's limit counts, its file cache does not."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        statistics = (group / "memory.stat").read_text(encoding="ascii").split()
        used -= int(statistics[statistics.index("inactive_file") + 1])  # given back when needed
    except (OSError, ValueError):  # no cgroup, or "max"
        return total, available
    return min(total, limit), max(0, min(available, limit - used))
