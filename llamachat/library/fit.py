"""Whether a model will fit, before it is loaded or even fetched. Torch-free.

On the Hub the list of files, the config and the first kilobytes of one file of weights are read.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamachat import hardware, settings
from llamachat.checkpoints import open_checkpoint
from llamachat.errors import UsageError
from llamachat.kernels.backends import choose
from llamachat.library import Notice, catalog, store
from llamachat.library.forecast import (
    GPU_CONTEXT,
    LEAST_CONTEXT,
    Forecast,
    Source,
    Way,
    forecast,
    own_dtype,
    source_of,
    weight_recipe,
)
from llamachat.library.repository import Repository
from llamachat.library.sources import remote_source, repository_source
from llamachat.quant.form import FORM_NAMES

Verdict = Literal["fits", "tight", "no"]
TIGHT_SHARE = 0.9  # of the memory that is free
_GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Choice:
    """A model in one form on one device.

    Attributes:
        quantize: the form: "int4"..., the file's own, or "none".
        forecast: its memory.
        ctx_size: tokens of context: what was asked for, else the model's own or what memory leaves.
        peak_bytes: the most that is resident, with all of that context.
        longest_context: tokens that memory leaves room for, at most the model's own.
        verdict: "tight": it runs with less context than the model's own, or leaves little free.
        tok_per_s: of decoding, at most, with an empty context; None where bandwidth is unknown.
    """

    quantize: str
    forecast: Forecast
    ctx_size: int
    peak_bytes: int
    longest_context: int
    verdict: Verdict
    tok_per_s: float | None


@dataclass(frozen=True, slots=True)
class Device:
    """One device: bytes of memory in all and free, and what each form comes to there."""

    name: str
    total_bytes: int
    free_bytes: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes to fetch, and what is free where they go."""

    folder: Path
    download_bytes: int
    free_bytes: int

    @property
    def has_room(self) -> bool:
        """Whether all of it can be fetched."""
        return self.download_bytes <= self.free_bytes


@dataclass(frozen=True, slots=True)
class Fit:
    """The answer for one model.

    Attributes:
        name: as it was asked for.
        source: its architecture and form.
        disk: for what is not on disk yet.
        devices: the CPU first.
        best: on the CPU: what was asked for, else what `load` would take.
    """

    name: str
    source: Source
    disk: Disk
    devices: tuple[Device, ...]
    best: Choice

    @property
    def verdict(self) -> Verdict:
        """Of the best choice; "no" where the disk is too small."""
        return self.best.verdict if self.disk.has_room else "no"


def examine(
    name: str,
    *,
    ctx_size: int | None = None,
    quantize: str = "auto",
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    notice: Notice = lambda _message: None,
) -> Fit:
    """Forecast memory, disk and speed of a model.

    Args:
        name: an alias, a Hub repository, or a path.
        ctx_size: tokens of context; default the model's own, or as many as fit.
        quantize: "auto", "none", or a form.
        revision: of a Hub repository.
        token: for the Hub.
        offline: look on disk only.
        notice: told, in one line, what is waited for.

    Raises:
        UsageError: a form or a context that the model does not take.
        LlamachatError: it is unknown, may not be had, or is damaged.
    """
    catalog.check_is_whole(store.expanded(name))
    if found := store.locate(name, revision=revision):
        source, to_fetch = source_of(open_checkpoint(found.path)), 0
    else:
        source, to_fetch = remote_source(
            name, revision=revision, token=token, offline=offline, notice=notice
        )
    return _examined(name, source, to_fetch, ctx_size, quantize)


def examine_repository(
    repository: Repository, *, ctx_size: int | None = None, quantize: str = "auto"
) -> Fit:
    """The same of what the Hub has."""
    source, to_fetch = repository_source(repository), repository.missing_bytes()
    return _examined(str(repository.name), source, to_fetch, ctx_size, quantize)


def _examined(name: str, source: Source, to_fetch: int, ctx_size: int | None, quantize: str) -> Fit:
    if quantize not in ("auto", "none", *FORM_NAMES):
        raise UsageError(f"quantize is {quantize!r}, expected auto, none, {', '.join(FORM_NAMES)}")
    limit = source.config.longest_context
    if ctx_size is not None and not 0 < ctx_size <= limit:
        raise UsageError(f"--ctx-size is {ctx_size}, the model takes 1 to {limit} tokens")
    cpu = on_cpu(source, ctx_size, quantize)
    return Fit(
        name=name,
        source=source,
        disk=_disk(to_fetch),
        devices=(cpu, *(_on_gpu(source, ctx_size, index) for index in range(len(hardware.gpus())))),
        best=best_of(source, cpu.choices, quantize),
    )


