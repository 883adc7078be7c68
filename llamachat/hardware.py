"""What this machine has: instruction sets, cores, memory, GPUs. Torch-free."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
from contextlib import suppress
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p, create_string_buffer
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llamachat import settings

CUDA_CONTEXT_BYTES = 500 << 20  # that a process takes on a GPU beside its tensors
# cuda.h, CUdevice_attribute: compute capability; memory's clock and the width of its bus.
_ATTRIBUTES = (75, 76, 36, 37)
_MEASURED = "measured.json"
_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
_LARGE_BLOCK_BYTES = 4 << 20


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


def fast_dtype() -> str:
    """The name of the type that torch multiplies fastest on this CPU."""
    return "bfloat16" if multiplies_bfloat16() else "float32"


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
    return max(1, min(core_limits().values(), default=1))


def core_limits() -> dict[str, int]:
    """What bounds the cores that this process may use, by name, as far as the system tells."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = {
        "physical cores": psutil.cpu_count(logical=False),
        "allowed CPUs": allowed,
        "cgroup quota": _cgroup_cores(),
    }
    return {name: count for name, count in limits.items() if count}


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


def resident_bytes() -> int:
    """Memory of this process that is resident."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """The most memory that was resident: since the last reset, or where none works, ever."""
    if sys.platform == "win32":
        import psutil

        peak = int(psutil.Process().memory_info().peak_wset)
    else:
        import resource

        try:
            words = Path("/proc/self/status").read_text("utf-8", errors="replace").split()
            peak = int(words[words.index("VmHWM:") + 1]) * 1024
        except (OSError, ValueError):
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak


def reset_peak_memory() -> None:
    """Let `peak_memory_bytes` begin anew; only Linux can (proc(5), /proc/pid/clear_refs)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def release_memory() -> None:
    """Give freed memory back to the system; glibc keeps what small pieces were made of."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU, as its driver describes it.

    Attributes:
        name: as it calls itself.
        memory_bytes: all it has.
        capability: its compute capability, (9, 0) of an H100.
        gb_per_s: what its memory can do by its clock and width, or 0 where the driver does not say.
    """

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    gb_per_s: float = 0.0


@lru_cache(maxsize=1)
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that this process may use, in the driver's order (CUDA_VISIBLE_DEVICES counts)."""
    driver = _cuda_driver()
    count = c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(byref(count)):
        return ()
    return tuple(_gpu(driver, index) for index in range(count.value))


def gpu_memory_bytes(index: int) -> tuple[int, int]:
    """(total, free) bytes of memory; starts the context that torch will use as well."""
    driver, free, total = _cuda_driver(), c_size_t(), c_size_t()
    context = c_void_p()
    assert driver is not None
    if driver.cuDevicePrimaryCtxRetain(byref(context), index):
        return gpus()[index].memory_bytes, 0  # so little is left that not even this works
    driver.cuCtxPushCurrent_v2(context)
    driver.cuMemGetInfo_v2(byref(free), byref(total))
    driver.cuCtxPopCurrent_v2(byref(c_void_p()))
    return total.value, free.value


def shared_memory_bytes(gpu: int | None, ranks: int = 1) -> tuple[int, int]:
    """(total, free) bytes for each of `ranks` processes that share a model.

    Of the host's memory it is a part; of GPUs, from `gpu` on, each has one: that with least free.
    """
    if gpu is None:
        total, free = memory_bytes()
        return total // ranks, free // ranks
    return min(map(gpu_memory_bytes, range(gpu, gpu + ranks)), key=lambda found: found[1])


def _cuda_driver() -> ctypes.CDLL | None:
    """The driver's own library, which torch calls too."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    name, total = create_string_buffer(256), c_size_t()
    driver.cuDeviceGetName(c_char_p(ctypes.addressof(name)), len(name), index)
    driver.cuDeviceTotalMem_v2(byref(total), index)
    major, minor, clock_khz, width_bits = (
        _attribute(driver, number, index) for number in _ATTRIBUTES
    )
    gb_per_s = 2 * clock_khz * width_bits / 8e6  # data at both edges of the clock
    return Gpu(name.value.decode(errors="replace"), total.value, (major, minor), round(gb_per_s))


def _attribute(driver: ctypes.CDLL, number: int, index: int) -> int:
    value = c_int()
    driver.cuDeviceGetAttribute(byref(value), number, index)
    return value.value


def gpu_driver() -> str | None:
    """The version of NVIDIA's driver, as its management library tells it."""
    version = create_string_buffer(96)
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(version, len(version)):
            return None
        library.nvmlShutdown()
    except (OSError, AttributeError):
        return None
    return version.value.decode(errors="replace")


def return_large_blocks() -> None:
    """Let glibc give blocks of some MiB back as soon as they are freed.

    By itself it raises that bound to 32 MiB with the first large block that is freed, and weights
    that stream by leave hundreds of MB of holes (mallopt(3), M_MMAP_THRESHOLD).
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)


def keep_bandwidth(device: str, gb_per_s: float) -> None:
    """Remember at what rate a device, by its name, was measured to read memory, for forecasts."""
    with suppress(OSError):
        (settings.cache_dir()[0] / _MEASURED).write_text(
            json.dumps({**_kept(), device: {"read_bandwidth_gb_per_s": gb_per_s}}), encoding="utf-8"
        )


def kept_bandwidth(device: str) -> float | None:
    """GB/s that the memory of a device of that name was last measured to be read at, or None."""
    try:
        found = float(_kept()[device]["read_bandwidth_gb_per_s"])
    except (ValueError, LookupError, TypeError):
        return None
    return found if 0 < found < 1e6 else None


def _kept() -> dict[str, Any]:
    try:
        kept = json.loads((settings.cache_dir()[0] / _MEASURED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}
