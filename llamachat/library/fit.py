"""Whether a model will fit, before it is loaded or even fetched. Torch-free.

On the Hub the list of files, the config and the first kilobytes of one file of weights are read.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llamachat import hardware, settings
from llamachat.checkpoints import open_checkpoint
from llamachat.errors import UsageError
from llamachat.kernels.backends import Backend, check_gpus, choose, lacking
from llamachat.library import Notice, catalog, store
from llamachat.library.forecast import (
    CACHE_BYTES,
    GPU_CONTEXT,
    LEAST_CONTEXT,
    MEMORY_SHARE,
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
class Wanted:
    """How a model shall be run, in the words of `load`.

    Raises:
        UsageError: one of them is not known. Of backend and device `choose` knows.
    """

    ctx_size: int | None = None
    quantize: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    dtype: str = "auto"
    kv_cache: str = "auto"
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("quantize", self.quantize, ("none", *FORM_NAMES)),
            ("dtype", self.dtype, ("float32", "bfloat16")),
            ("kv_cache", self.kv_cache, tuple(CACHE_BYTES)),
        ):
            if value not in ("auto", *allowed):
                expected = ", ".join(("auto", *allowed))
                raise UsageError(f"{name} is {value!r}, expected one of {expected}")


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
    """One device, and what each form comes to there.

    Attributes:
        id: "cpu", or "cuda:N".
        name: as people know it.
        total_bytes: its memory.
        free_bytes: what of that is free.
        choices: the forms, the file's own first.
        best: of them what was asked for, else what `load` would take.
    """

    id: str
    name: str
    total_bytes: int
    free_bytes: int
    choices: tuple[Choice, ...]
    best: Choice

    @property
    def n_needed(self) -> int:
        """How many such devices would hold the best choice together; 0 where none has room."""
        resident = 0 if self.id == "cpu" else hardware.CUDA_CONTEXT_BYTES
        room = int((self.free_bytes - resident) * MEMORY_SHARE)
        needed = self.best.forecast.running_bytes(self.best.ctx_size)
        return math.ceil(needed / room) if room > 0 else 0


@dataclass(frozen=True, slots=True)
class Together:
    """Several GPUs that hold what one does not, and what it comes to on each of them."""

    n_gpus: int
    choice: Choice


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
        device: of them the one that was asked for, else the one that `load` would take.
        together: the fewest GPUs that hold it, where that takes more than were asked for; or None.
    """

    name: str
    source: Source
    disk: Disk
    devices: tuple[Device, ...]
    device: Device
    together: Together | None = None

    @property
    def best(self) -> Choice:
        """The best choice on the device."""
        return self.device.best

    @property
    def verdict(self) -> Verdict:
        """Of the best choice; "no" where the disk is too small."""
        return self.best.verdict if self.disk.has_room else "no"


def examine(
    name: str,
    wanted: Wanted | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    notice: Notice = lambda _message: None,
) -> Fit:
    """Forecast memory, disk and speed of a model, on the CPU and each GPU that can be used.

    Args:
        name: an alias, a Hub repository, or a path.
        wanted: how it shall be run; default as `load` has it.
        revision: of a Hub repository.
        token: for the Hub.
        offline: look on disk only.
        notice: told, in one line, what is waited for.

    Raises:
        UsageError: a form, a context or a device that cannot be had.
        LlamachatError: it is unknown, may not be had, or is damaged.
    """
    wanted = wanted or Wanted()
    backends = _backends(wanted)
    catalog.check_is_whole(store.expanded(name))
    if found := store.locate(name, revision=revision):
        source, to_fetch = source_of(open_checkpoint(found.path)), 0
    else:
        source, to_fetch = remote_source(
            name, revision=revision, token=token, offline=offline, notice=notice
        )
    gpus = range(len(hardware.gpus()) - wanted.tensor_parallel + 1)  # each the first of several
    usable = [choose("cuda", f"cuda:{index}") for index in gpus if not lacking(index)]
    return _examined(name, source, to_fetch, wanted, [*backends, *usable])


def examine_repository(repository: Repository, wanted: Wanted) -> Fit:
    """The same of what the Hub has, on the CPU and the device that is meant."""
    backends = _backends(wanted)
    source, to_fetch = repository_source(repository), repository.missing_bytes()
    return _examined(str(repository.name), source, to_fetch, wanted, backends)


def _backends(wanted: Wanted) -> list[Backend]:
    """What `load` would take, and what it would take on the CPU."""
    chosen = choose(wanted.backend, wanted.device)
    check_gpus(chosen, wanted.tensor_parallel)
    return [chosen] if chosen.gpu is None else [chosen, choose()]


