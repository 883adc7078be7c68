"""From a model to a folder with its weights quantized: once, and resumed where it was stopped."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamachat import hardware, settings
from llamachat.checkpoints import Checkpoint, open_checkpoint
from llamachat.checkpoints.folder_writer import is_free
from llamachat.checkpoints.names import iter_weights
from llamachat.checkpoints.quantized import QuantizedCheckpoint, is_quantized, sha256_of
from llamachat.checkpoints.quantized_writer import QuantizedWriter, partial_of, weight_files
from llamachat.checkpoints.stored import FLOATS
from llamachat.errors import DamagedFileError, TransferError, UsageError
from llamachat.kernels.backends import choose, make
from llamachat.library import Notice
from llamachat.library.quantized import folder_for, identity, is_cached, locked
from llamachat.library.store import Located
from llamachat.quant.form import BITSANDBYTES, FORM_NAMES, GROUP_SIZES, FormName
from llamachat.quant.recipe import VERSION, Quantizer, Recipe, recipe
from llamachat.quant.tensor import QTensor

MB = 1e6
_BLOCK_VALUES = 1 << 20  # compared at a time: the sum is the same for any number of threads

Progress = Callable[[str, int, int], None]  # what is done, bytes of the source done, and in all


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a model shall be made to.

    Raises:
        UsageError: there is no such form.
    """

    form: str
    group_size: int | None = None
    nested: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORM_NAMES:
            raise UsageError(f"--to is {self.form!r}, expected one of {', '.join(FORM_NAMES)}")
        if self.group_size is not None and self.form in BITSANDBYTES:
            raise UsageError(f"--group-size is for int8 and int4, not {self.form}")
        if self.group_size not in (None, *GROUP_SIZES):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise UsageError(f"--group-size is {self.group_size}, expected one of {sizes}")
        if self.nested and self.form not in ("nf4", "fp4"):
            raise UsageError(f"--double-quant is for nf4 and fp4, not {self.form}")

    def recipe(self, source: Checkpoint) -> Recipe:
        """How each weight of a model is stored."""
        name: FormName = next(form for form in FORM_NAMES if form == self.form)
        shapes = ((weight.hf, weight.shape) for weight in iter_weights(source.config))
        group_size = self.group_size or GROUP_SIZES[0]
        return recipe(name, shapes, group_size=group_size, nested=self.nested)


def quantize(
    located: Located,
    wanted: Wanted,
    *,
    name: str,
    folder: Path | None = None,
    threads: int | None = None,
    force: bool = False,
    notice: Notice,
    progress: Progress,
) -> Path:
    """Quantize a model that is on disk, unless that was done before.

    Args:
        located: the model.
        wanted: what it shall be made to.
        name: what people call it.
        folder: where it shall be; by default in the cache.
        threads: default every physical core that this process may use.
        force: do it again.
        notice: told, in one line, what people should know.
        progress: told how far it is.

    Returns:
        the folder.

    Raises:
        UsageError: `folder` holds something else.
        TransferError: the disk is full or cannot be written; what is done is kept.
        DamagedFileError: the source is damaged or changes, or the folder is damaged.
    """
    source = open_checkpoint(located.path)
    if source.left_out is not None:
        notice(f"{name}: {source.left_out}")
    job = _Job(located, name, source, wanted.recipe(source))
    if folder is None and not force and job.is_pointless:
        return located.path
    folder = folder.absolute() if folder else folder_for(source, job.recipe.key)
    if not force and job.is_done(folder):
        return folder
    with locked(folder, notice):
        if not force and job.is_done(folder):
            return folder
        _require_free(folder, force=force)
        job.require_space(folder)
        if source.form not in FLOATS:
            notice(
                f"{name} is {source.form}: what that lost stays lost, and {job.recipe.name} loses "
                "more; better quantize the original floats"
            )
        threads = threads or settings.omp_threads() or hardware.usable_cores()
        began = time.monotonic()
        job.run(folder, threads, notice, progress)
        made = QuantizedCheckpoint(folder)
        notice(
            f"{made.size_bytes / MB:,.1f} MB, {made.bits_per_weight:.2f} bits per weight, "
            f"{made.share_of_source:.0%} of {name}, {time.monotonic() - began:.1f} s"
        )
    return folder


