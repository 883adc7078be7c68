"""What `fit` found, for people to read; and the question before what will not fit."""

from __future__ import annotations

import sys

from llamachat.errors import DamagedFileError, WillNotFitError
from llamachat.library.fit import Choice, Device, Fit, as_json, examine_repository
from llamachat.library.forecast import GIB
from llamachat.library.repository import Repository
from llamachat.terminal.failure import Notices, say
from llamachat.terminal.output import write
from llamachat.terminal.tables import write_columns, write_json

KIB = 1024
_HEADINGS = ("form", "weights", "context", "keys, values", "pass", "loading", "peak", "longest",
             "tok/s", "verdict")  # fmt: skip


def show_fit(fit: Fit, *, json: bool) -> None:
    """The whole answer, on stdout."""
    if json:
        write_json(as_json(fit))
        return
    source, disk = fit.source, fit.disk
    write(
        f"{fit.name}: {source.config.n_params / 1e9:.3g}B parameters, {source.form},"
        f" {_gib(source.size_bytes)}; a token of context takes"
        f" {fit.best.forecast.token_bytes / KIB:,.0f} KiB\n"
    )
    to_fetch = f"{_gib(disk.download_bytes)} to fetch" if disk.download_bytes else "on disk"
    write(f"disk: {to_fetch}, {_gib(disk.free_bytes)} free in {disk.folder}\n")
    for device in fit.devices:
        free = f"{_gib(device.free_bytes)} of {_gib(device.total_bytes)} are free"
        write(f"\n{device.name}: {free}\n")
        write_columns([_HEADINGS, *(_cells(choice) for choice in device.choices)])
    write(f"\n{_summary(fit)}\n")


def require(fit: Fit) -> None:
    """Raises WillNotFitError where the verdict is "no": exit code 5."""
    if fit.verdict == "no":
        raise _refusal(fit)


def consult(
    repository: Repository,
    *,
    force: bool,
    ctx_size: int | None = None,
    quantize: str = "auto",
    notices: Notices,
) -> None:
    """Say before a download how a model will fit; if it will not, go on only if told to.

    A disk that is too small is the download's to refuse.

    Raises:
        WillNotFitError: it will not, and nobody can be asked, or who was asked said no.
        LlamachatError: the Hub refuses, or the network failed.
    """
    try:
        fit = examine_repository(repository, ctx_size=ctx_size, quantize=quantize)
    except DamagedFileError as error:  # or no Llama
        notices(f"no forecast: {error.message}")
        return
    notices(_summary(fit))
    if fit.disk.has_room and fit.verdict == "no":
        confirm(_refusal(fit), force=force)


def confirm(error: WillNotFitError, *, force: bool) -> None:
    """Ask on a terminal whether to go on all the same.

    Raises:
        WillNotFitError: the error, where nobody can be asked, or the answer is no.
    """
    if force:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise WillNotFitError(error.message, hint=f"{error.hint}; --force goes on all the same")
    say(f"llamachat: {error.message}; go on all the same? [y/N]")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise error


def _summary(fit: Fit) -> str:
    """The verdict in one line."""
    best, cpu = fit.best, fit.devices[0]
    if fit.verdict == "no":
        return "verdict: no"  # why, the error says
    speed = f", at most {best.tok_per_s:,.1f} tok/s" if best.tok_per_s else ""
    why = f": {_reason(best, cpu)}" if fit.verdict == "tight" else ""
    return (
        f"verdict: {fit.verdict}{why}. As {_form(best, fit)} with {best.ctx_size:,} tokens of"
        f" context (up to {best.longest_context:,}) it peaks at {_gib(best.peak_bytes)}{speed}"
    )


def _form(choice: Choice, fit: Fit) -> str:
    return fit.source.form if choice.quantize == "none" else choice.quantize


def _reason(choice: Choice, device: Device) -> str:
    if choice.longest_context <= choice.ctx_size:
        return "memory bounds the context"
    return f"{_gib(device.free_bytes - choice.peak_bytes)} stay free"


def _refusal(fit: Fit) -> WillNotFitError:
    best, cpu, disk = fit.best, fit.devices[0], fit.disk
    message = (
        f"{fit.name} needs {_gib(best.peak_bytes)} of memory as {_form(best, fit)} with"
        f" {best.ctx_size:,} tokens of context, {_gib(cpu.free_bytes)} are free"
    )
    if not disk.has_room:
        message = (
            f"{fit.name} takes {_gib(disk.download_bytes)} of disk, {_gib(disk.free_bytes)} are"
            f" free in {disk.folder}"
        )
    return WillNotFitError(message, hint=_way_out(fit))


def _way_out(fit: Fit) -> str:
    if not fit.disk.has_room:
        return "make room, or name another folder in HF_HUB_CACHE"
    if fit.best.longest_context and fit.best.longest_context < fit.best.ctx_size:
        return f"--ctx-size {fit.best.longest_context} would fit"
    fitting = [it.quantize for it in fit.devices[0].choices if it.verdict != "no"]
    return f"--quantize {fitting[0]} would fit" if fitting else "take a smaller model"


def _cells(choice: Choice) -> tuple[str, ...]:
    found = choice.forecast
    return (
        choice.quantize,
        _gib(found.weight_bytes),
        f"{choice.ctx_size:,}",
        _gib(found.context_bytes(choice.ctx_size)),
        _gib(found.activation_bytes),
        _gib(found.program_bytes + found.loading_bytes),
        _gib(choice.peak_bytes),
        f"{choice.longest_context:,}",
        f"{choice.tok_per_s:,.1f}" if choice.tok_per_s else "?",
        choice.verdict,
    )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:,.2f} GiB"
