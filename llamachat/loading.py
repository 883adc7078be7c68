"""From a name or a path to a `Model` that answers: the one place where all rooms below meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamachat import hardware, settings
from llamachat.architecture import ModelConfig
from llamachat.checkpoints import Checkpoint, open_checkpoint
from llamachat.errors import DamagedFileError, UsageError, WillNotFitError
from llamachat.library.catalog import find
from llamachat.library.store import Located, resolve
from llamachat.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from llamachat.engine.decoding import Decoding
    from llamachat.engine.engine import Engine

MEMORY_SHARE = 0.8  # of what is available: the rest is for activations and for other programs
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model: ids in, ids out, and what is needed to talk to it.

    Attributes:
        name: as it was asked for.
        located: where it came from.
        config: its architecture.
        tokenizer: text to ids and back.
        engine: the decoder and its cache; one conversation at a time.
        chat_template: the Jinja source, or None for a base model.
        sampling: sampling defaults by where they come from, the strongest first.
        dtype: what matrices are computed in.
        threads: CPU threads in use.
    """

    name: str
    located: Located
    config: ModelConfig
    tokenizer: Tokenizer
    engine: Engine
    chat_template: str | None
    sampling: tuple[tuple[str, Mapping[str, float]], ...]
    dtype: str
    threads: int
    backend: str = "reference"
    quantize: str = "none"

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """(T, V) float32 of every position; no cache is left behind."""
        return self.engine.logits(ids)

    def generate(
        self,
        ids: Sequence[int],
        strategy: Decoding | None = None,
        max_new_tokens: int = 32,
        *,
        stop_ids: Sequence[int] | None = None,
    ) -> Iterator[int]:
        """The ids that follow `ids`, as they are chosen.

        Args:
            ids: the whole prompt, BOS included.
            strategy: default greedy.
            max_new_tokens: at most so many.
            stop_ids: default the model's own; () for none.
        """
        from llamachat.engine.events import Token
        from llamachat.engine.strategies import Greedy

        events = self.engine.generate(
            ids,
            strategy or Greedy(),
            max_new_tokens=max_new_tokens,
            stop_ids=None if stop_ids is None else frozenset(stop_ids),
        )
        return (event.id for event in events if isinstance(event, Token))


def load(
    name: str | Path | None = None,
    *,
    quantize: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    ctx_size: int | None = None,
    threads: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    notice: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Find a model, fetch it if need be, and load it.

    Args:
        name: an alias, a Hub repository id, or a path; default as on the command line.
        quantize: "auto" or "none"; both compute in `dtype` from dequantized weights for now.
        device: "auto" or "cpu".
        dtype: "auto", "float32" or "bfloat16"; auto is the faster one on this CPU.
        ctx_size: tokens of context; default the model's own, capped by memory.
        threads: CPU threads; default every physical core that this process may use.
        revision: of a Hub repository.
        token: for the Hub; default the one that its own tools use.
        offline: never use the network.
        notice: told, in one line each, what the user should know.
        progress: told bytes done and bytes in all while downloading.

    Raises:
        LlamachatError: see `llamachat.errors`; each has an exit code and a hint.
    """
    _one_of("quantize", quantize, ("auto", "none"))
    _one_of("device", device, ("auto", "cpu"))
    name = str(name or settings.default_model())
    located = resolve(
        name, revision=revision, token=token, offline=offline, notice=notice, progress=progress
    )
    checkpoint = open_checkpoint(located.path)
    dtype = _dtype(dtype)
    threads = threads or settings.omp_threads() or hardware.usable_cores()
    context = _context(checkpoint.config, ctx_size, 2 if dtype == "bfloat16" else 4, notice)
    tokenizer = checkpoint.tokenizer()
    return Model(
        name=name,
        located=located,
        config=checkpoint.config,
        tokenizer=tokenizer,
        engine=_engine(checkpoint, tokenizer, dtype, threads, context),
        chat_template=checkpoint.chat_template,
        sampling=_sampling(checkpoint, located),
        dtype=dtype,
        threads=threads,
    )


def _engine(
    checkpoint: Checkpoint, tokenizer: Tokenizer, dtype: str, threads: int, ctx_size: int
) -> Engine:
    import torch

    from llamachat.engine.engine import Engine
    from llamachat.kernels.reference import Reference
    from llamachat.model.decoder import load_decoder

    torch.set_num_threads(threads)
    kernels = Reference("cpu", getattr(torch, dtype))
    try:
        decoder = load_decoder(checkpoint.config, checkpoint.tensors(), kernels)
    except DamagedFileError as error:
        if str(checkpoint.path) in error.message:
            raise
        raise DamagedFileError(f"{checkpoint.path}: {error.message}", hint=error.hint) from error
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        raise WillNotFitError(f"{checkpoint.path}: out of memory while loading") from error
    return Engine(
        decoder, ctx_size=ctx_size, stop_ids=tokenizer.stop_ids, n_ids=tokenizer.vocab_size
    )


def _dtype(asked: str) -> str:
    _one_of("dtype", asked, ("auto", "float32", "bfloat16"))
    if asked != "auto":
        return asked
    return "bfloat16" if hardware.multiplies_bfloat16() else "float32"


def _context(
    config: ModelConfig, asked: int | None, value_bytes: int, notice: Callable[[str], None]
) -> int:
    """Tokens of context: what was asked for if it fits, else as many as do."""
    if asked is not None and not 0 < asked <= config.max_seq_len:
        raise UsageError(
            f"--ctx-size is {asked}, the model takes 1 to {config.max_seq_len} tokens",
        )
    _, available = hardware.memory_bytes()
    twice = config.vocab_size * config.dim if config.tied else 0  # to look up, and as the head
    weights = (config.n_params + twice) * value_bytes
    token = config.cached_values_per_token * value_bytes
    left = int(available * MEMORY_SHARE) - weights
    fits = max(0, left // token)
    wanted = asked or config.max_seq_len
    needed = (weights + token * wanted) / GIB
    if fits < min(wanted, 512) or (asked and fits < asked):
        raise WillNotFitError(
            f"needs {needed:.1f} GiB with {wanted} tokens of context, "
            f"{available * MEMORY_SHARE / GIB:.1f} GiB of memory is to be had",
            hint=f"--ctx-size {fits} would fit" if fits >= 512 else "take a smaller model",
        )
    if fits < wanted:
        notice(f"context: {fits} of {wanted} tokens, for memory; --ctx-size changes it")
    return min(wanted, fits)


def _sampling(
    checkpoint: Checkpoint, located: Located
) -> tuple[tuple[str, Mapping[str, float]], ...]:
    entry = find(located.alias) if located.alias else None
    return (
        ("generation_config.json", _numbers(checkpoint.generation)),
        ("catalog", dict(entry.defaults) if entry else {}),
    )


def _numbers(generation: Mapping[str, Any]) -> dict[str, float]:
    """The sampling values of a generation config; one that says not to sample is greedy."""
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    names = ("temperature", "top_k", "top_p", "min_p")
    values = {name: generation.get(name) for name in names}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
