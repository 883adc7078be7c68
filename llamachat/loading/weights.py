"""Weights from a checkpoint to a model that runs: all of them, or one process's part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llamachat import hardware
from llamachat.checkpoints import open_checkpoint
from llamachat.checkpoints.lora import AdaptedCheckpoint, adapter_named
from llamachat.errors import DamagedFileError, LlamachatError
from llamachat.kernels.backends import Backend, make
from llamachat.library.forecast import source_of
from llamachat.loading.plan import Plan, out_of_memory
from llamachat.quant.form import Form
from llamachat.quant.recipe import Quantizer, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.kernels import Kernels
    from llamachat.kernels.peers import Peers
    from llamachat.model import LanguageModel
    from llamachat.model.sharding import Part
    from llamachat.quant.tensor import QTensor

T = TypeVar("T")


@contextmanager
def naming(plan: Plan, available: int) -> Iterator[None]:
    """Errors of a load inside name the checkpoint; `available` bytes are to be had for it.

    Raises:
        DamagedFileError: a weight is missing, or is none.
        WillNotFitError: there is no memory for it.
    """
    hardware.return_large_blocks()
    path = plan.checkpoint.path
    try:
        yield
    except DamagedFileError as error:
        if str(path) in error.message:
            raise
        raise DamagedFileError(f"{path}: {error.message}", hint=error.hint) from error
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        raise out_of_memory(plan, available) from error


def load_weights(plan: Plan, threads: int) -> LanguageModel:
    """The whole model."""
    from llamachat.model.chatglm import load_chatglm
    from llamachat.model.decoder import load_decoder

    config = plan.checkpoint.config.at_context(plan.ctx_size)
    load = load_decoder if config.prefix is None else load_chatglm
    kernels = _kernels(plan, threads)
    return load(config, _tensors(plan, kernels, None), kernels)


def load_together(
    plan: Plan, threads: int, lora: Sequence[str | Path], peers: Peers
) -> LanguageModel:
    """The first process's part of the model, after the others were told to load theirs.

    Raises:
        LlamachatError: one of the others could not load its part.
    """
    number = peers.number()
    part = _part(plan, peers)
    peers.tell_dropped()  # before memory is needed for another one
    peers.tell({"load": number, **_task(plan, threads, lora)})
    try:
        return together(peers, lambda: _load_part(plan, threads, part, peers, number))
    except BaseException:
        peers.drop(number)
        raise


def load_told(task: Mapping[str, Any], device: str, peers: Peers) -> LanguageModel:
    """Another process's part."""
    plan = _plan(task, device)
    with naming(plan, hardware.shared_memory_bytes(plan.backend.gpu)[1]):
        return _load_part(plan, task["threads"], _part(plan, peers), peers, task["load"])


def together(peers: Peers, load: Callable[[], T]) -> T:
    """What `load` returns, once it has returned in all processes.

    Raises:
        LlamachatError: it failed here, or elsewhere.
    """
    failure: BaseException | None = None
    try:
        loaded = load()
    except BaseException as error:  # noqa: BLE001  # the others wait for word of it
        failure = error
    others: list[Mapping[str, Any]] = []
    for rank in range(peers.size):
        if rank == peers.rank:
            peers.tell(_told(failure), source=rank)
        else:
            heard = peers.hear(rank)
            assert isinstance(heard, Mapping)
            others.append(heard)
    if failure is not None:
        raise failure
    for told in filter(None, others):
        kinds = {kind.exit_code: kind for kind in LlamachatError.__subclasses__()}
        raise kinds.get(told["exit_code"], LlamachatError)(told["message"], hint=told["hint"])
    return loaded


def _told(failure: BaseException | None) -> dict[str, Any]:
    if failure is None:
        return {}
    return {
        "message": str(failure),
        "hint": getattr(failure, "hint", None),
        "exit_code": getattr(failure, "exit_code", 1),
    }


def _task(plan: Plan, threads: int, lora: Sequence[str | Path]) -> dict[str, Any]:
    """A plan as JSON has it."""
    recipe = plan.recipe and {**asdict(plan.recipe), "forms": {
        name: asdict(form) for name, form in plan.recipe.forms.items()
    }}  # fmt: skip
    return {
        "path": str(plan.checkpoint.path),
        "lora": [*map(str, lora)],
        "backend": plan.backend.name,
        "isa": plan.backend.isa,
        "quantize": plan.quantize,
        "recipe": recipe,
        "dtype": plan.dtype,
        "kv_cache": plan.kv_cache,
        "ctx_size": plan.ctx_size,
        "ranks": plan.ranks,
        "threads": threads,
    }


def _plan(task: Mapping[str, Any], device: str) -> Plan:
    checkpoint = open_checkpoint(Path(task["path"]))
    for name in task["lora"]:
        checkpoint = AdaptedCheckpoint(checkpoint, adapter_named(name))
    recipe = task["recipe"]
    if recipe is not None:
        forms = {name: Form(**form) for name, form in recipe["forms"].items()}
        recipe = Recipe(**{**recipe, "forms": forms})
    return Plan(
        checkpoint=checkpoint,
        backend=Backend(task["backend"], "as in the first process", None, task["isa"], device),
        recipe=recipe,
        source=source_of(checkpoint),
        **{it: task[it] for it in ("quantize", "dtype", "kv_cache", "ctx_size", "ranks")},
    )


def _part(plan: Plan, peers: Peers) -> Part:
    from llamachat.model.sharding import Part

    return Part(plan.checkpoint.config.at_context(plan.ctx_size), peers.rank, peers.size)


def _load_part(plan: Plan, threads: int, part: Part, peers: Peers, number: int) -> LanguageModel:
    from llamachat.kernels.sharded import Sharded
    from llamachat.model.decoder import load_decoder

    backend = _kernels(plan, threads)
    config = part.config
    kernels = Sharded(backend, peers, number, config.dim, part.head_rows, config.vocab_size)
    return load_decoder(part.own, _tensors(plan, backend, part), kernels)


def _kernels(plan: Plan, threads: int) -> Kernels:
    import torch

    return make(plan.backend, threads, getattr(torch, plan.dtype))


def _tensors(
    plan: Plan, kernels: Kernels, part: Part | None
) -> Iterator[tuple[str, Tensor | QTensor]]:
    """Weights as the backend shall pack them: matrices that are not quantized in `plan.dtype`.

    Of a part as little as possible is quantized.
    """
    import torch

    dtype = getattr(torch, plan.dtype)
    forms = plan.recipe.forms if plan.recipe else {}
    quantizer = Quantizer(plan.recipe, kernels.quantize) if plan.recipe else None

    def ready(name: str, stored: Tensor | QTensor) -> Tensor | QTensor:
        tensor = quantizer(name, stored) if quantizer else stored
        if not isinstance(tensor, torch.Tensor):
            return tensor if plan.quantize != "none" else tensor.dequantize().to(dtype)
        return tensor.to(dtype) if tensor.ndim == 2 else tensor

    for name, stored in plan.checkpoint.tensors(kernels.place):
        if part is None:
            yield name, ready(name, stored)
        elif name in forms and not part.cuts_between_groups(name, stored.shape[1], forms[name]):
            yield from part.cut(name, ready(name, stored))
        else:
            for own, cut in part.cut(name, stored):
                yield own, ready(name, cut)