def judge(
    source: Source,
    way: Way,
    *,
    ctx_size: int | None,
    free_bytes: int,
    default_context: int,
    bandwidth: float | None = None,
    resident_bytes: int | None = None,
) -> Choice:
    """One form on one device; `resident_bytes` are those of the program there."""
    found = forecast(source, way)
    resident = found.program_bytes if resident_bytes is None else resident_bytes
    wanted = ctx_size or default_context
    room = found.fitting_context(free_bytes - resident)
    held = wanted if ctx_size else max(min(wanted, room), min(wanted, LEAST_CONTEXT))
    peak = resident + found.peak_bytes(held)
    verdict: Verdict = "fits"
    if room < held or peak > free_bytes:
        verdict = "no"
    elif held < wanted or peak > TIGHT_SHARE * free_bytes:
        verdict = "tight"
    return Choice(
        quantize=way.quantize,
        forecast=found,
        ctx_size=held,
        peak_bytes=peak,
        longest_context=min(room, source.config.longest_context),
        verdict=verdict,
        tok_per_s=bandwidth * _GIGA / found.step_bytes if bandwidth else None,
    )


def on_cpu(source: Source, ctx_size: int | None, quantize: str) -> Device:
    """The CPU and what each form comes to there, the file's own first."""
    total, free = hardware.memory_bytes()
    backend = choose().name
    bandwidth = hardware.kept_bandwidth()
    choices = tuple(
        judge(
            source,
            way_of(source, backend, form),
            ctx_size=ctx_size,
            free_bytes=free,
            default_context=source.config.max_seq_len,
            bandwidth=bandwidth,
        )
        for form in _forms(source, quantize)
    )
    return Device(f"CPU, {backend} kernels", total, free, choices)


def _on_gpu(source: Source, ctx_size: int | None, index: int) -> Device:
    total, free = hardware.gpu_memory_bytes(index)
    choices = tuple(
        judge(
            source,
            way_of(source, "cuda", form),
            ctx_size=ctx_size,
            free_bytes=free,
            default_context=min(source.config.max_seq_len, GPU_CONTEXT),
            resident_bytes=hardware.CUDA_CONTEXT_BYTES,
        )
        for form in _forms(source, "auto")
    )
    return Device(hardware.gpus()[index].name, total, free, choices)


def way_of(source: Source, backend: str, form: str) -> Way:
    """How weights are run in a form."""
    dtype = own_dtype(source.form, backend)
    is_exact = form == "none" and dtype == "float32"
    recipe = weight_recipe(source.config, form) if form in FORM_NAMES and (
        form != source.form.lower()
    ) else None  # fmt: skip
    return Way(backend, form, dtype, recipe, "f32" if is_exact else "bf16")


def _forms(source: Source, asked: str) -> Sequence[str]:
    """What to tell of: the file's own form first."""
    own = "none" if source.is_float else source.form.lower()
    also = () if asked == "auto" else (asked,)
    return tuple(dict.fromkeys((own, "int8", "int4", "nf4", "none", *also)))


def best_of(source: Source, choices: Sequence[Choice], asked: str) -> Choice:
    """What was asked for, else as `load` chooses: the file's own form, or int8, then int4."""
    named = {choice.quantize: choice for choice in choices}
    if asked != "auto":
        return named[asked]
    first, second = named["int8" if source.is_float else source.form.lower()], named["int4"]
    return second if first.verdict == "no" and second.verdict != "no" else first


def _disk(download_bytes: int) -> Disk:
    folder = settings.hub_cache_dir()
    there = next((it for it in (folder, *folder.parents) if it.exists()), Path())
    return Disk(folder, download_bytes, shutil.disk_usage(there).free)


def as_json(fit: Fit) -> Mapping[str, object]:
    """All of it, ready for JSON."""
    return {
        "name": fit.name,
        "verdict": fit.verdict,
        "params": fit.source.config.n_params,
        "form": fit.source.form,
        "size_bytes": fit.source.size_bytes,
        "disk": {
            "folder": str(fit.disk.folder),
            "download_bytes": fit.disk.download_bytes,
            "free_bytes": fit.disk.free_bytes,
        },
        "best": _choice_json(fit.best),
        "devices": [
            {
                "name": device.name,
                "total_bytes": device.total_bytes,
                "free_bytes": device.free_bytes,
                "choices": [_choice_json(choice) for choice in device.choices],
            }
            for device in fit.devices
        ],
    }


def _choice_json(choice: Choice) -> Mapping[str, object]:
    found = choice.forecast
    return {
        "quantize": choice.quantize,
        "verdict": choice.verdict,
        "weight_bytes": found.weight_bytes,
        "kv_bytes_per_token": found.token_bytes,
        "ctx_size": choice.ctx_size,
        "kv_bytes": found.context_bytes(choice.ctx_size),
        "activation_bytes": found.activation_bytes,
        "loading_bytes": found.program_bytes + found.loading_bytes,
        "peak_bytes": choice.peak_bytes,
        "longest_context": choice.longest_context,
        "tok_per_s_at_most": choice.tok_per_s and round(choice.tok_per_s, 1),
    }
