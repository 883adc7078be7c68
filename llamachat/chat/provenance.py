"""What a reply depends on beside what was said: the model's files, and how they are run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamachat.chat.remote import Server
from llamachat.quant.form import FORM_NAMES
from llamachat.quant.recipe import VERSION as RECIPE_VERSION

if TYPE_CHECKING:
    from llamachat.chat.templates import Template
    from llamachat.loading import Model

_EDGE_BYTES = 2**16  # read of each end of a file
_SUFFIXES = {".bin", ".gguf", ".json", ".model", ".pth", ".safetensors"}


def facts(model: Model | Server, template: Template, lora: Sequence[str] = ()) -> dict[str, Any]:
    """The model and how it is run, ready for JSON.

    Args:
        model: who answers.
        template: how the conversation is written for it.
        lora: adapters that were merged in, as they were named.
    """
    if isinstance(model, Server):
        return model.facts
    located = model.located
    source = getattr(template, "source", None)
    kernels = getattr(getattr(model.engine, "decoder", None), "kernels", None)
    return {
        "model": str(located.path) if located.source == "local" else model.name,
        "repo": located.repo,
        "revision": located.revision,
        "source": located.source,
        "files": fingerprint(model.path),
        "quantize": model.quantize,
        "recipe": RECIPE_VERSION if model.quantize in FORM_NAMES else None,
        "dtype": model.dtype,
        "kv_cache": model.engine.kv_cache,
        "backend": model.backend,
        "device": model.device,
        "instruction_set": getattr(kernels, "isa", None),
        "threads": model.threads,
        "ctx_size": model.engine.ctx_size,
        "lora": list(lora),
        "template": template.name,
        "template_sha256": hashlib.sha256(source.encode()).hexdigest() if source else None,
        "versions": {name: version(name) for name in ("llamachat", "torch")},
    }


def fingerprint(path: Path) -> str:
    """16 hexadecimal digits of a SHA-256 over the names, sizes and 64 KiB of each end of files.

    Of a folder those with weights, configuration and tokenizer count, in the order of their names.
    A change in the middle of a file that leaves its size alone is not seen.
    """
    digest = hashlib.sha256()
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in (it for it in inside if it == path or it.suffix in _SUFFIXES):
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            digest.update(stream.read(_EDGE_BYTES))
            stream.seek(max(0, size - _EDGE_BYTES))
            digest.update(stream.read(_EDGE_BYTES))
    return digest.hexdigest()[:16]
