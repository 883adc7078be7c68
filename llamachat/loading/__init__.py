"""From a name or a path to a `Model` that answers: the one place where all rooms below meet."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llamachat import hardware, settings
from llamachat.architecture import ModelConfig
from llamachat.checkpoints import Checkpoint, open_checkpoint
from llamachat.engine.parameters import PARAMETERS, PENALTIES
from llamachat.kernels.backends import Backend, choose
from llamachat.library import loads
from llamachat.library.catalog import find
from llamachat.library.fit import Wanted
from llamachat.library.store import Located, resolve
from llamachat.loading.adapters import adapted
from llamachat.loading.device import Meter, compile_kernels, start_gpu
from llamachat.loading.plan import Plan, make_plan
from llamachat.loading.ranks import check, end, leading
from llamachat.loading.weights import load_together, load_weights, naming
from llamachat.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from llamachat.engine.decoding import Decoding
    from llamachat.engine.engine import Engine
    from llamachat.model import LanguageModel

COST_OF_TORCH = "torch computes instead, at about a tenth of the speed"


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model: ids in, ids out, and what is needed to talk to it.

    Attributes:
        name: as it was asked for.
        located: where it came from.
        path: the file or folder that weights were read from: the one that was located, or what
            `llamachat quantize` made of it.
        config: its architecture.
        tokenizer: text to ids and back.
        engine: the decoder and its cache; one conversation at a time.
        chat_template: the Jinja source, or None for a base model.
        sampling: sampling defaults by where they come from, the strongest first.
        dtype: what weights are that are not quantized.
        threads: CPU threads in use.
        device: "cpu" or "cuda:N".
        backend: what computes: "native", "cuda", "reference" or "bitsandbytes".
        quantize: the form in which weights are run: of their file ("q4_1"...), or the one that they
            were brought to; or "none".
        ranks: processes that run it together.
    """

    name: str
    located: Located
    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    engine: Engine
    chat_template: str | None
    sampling: tuple[tuple[str, Mapping[str, Any]], ...]
    dtype: str
    threads: int
    device: str
    backend: str
    quantize: str
    ranks: int = 1

    @property
    def form(self) -> str:
        """What weights are while they are multiplied: "q4_1", "bfloat16"..."""
        return self.dtype if self.quantize == "none" else self.quantize

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """(T, V) float32 of every position; no cache is left behind."""
        return self.engine.logits(ids)

    def iter_logits(self, ids: Sequence[int], first: int = 0) -> Iterator[torch.Tensor]:
        """The rows of `logits` from position `first` on, a few at a time."""
        return self.engine.iter_logits(ids, first)

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

    def close(self) -> None:
        """Give its memory back to the system; it answers no more."""
        import torch

        self.engine.close()
        gc.collect()
        hardware.release_memory()
        if self.device != "cpu":
            torch.cuda.empty_cache()


def load(
    name: str | Path | None = None,
    *,
    lora: Sequence[str | Path] = (),
    quantize: str = "auto",
    device: str = "auto",
    backend: str = "auto",
    dtype: str = "auto",
    kv_cache: str = "auto",
    ctx_size: int | None = None,
    threads: int | None = None,
    tensor_parallel: int = 1,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    force: bool = False,
    notice: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] | None = None,
    lost: Callable[[str], NoReturn] = end,
) -> Model:
    """Find a model, fetch it if need be, and load it.

    Args:
        name: an alias, a Hub repository id, or a path; default as on the command line.
        lora: adapters to merge in, in order: folders as PEFT saves them, PATH or PATH:SCALE.
        quantize: "auto" runs quantized weights in the form of their file and brings float ones to
            int8, or int4 where int8 would not fit, unless `dtype` is named; "none" unpacks them to
            `dtype`; the others are forms to bring them to (`llamachat quantize` keeps the result).
        device: "auto", "cpu", "cuda" or "cuda:N"; auto is a GPU where one can be used.
        backend: "auto", "native", "cuda", "reference" or "bitsandbytes"; auto is cuda on a GPU,
            native on a CPU where its library was built.
        dtype: "auto", "float32" or "bfloat16", of weights that are not quantized; auto is the
            file's own, or what is faster on this CPU where weights are unpacked.
        kv_cache: "auto", "f32", "bf16" or "int8"; auto is bf16, or f32 beside float32 weights.
        ctx_size: tokens of context; default the model's own, capped by memory.
        threads: CPU threads of a process; default every physical core that this one may use.
        tensor_parallel: processes that share the weights (GPUs from `device` on), or torchrun's.
        revision: of a Hub repository.
        token: for the Hub; default the one that its own tools use.
        offline: never use the network.
        force: load what is forecast not to fit in memory, too.
        notice: told, in one line each, what the user should know.
        progress: told bytes done and bytes in all while downloading.
        lost: called from a thread with one line once such a process has ended; ends this one, too.

    Raises:
        LlamachatError: see `llamachat.errors`; each has an exit code and a hint.
    """
    Wanted(ctx_size, quantize, device, backend, dtype, kv_cache)  # refuses what is not known
    chosen, name = _backend(backend, device, notice), str(name or settings.default_model())
    located = resolve(
        name, revision=revision, token=token, offline=offline, notice=notice, progress=progress
    )
    checkpoint = _opened(name, located, lora, notice)
    check(tensor_parallel, chosen, checkpoint.config)
    if chosen.gpu is not None:
        start_gpu(chosen.gpu)
    plan = make_plan(
        checkpoint, chosen, quantize=quantize, dtype=dtype, kv_cache=kv_cache, ctx_size=ctx_size,
        ranks=tensor_parallel, notice=notice, force=force,
    )  # fmt: skip
    threads = threads or settings.omp_threads() or hardware.usable_cores() // plan.ranks or 1
    read = partial(_decoder, plan, threads, lora if plan.checkpoint is checkpoint else (), lost)
    tokenizer = checkpoint.tokenizer()
    return Model(
        name=name,
        located=located,
        path=plan.checkpoint.path,
        config=checkpoint.config,
        tokenizer=tokenizer,
        engine=_engine(plan, tokenizer, located, read, notice),
        chat_template=checkpoint.chat_template,
        sampling=_sampling(checkpoint, located),
        dtype=plan.dtype,
        threads=threads,
        device=chosen.device,
        backend=chosen.name,
        quantize=plan.quantize,
        ranks=plan.ranks,
    )


