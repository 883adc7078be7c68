"""What this machine runs with, and how fast that can be."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

from llamachat import hardware, settings
from llamachat.checkpoints import open_checkpoint
from llamachat.errors import LlamachatError
from llamachat.kernels import backends
from llamachat.kernels.abi import instruction_sets
from llamachat.kernels.backends import gpu_of
from llamachat.library import loads
from llamachat.library.forecast import PACKED, Way, forecast, own_dtype, source_of
from llamachat.library.store import Installed, installed
from llamachat.measure import rates

PACKAGES = (
    "llamachat", "torch", "bitsandbytes", "huggingface-hub", "numpy", "prompt-toolkit", "rich",
    "safetensors", "sentencepiece", "tiktoken", "tokenizers", "typer",
)  # fmt: skip
LEAST_BYTES = 100_000_000  # of a load whose forecast is judged
FEATURES = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """The findings, ready for JSON. Takes a second or two.

    `decode_tok_per_s_at_most` has the models on disk: the measured bandwidth by the bytes that a
    token reads, without context. No decoder can be faster; how close one comes, `bench` tells.
    """
    total, available = hardware.memory_bytes()
    cache, notice = settings.cache_dir()
    threads, threads_reason = _threads()
    backend = _backend()
    gpu = gpu_of(backend["device"])
    bandwidth = round(rates.read_bandwidth(threads, backend["device"]), 1)
    hardware.keep_bandwidth(backend["device_name"], bandwidth)
    models = installed()
    return {
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "gpus": [asdict(gpu) for gpu in hardware.gpus()],
        "gpu_driver": hardware.gpu_driver() if hardware.gpus() else None,
        "cpu": hardware.cpu_name(),
        **_instruction_sets(),
        "threads": threads,
        "threads_reason": threads_reason,
        "memory_bytes": {"total": total, "available": available},
        **backend,
        "folders": {
            "cache": str(cache),
            "hub_cache": str(settings.hub_cache_dir()),
            "config": str(settings.config_path()),
        },
        "notices": [notice] if notice else [],
        "models": [model.name for model in models],
        "measured": {"read_bandwidth_gb_per_s": bandwidth}
        | _share_of_limit(gpu, bandwidth)
        | _products(threads),
        "decode_tok_per_s_at_most": _limits(models, bandwidth, backend["backend"]),
        "memory_forecasts": _forecasts(),
    }


def _instruction_sets() -> dict[str, Any]:
    sets = hardware.instruction_sets()
    return {
        "instruction_sets": [name for name in FEATURES if name in sets],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]  # torch
    }


def _threads() -> tuple[int, str]:
    """How many, and why."""
    if threads := settings.omp_threads():
        return threads, "OMP_NUM_THREADS"
    limits = (f"{name} {count}" for name, count in hardware.core_limits().items())
    return hardware.usable_cores(), f"the least of {', '.join(limits)}"


def _backend() -> dict[str, Any]:
    """What `load` chooses and why, and the native instruction sets of this CPU, best first."""
    chosen = backends.choose(device="auto")
    gpu = chosen.gpu
    return {
        "device": chosen.device,
        "device_name": hardware.cpu_name() if gpu is None else hardware.gpus()[gpu].name,
        "backend": chosen.name,
        "backend_reason": chosen.reason,
        "kernel_table": _kernel_table() if chosen.name == "cuda" else None,
        "native_instruction_sets": list(instruction_sets()) if chosen.name == "native" else [],
        "dtype": hardware.fast_dtype(),
    }


def _kernel_table() -> str:
    """Where the sizes of CUDA kernels come from."""
    from llamachat.kernels.cuda.products import TUNED_ON

    return f"shipped, measured on an {TUNED_ON}"


def _share_of_limit(gpu: int | None, bandwidth: float) -> dict[str, float]:
    """What the memory of a GPU could do, and how much of that was measured."""
    limit = 0.0 if gpu is None else hardware.gpus()[gpu].gb_per_s
    if not limit:
        return {}
    return {"bandwidth_limit_gb_per_s": limit, "bandwidth_share": round(bandwidth / limit, 3)}


def _products(threads: int) -> dict[str, int | None]:
    int8 = rates.int8_gop_per_s(threads)
    return {
        "int8_gop_per_s": None if int8 is None else round(int8),
        "bfloat16_gop_per_s": round(rates.bfloat16_gop_per_s(threads)),
    }


def _limits(models: list[Installed], bandwidth: float, backend: str) -> dict[str, float]:
    """Tokens a second that the bandwidth (GB/s) allows, by model."""
    sizes = {model.name: _bytes_per_token(model, backend) for model in models}
    return {name: round(bandwidth * rates.GIGA / size, 1) for name, size in sizes.items() if size}


def _bytes_per_token(model: Installed, backend: str) -> int | None:
    """What a step reads of weights in the form of the file; None if they are damaged."""
    try:
        source = source_of(open_checkpoint(model.path))
    except LlamachatError:
        return None
    is_packed = backend in PACKED and not source.is_float
    form = source.form.lower() if is_packed else "none"
    return forecast(source, Way(backend, form, own_dtype(source.form, backend))).step_bytes


def _forecasts() -> dict[str, Any]:
    """How well the memory of the last loads was forecast: of those that are no trifles."""
    errors = [load.error for load in loads.newest() if load.measured_bytes >= LEAST_BYTES]
    if not errors:
        return {"loads": 0}
    mean = sum(errors) / len(errors)
    worst = max(errors, key=abs)
    return {
        "loads": len(errors),
        "mean_error_percent": round(100 * mean, 1),
        "worst_error_percent": round(100 * worst, 1),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
