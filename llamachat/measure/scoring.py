"""A text scored by a model as it is run, beside the reference that it should be like."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from functools import cache
from typing import Any

import torch

import llamachat
from llamachat.checkpoints import open_checkpoint
from llamachat.errors import WillNotFitError
from llamachat.loading import Model, load
from llamachat.measure.evaluate import Estimate, Figures, evaluate, windows
from llamachat.measure.request import Request

Notice = Callable[[str], None]


def score(
    request: Request,
    text: str,
    *,
    status: Notice = lambda _: None,
    notice: Notice = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Yield after each window of a text the result so far, ready for JSON.

    Args:
        request: what to measure.
        text: all of it; one newline at its end is not scored.
        status: told what is going on.
        notice: told what the user should know, each thing once.

    Raises:
        LlamachatError: a model cannot be loaded, or the text is too short for a window.
    """
    notice = cache(notice)  # the reference would say the same
    status(f"{request.model}: loading")
    model = _model(request, notice)
    chunks = windows(
        model.tokenizer,
        text.removesuffix("\n"),
        size=request.ctx_size,
        at_most=request.chunks,
    )
    status(f"{request.reference}: loading")
    reference = _reference(request, notice)
    torch.set_num_threads(model.threads)  # native kernels left it one, and take turns with it
    facts = {
        **_facts(model),
        "ctx_size": request.ctx_size,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "version": llamachat.__version__,
    }
    against = None if reference is None else _facts(reference)
    status(f"{request.model}: 0 of {len(chunks)} windows")
    began = time.monotonic()
    for done, figures in enumerate(evaluate(model, chunks, reference=reference), 1):
        left_s = (time.monotonic() - began) / done * (len(chunks) - done)
        status(
            f"{request.model}: {done} of {len(chunks)} windows, "
            f"perplexity {figures.perplexity.value:.4g}, {left_s:.0f} s left (Ctrl-C ends it)"
        )
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        yield {**facts, "date": date, "chunks": done, **_flat(figures, against)}


def _model(request: Request, notice: Notice) -> Model:
    return load(
        request.model,
        quantize=request.quantize,
        kv_cache=request.kv_cache,
        backend=request.backend,
        dtype=request.dtype,
        ctx_size=request.ctx_size,
        threads=request.threads,
        tensor_parallel=request.tensor_parallel,
        force=request.force,
        notice=notice,
    )


def _reference(request: Request, notice: Notice) -> Model | None:
    """The nearest to exact that memory has room for."""
    name = request.reference
    if name is None:
        return None

    def unpacked(backend: str = "auto", dtype: str = "auto", *, force: bool = False) -> Model:
        return load(
            name,
            quantize="none",
            backend=backend,
            dtype=dtype,
            kv_cache="f32",
            ctx_size=request.ctx_size,
            threads=request.threads,
            force=force,
            notice=notice,
        )

    try:
        return unpacked(backend="reference", dtype="float32")
    except WillNotFitError:
        model = unpacked(force=request.force)
    notice(f"{name}: no room for float32, so the reference has its weights in {model.dtype}")
    return model


def _facts(model: Model) -> dict[str, Any]:
    """A model, and how it is run.

    Its size is that of the files that were read; bits per weight are of all weights as they are
    multiplied, with scales and norms; unknown where several processes have a part each.
    """
    files = open_checkpoint(model.path).files
    return {
        "model": model.name,
        "path": str(model.path),
        "revision": model.located.revision,
        "quantize": model.quantize,
        "backend": model.backend,
        "dtype": model.dtype,
        "kv_cache": model.engine.kv_cache,
        "size_bytes": sum(file.stat().st_size for file in files),
        "bits_per_weight": _bits_per_weight(model),
    }


def _bits_per_weight(model: Model) -> float | None:
    return None if model.ranks > 1 else 8 * _weight_bytes(model) / model.config.n_params


def _weight_bytes(model: Model) -> int:
    read, decoder = model.engine.bytes_per_token(0), model.engine.decoder
    if model.config.tied:
        return read
    table, n_rows = decoder.kernels.n_bytes(decoder.embedding), model.config.vocab_size
    return read + table - table // n_rows  # a pass reads but one row


def _flat(figures: Figures, against: dict[str, Any] | None) -> dict[str, Any]:
    """Figures by the names that results have; JSON knows no NaN."""
    found = {**_estimate("perplexity", figures.perplexity), "tokens": figures.tokens}
    if (far := figures.divergence) is None:
        return found
    kl = {name: None if math.isnan(it) else it for name, it in asdict(far.kl).items()}
    return {
        **found,
        "against": {**(against or {}), **_estimate("perplexity", far.reference)},
        "perplexity_ratio": _estimate("value", far.ratio),
        "kl": kl,
        "rms_dp_percent": far.rms_dp_percent,
        "top1_agreement": far.top1_agreement,
    }


def _estimate(name: str, found: Estimate) -> dict[str, float | None]:
    return {name: found.value, "stderr": None if math.isnan(found.stderr) else found.stderr}