def _opened(
    name: str, located: Located, lora: Sequence[str | Path], notice: Callable[[str], None]
) -> Checkpoint:
    checkpoint = adapted(open_checkpoint(located.path), lora, located, notice)
    if checkpoint.left_out is not None:
        notice(f"{name}: {checkpoint.left_out}")
    return checkpoint


def _backend(asked: str, device: str, notice: Callable[[str], None]) -> Backend:
    chosen = choose(asked, device)
    if chosen.missing:
        notice(f"no native kernels ({chosen.missing}): {COST_OF_TORCH}")
    return chosen


def _decoder(
    plan: Plan, threads: int, lora: Sequence[str | Path], lost: Callable[[str], NoReturn]
) -> LanguageModel:
    if plan.ranks == 1:
        return load_weights(plan, threads)
    return load_together(plan, threads, lora, leading(plan.ranks, plan.backend.gpu, lost))


def _engine(
    plan: Plan,
    tokenizer: Tokenizer,
    located: Located,
    load: Callable[[], LanguageModel],
    notice: Callable[[str], None],
) -> Engine:
    """The engine; what loading it took is kept beside what was forecast."""
    import llamachat.kernels.native  # noqa: F401  # what they import is not the model's
    from llamachat.engine.engine import CHUNK, GPU_CHUNK, Engine

    meter = Meter(plan)
    with naming(plan, meter.available_bytes):
        decoder = load()
        hardware.release_memory()  # what tensors took while they were read and packed
        engine = Engine(
            decoder,
            ctx_size=plan.ctx_size,
            stop_ids=tokenizer.stop_ids,
            n_ids=tokenizer.vocab_size,
            kv_cache=plan.kv_cache,
            chunk=CHUNK if plan.backend.gpu is None else GPU_CHUNK,
        )
    compile_kernels(engine, notice)
    loads.keep(located.path, plan.quantize, plan.forecast.loading_bytes, meter.peak_bytes)
    return engine


def _sampling(
    checkpoint: Checkpoint, located: Located
) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    entry = find(located.alias) if located.alias else None
    return (
        ("generation_config.json", _suggested(checkpoint.generation)),
        ("catalog", dict(entry.defaults) if entry else {}),
    )


def _suggested(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The decoding values of a generation config; one that says not to sample is greedy."""
    greedy = generation.get("do_sample") is False
    names = PENALTIES if greedy else PARAMETERS
    values: dict[str, Any] = {
        name: value
        for name in names
        if isinstance(value := generation.get(name), int | float) and not isinstance(value, bool)
    }
    bad_words = generation.get("bad_words_ids")
    if isinstance(bad_words, list) and all(_are_ids(word) for word in bad_words):
        values["bad_words"] = tuple(map(tuple, bad_words))
    return values | ({"temperature": 0.0} if greedy else {})


def _are_ids(word: Any) -> bool:
    return (
        isinstance(word, list)
        and bool(word)
        and all(type(token) is int and token >= 0 for token in word)
    )
