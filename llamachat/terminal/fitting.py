"""What `fit` found, for people to read, and what to say where a model will not fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from llamachat.errors import WillNotFitError
from llamachat.library.fit import Choice, Device, Fit
from llamachat.library.fit_json import as_json
from llamachat.library.forecast import GIB
from llamachat.terminal.output import write
from llamachat.terminal.tables import told_params, write_columns, write_json

KIB = 1024
SERVED = "take a smaller model, or one that another machine serves (docs/scaling.md)"
FLAGS = ("--ctx-size", "--quantize", "--device")  # that a way out may name
_HEADINGS = (
    "form", "weights", "pass", "loading", "context", "keys, values", "peak", "longest", "tok/s",
    "verdict",
)  # fmt: skip
_LEAST = ("pass", "loading", "keys, values", "longest", "weights")


def show_fit(fit: Fit, *, json: bool) -> None:
    """The whole answer, on stdout."""
    if json:
        write_json(as_json(fit))
        return
    source, disk, config = fit.source, fit.disk, fit.source.config
    size = f"{told_params(config.n_params)} parameters, {source.form}, {_gib(source.size_bytes)}"
    token_kib = fit.best.forecast.token_bytes / KIB
    to_fetch = (
        f"{_gib(disk.download_bytes)} to fetch" if disk.download_bytes else "nothing to fetch"
    )
    write(f"{fit.name}: {size}\n")
    write(f"context: up to {config.longest_context:,} tokens, {token_kib:,.0f} KiB each\n")
    write(f"disk: {to_fetch}, {_gib(disk.free_bytes)} free\n")
    for device in fit.devices:
        free = f"{device.free_bytes / GIB:,.2f} of {_gib(device.total_bytes)} free"
        write(f"\n{_title(device)}: {free}\n")
        rows = [_HEADINGS, *(_cells(choice) for choice in device.choices)]
        write_columns(rows, right=_HEADINGS[1:-1], least=_LEAST)
    if fit.together is not None:
        each = _gib(fit.together.choice.peak_bytes)
        write(f"\n{fit.together.n_gpus} GPUs together: {each} on each; {_command(fit)}\n")
    write("\n" + summary(fit, between="\n") + "\n")
    if fit.best.tok_per_s is None:
        write("tok/s: `llamachat doctor` measures what that needs, once\n")


def require(fit: Fit) -> None:
    """Raises WillNotFitError where the verdict is "no": exit code 5."""
    if fit.verdict == "no":
        raise refusal(fit)


def summary(fit: Fit, *, between: str = "; ") -> str:
    """The verdict, and what it is about."""
    best, device = fit.best, fit.device
    on = f" on {_title(device)}" if len(fit.devices) > 1 else ""
    if fit.verdict == "no":
        return f"verdict: no{on}"  # why, the error says
    speed = f", at most {best.tok_per_s:,.1f} tok/s" if best.tok_per_s else ""
    why = f": {_reason(best, device)}" if fit.verdict == "tight" else ""
    return (
        f"verdict: {fit.verdict}{on}{why}{between}{_form(best, fit)} with {best.ctx_size:,} tokens"
        f" of context peaks at {_gib(best.peak_bytes)}{speed}"
    )


def refusal(fit: Fit, flags: Collection[str] = FLAGS) -> WillNotFitError:
    """Why not, and a way out by one of the `flags` of the command, or of `chat`."""
    best, device, disk = fit.best, fit.device, fit.disk
    if not disk.has_room:
        return WillNotFitError(
            f"{fit.name} takes {_gib(disk.download_bytes)} of disk, {_gib(disk.free_bytes)} are"
            f" free in {disk.folder}",
            hint="make room, or name another folder in HF_HUB_CACHE",
        )
    kind = "memory" if device.id == "cpu" else f"memory on {_title(device)}"
    is_short = device.id != "cpu" and fit.together is None and device.n_needed > 1
    several = f"; {device.n_needed} such GPUs would hold it together" if is_short else ""
    return WillNotFitError(
        f"{fit.name} needs {_gib(best.peak_bytes)} of {kind} as {_form(best, fit)} with"
        f" {best.ctx_size:,} tokens of context, {_gib(device.free_bytes)} are free{several}",
        hint=next(_ways_out(fit, flags), SERVED),
    )


def _command(fit: Fit) -> str:
    """What runs it on several GPUs."""
    assert fit.together is not None
    form = fit.together.choice.quantize
    quantize = "" if form == fit.source.form.lower() else f" --quantize {form}"
    return f"llamachat chat -m {fit.name} --tensor-parallel {fit.together.n_gpus}{quantize}"


def _ways_out(fit: Fit, flags: Collection[str]) -> Iterator[str]:
    def would_fit(flag: str, value: object) -> str:
        return f"{'' if flag in flags else 'chat '}{flag} {value} would fit"

    if fit.together is not None:
        yield f"{fit.together.n_gpus} GPUs hold it together: {_command(fit)}"
    longest, device = fit.best.longest_context, fit.device
    if 0 < longest < fit.best.ctx_size:
        yield would_fit("--ctx-size", longest)
    for choice in device.choices:
        if choice.verdict != "no":
            yield would_fit("--quantize", choice.quantize)
    for other in fit.devices:
        if other.best.verdict != "no":
            yield would_fit("--device", other.id)


def _title(device: Device) -> str:
    return device.name if device.id == "cpu" else f"{device.name} ({device.id})"


def _form(choice: Choice, fit: Fit) -> str:
    return fit.source.form if choice.quantize == "none" else choice.quantize


def _reason(choice: Choice, device: Device) -> str:
    if choice.longest_context <= choice.ctx_size:
        return "memory bounds the context"
    return f"{_gib(device.free_bytes - choice.peak_bytes)} stay free"


def _cells(choice: Choice) -> tuple[str, ...]:
    found = choice.forecast
    sizes = (
        found.weight_bytes,
        found.activation_bytes,
        found.program_bytes + found.loading_bytes,
        found.context_bytes(choice.ctx_size),
        choice.peak_bytes,
    )
    weights, activations, loading, context, peak = (_gib(size) for size in sizes)
    speed = f"{choice.tok_per_s:,.1f}" if choice.tok_per_s else "?"
    return (
        choice.quantize, weights, activations, loading, f"{choice.ctx_size:,}", context, peak,
        f"{choice.longest_context:,}", speed, choice.verdict,
    )  # fmt: skip


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:,.2f} GiB"