def _examined(
    name: str, source: Source, to_fetch: int, wanted: Wanted, backends: Sequence[Backend]
) -> Fit:
    """On each device of `backends`, of which the first is the one that is meant."""
    limit = source.config.longest_context
    if wanted.ctx_size is not None and not 0 < wanted.ctx_size <= limit:
        raise UsageError(f"--ctx-size is {wanted.ctx_size}, the model takes 1 to {limit} tokens")
    by_id = {backend.device: backend for backend in reversed(backends)}
    devices = {id: on_device(source, wanted, by_id[id]) for id in sorted(by_id)}
    return Fit(
        name=name,
        source=source,
        disk=_disk(to_fetch),
        devices=tuple(devices.values()),
        device=devices[backends[0].device],
        together=_together(source, wanted, backends[0]),
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
    ranks: int = 1,
) -> Choice:
    """One form on one device, of so many that share it; `resident_bytes`: of the program there."""
    found = forecast(source, way, ranks)
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


def on_device(source: Source, wanted: Wanted, backend: Backend) -> Device:
    """What each form comes to on the device of a backend, the file's own first.

    Where several share the model: on each of them.
    """
    gpu, config, ranks = backend.gpu, source.config, wanted.tensor_parallel
    total, free = hardware.shared_memory_bytes(gpu, ranks)
    processor = hardware.cpu_name() if gpu is None else hardware.gpus()[gpu].name
    choices = tuple(
        judge(
            source,
            way_of(source, backend.name, form, wanted),
            ctx_size=wanted.ctx_size,
            free_bytes=free,
            default_context=config.max_seq_len
            if gpu is None
            else min(config.max_seq_len, GPU_CONTEXT),
            bandwidth=hardware.kept_bandwidth(processor),
            resident_bytes=None if gpu is None else hardware.CUDA_CONTEXT_BYTES,
            ranks=ranks,
        )
        for form in _forms(source, wanted.quantize)
    )
    return Device(
        id=backend.device,
        name=f"CPU, {backend.name} kernels" if gpu is None else processor,
        total_bytes=total,
        free_bytes=free,
        choices=choices,
        best=best_of(source, choices, wanted, backend),
    )


def _together(source: Source, wanted: Wanted, backend: Backend) -> Together | None:
    """The fewest GPUs that hold it, from that of the backend on."""
    if backend.gpu is None or backend.name != "cuda":
        return None
    least, most = wanted.tensor_parallel, len(hardware.gpus()) - backend.gpu
    for n in range(least, most + 1):
        if not source.config.undivided(n):
            best = on_device(source, replace(wanted, tensor_parallel=n), backend).best
            if best.verdict != "no":
                return Together(n, best) if n > least else None
    return None


def way_of(source: Source, backend: str, form: str, wanted: Wanted | None = None) -> Way:
    """How weights are run in a form."""
    wanted = wanted or Wanted()
    dtype = own_dtype(source.form, backend) if wanted.dtype == "auto" else wanted.dtype
    is_exact = form == "none" and dtype == "float32"
    recipe = weight_recipe(source.config, form) if form in FORM_NAMES and (
        form != source.form.lower()
    ) else None  # fmt: skip
    kv_cache = "f32" if is_exact else "bf16"
    return Way(
        backend, form, dtype, recipe, kv_cache if wanted.kv_cache == "auto" else wanted.kv_cache
    )


def _forms(source: Source, asked: str) -> Sequence[str]:
    """What to tell of: the file's own form first."""
    own = "none" if source.is_float else source.form.lower()
    also = () if asked == "auto" else (asked,)
    return tuple(dict.fromkeys((own, "int8", "int4", "nf4", "none", *also)))


def best_of(source: Source, choices: Sequence[Choice], wanted: Wanted, backend: Backend) -> Choice:
    """What was asked for, else as `load` chooses: the file's own form, or int8, then int4."""
    named = {choice.quantize: choice for choice in choices}
    if wanted.quantize != "auto":
        return named[wanted.quantize]
    if backend.name == "reference" or (source.is_float and wanted.dtype != "auto"):
        return named["none"]
    if not source.is_float:
        return named[source.form.lower()]
    first, second = named["int8"], named["int4"]
    return second if first.verdict == "no" and second.verdict != "no" else first


def _disk(download_bytes: int) -> Disk:
    folder = settings.hub_cache_dir()
    there = next((it for it in (folder, *folder.parents) if it.exists()), Path())
    return Disk(folder, download_bytes, shutil.disk_usage(there).free)
