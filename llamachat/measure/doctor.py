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
from llamachat.library.store import Installed, installed
from llamachat.measure import rates

PACKAGES = (
    "llamachat", "torch", "bitsandbytes", "huggingface-hub", "numpy", "prompt-toolkit", "rich",
    "safetensors", "sentencepiece", "tiktoken", "tokenizers", "typer",
)  # fmt: skip
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
    is_native = backend["backend"] in ("native", "cuda")
    value_bytes = None if is_native else {"bfloat16": 2, "float32": 4}[backend["dtype"]]
    bandwidth = round(rates.read_bandwidth(threads, backend["device"]), 1)
    models = installed()
    return {
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "gpus": [asdict(gpu) for gpu in hardware.gpus()],
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
        "measured": {"read_bandwidth_gb_per_s": bandwidth} | _products(threads),
        "decode_tok_per_s_at_most": _limits(models, bandwidth, value_bytes),
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
    return {
        "device": chosen.device,
        "backend": chosen.name,
        "backend_reason": chosen.reason,
        "native_instruction_sets": list(instruction_sets()) if chosen.name == "native" else [],
        "dtype": hardware.fast_dtype(),
    }


def _products(threads: int) -> dict[str, int | None]:
    int8 = rates.int8_gop_per_s(threads)
    return {
        "int8_gop_per_s": None if int8 is None else round(int8),
        "bfloat16_gop_per_s": round(rates.bfloat16_gop_per_s(threads)),
    }


def _limits(models: list[Installed], bandwidth: float, value_bytes: int | None) -> dict[str, float]:
    """Tokens a second that the bandwidth (GB/s) allows, by model."""
    sizes = {model.name: _bytes_per_token(model, value_bytes) for model in models}
    return {name: round(bandwidth * rates.GIGA / size, 1) for name, size in sizes.items() if size}


def _bytes_per_token(model: Installed, value_bytes: int | None) -> float | None:
    """What a step reads, by the size of the files or of each value; None if they are damaged."""
    try:
        checkpoint = open_checkpoint(model.path)
        config = checkpoint.config
    except LlamachatError:
        return None
    looked_up = 0 if config.tied else config.vocab_size * config.dim  # one row is read of it
    stored = sum(file.stat().st_size for file in checkpoint.files) / config.n_params
    return (config.n_params - looked_up) * (value_bytes or stored)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
