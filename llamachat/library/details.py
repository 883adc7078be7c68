"""What `list` tells of a model on disk: from the catalog, else its config, else its header."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from llamachat import settings
from llamachat.architecture import ModelConfig, config_from_hf
from llamachat.errors import LlamachatError
from llamachat.library import catalog, hub_cache
from llamachat.library.catalog import Entry
from llamachat.library.results import NAME, newest
from llamachat.library.store import Installed

# How GGUF files are named after what most tensors are.
KIND = re.compile(r"(IQ4_NL|IQ4_XS|Q\d_K|Q\d_[01]|BF16|F16|F32)", re.IGNORECASE)
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class Details:
    """Facts of one model; None where they are not known.

    Attributes:
        family: whose architecture it follows.
        params: parameters.
        form: how its weights are stored: "BF16", "Q4_1", "INT4".
        context: tokens it was trained to attend to.
        licence: SPDX identifier or name.
        gated: whether the Hub asks for a consent.
        quality: its newest evaluation, as `eval` gave it.
    """

    family: str | None
    params: int | None
    form: str | None
    context: int | None
    licence: str | None
    gated: bool | None
    quality: Mapping[str, Any] | None


def details(model: Installed) -> Details:
    """The facts of one model; what cannot be read is left out."""
    name = hub_cache.parse(model.made_from or model.name)
    entry = catalog.find(model.alias or model.made_from or "") or (
        catalog.of_repo(name.repo) if name else None
    )
    config, form = _read(model, entry)
    return Details(
        family=entry.family if entry else None,
        params=entry.params if entry else config.n_params if config else None,
        form=model.form or form,
        context=entry.context if entry else config.max_seq_len if config else None,
        licence=entry.licence if entry else None,
        gated=entry.gated if entry else None,
        quality=_quality(model.path),
    )


def file_kind(path: PurePath) -> str | None:
    """The type of most tensors, by the name of a GGUF file."""
    found = KIND.findall(path.name)
    return str(found[-1]).upper() if found else None


def _read(model: Installed, entry: Entry | None) -> tuple[ModelConfig | None, str | None]:
    """Config and form, by as little reading as will do: numpy alone takes as long as all else."""
    with suppress(OSError, ValueError, LlamachatError, AttributeError):
        if (model.path / "config.json").is_file():
            values = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
            told = str(values.get("torch_dtype") or values.get("dtype"))
            return config_from_hf(values), _DTYPES.get(told)
        if entry is not None or model.form is not None:
            return None, file_kind(model.path)
        from llamachat.checkpoints import open_checkpoint

        checkpoint = open_checkpoint(model.path)
        return checkpoint.config, checkpoint.form
    return None, file_kind(model.path)


def _quality(path: Path) -> Mapping[str, Any] | None:
    kept = settings.cache_dir()[0] / "eval"
    if not (path / NAME).exists() and not any(kept.glob(f"{glob.escape(path.name)}-*.jsonl")):
        return None
    return next(iter(newest(path, 1)), None)