def relative_error(source: Tensor | QTensor, quantized: QTensor, pool: ThreadPoolExecutor) -> float:
    """Root of the mean squared error, relative to that of the source: 4 digits, 0 for 0 / 0."""
    rows, columns = quantized.shape
    step = max(1, _BLOCK_VALUES // columns)

    def sums(start: int) -> tuple[float, float]:
        block = torch.arange(start, min(start + step, rows))
        exact = source.rows(block).dequantize() if isinstance(source, QTensor) else source[block]
        exact = exact.float()
        wrong = quantized.rows(block).dequantize().sub_(exact)
        return float(wrong.square_().sum()), float(exact.square().sum())

    errors, squares = zip(*pool.map(sums, range(0, rows, step)), strict=True)
    error, square = math.fsum(errors), math.fsum(squares)
    return float(f"{math.sqrt(error / square) if error else 0.0:.4g}")


@dataclass(frozen=True)
class _Job:
    """One source and one recipe."""

    located: Located
    name: str
    source: Checkpoint
    recipe: Recipe

    @cached_property
    def origin(self) -> dict[str, Any]:
        """`Facts.source`, but for the sha256 of its files."""
        return {
            "name": self.name,
            "path": str(self.located.path),
            "repo": self.located.repo,
            "revision": self.located.revision,
            "form": self.source.form,
            "size_bytes": sum(file.stat().st_size for file in self.source.files),
            "identity": identity(self.source),
        }

    @property
    def is_pointless(self) -> bool:
        """Whether the source is what this recipe makes."""
        source = self.source
        return isinstance(source, QuantizedCheckpoint) and (
            source.facts.recipe["key"] == self.recipe.key
        )

    def is_done(self, folder: Path) -> bool:
        """Whether the folder is what this job would make."""
        if not is_quantized(folder):
            return False
        facts = QuantizedCheckpoint(folder).facts
        found = (facts.recipe["key"], facts.source.get("identity"))
        return found == (self.recipe.key, self.origin["identity"])

    def require_space(self, folder: Path) -> None:
        """Compare what the weights will take, roughly, with what is free.

        Raises:
            TransferError: it is not enough.
        """
        needed, floats = 0, getattr(torch, FLOATS.get(self.source.form, "float32")).itemsize * 8
        for weight in iter_weights(self.source.config):
            form = self.recipe.forms.get(weight.hf)
            bits = form.bits_per_weight if form else floats
            needed += int(math.prod(weight.shape) * bits / 8)
        partial = partial_of(folder)
        there = sum(file.stat().st_size for file in partial.glob("*")) if partial.is_dir() else 0
        disk = next(path for path in partial.parents if path.exists())
        free = shutil.disk_usage(disk).free
        if free < needed - there:
            raise TransferError(
                f"{disk}: {free:,} bytes are free, {self.recipe.name} needs {needed - there:,}",
                hint="make room, or name another folder with -o",
            )

    def run(self, folder: Path, threads: int, notice: Notice, progress: Progress) -> None:
        """Quantize weight by weight."""
        kernels = make(choose(), threads, torch.bfloat16)
        quantizer = Quantizer(self.recipe, kernels.quantize)
        sizes = {it.hf: math.prod(it.shape) for it in iter_weights(self.source.config)}
        in_all, total = sum(sizes.values()), self.origin["size_bytes"]
        seen = 0
        job = {"recipe": self.recipe.key, "source": self.origin}
        with (
            QuantizedWriter(folder, self.source, job) as writer,
            ThreadPoolExecutor(threads) as pool,
            _hashing(weight_files(self.source)) as sha256,
        ):
            done = writer.done
            if done:
                notice(f"going on after {len(done)} of {len(sizes)} weights")
            for count, (name, weight) in enumerate(self.source.tensors(), 1):
                if name not in done:
                    quantized, error = quantizer(name, weight), None
                    if isinstance(quantized, QTensor) and quantized is not weight:
                        error = relative_error(weight, quantized, pool)
                    writer.append(name, quantized, error)
                if name in sizes:  # not the divisors of frequencies, which come last
                    seen += sizes[name]
                    progress(f"{count} of {len(sizes)} weights", total * seen // in_all, total)
            self._require_unchanged()
            described = {
                "name": self.recipe.name,
                "group_size": self.recipe.group_size,
                "nested": self.recipe.nested,
                "version": VERSION,
                "key": self.recipe.key,
            }
            writer.finish(described, {**self.origin, "sha256": sha256()})

    def _require_unchanged(self) -> None:
        if identity(self.source) != self.origin["identity"]:
            raise DamagedFileError(
                f"{self.source.path} was changed while it was read",
                hint="run the command again once nothing writes it",
            )


def _require_free(folder: Path, *, force: bool) -> None:
    """Refuse to replace what was not made here."""
    if is_free(folder):
        return
    if not (is_quantized(folder) or is_cached(folder)):
        raise UsageError(f"{folder} is there and is not empty", hint="name another with -o")
    if not force:
        raise UsageError(
            f"{folder} holds another quantized model, or an older state of this one",
            hint="--force replaces it",
        )


@contextmanager
def _hashing(files: Sequence[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """Computes the sha256 of files beside other work; the Hub's cache names its blobs by it."""
    pool = ThreadPoolExecutor(1)
    found = {file.name: pool.submit(_sha256, file.resolve()) for file in files}
    try:
        yield lambda: {name: future.result() for name, future in found.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _sha256(file: Path) -> str:
    if len(file.name) == 64 and file.parent.name == "blobs":
        return file.name
    try:
        with file.open("rb") as stream:
            return sha256_of(stream)
    except OSError as error:
        raise TransferError(f"{file}: {error.strerror or error}") from error
