"""What this machine runs with: versions, processor, memory, threads, backend."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from llamachat import hardware, settings
from llamachat.library.store import installed

PACKAGES = (
    "llamachat", "torch", "bitsandbytes", "huggingface-hub", "numpy", "prompt-toolkit", "rich",
    "safetensors", "sentencepiece", "tiktoken", "tokenizers", "typer",
)  # fmt: skip
FEATURES = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """The findings, ready for JSON. Takes the time of importing torch."""
    import torch

    total, available = hardware.memory_bytes()
    cache, notice = settings.cache_dir()
    sets = hardware.instruction_sets()
    return {
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "device": "cpu",
        "cpu": hardware.cpu_name(),
        "instruction_sets": [name for name in FEATURES if name in sets],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]  # torch
        "threads": settings.omp_threads() or hardware.usable_cores(),
        "memory_bytes": {"total": total, "available": available},
        "backend": "reference",
        "backend_reason": "plain torch; no other backend is part of this version",
        "dtype": "bfloat16" if hardware.multiplies_bfloat16() else "float32",
        "folders": {
            "cache": str(cache),
            "hub_cache": str(settings.hub_cache_dir()),
            "config": str(settings.config_path()),
        },
        "notices": [notice] if notice else [],
        "models": [model.name for model in installed()],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
