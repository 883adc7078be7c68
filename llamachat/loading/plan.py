"""How a checkpoint is run: in which form, by which backend, with how much context. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from llamachat import hardware
from llamachat.checkpoints import Checkpoint, open_checkpoint
from llamachat.checkpoints.overlay import changed_in
from llamachat.checkpoints.stored import FLOATS
from llamachat.errors import UsageError, WillNotFitError
from llamachat.kernels.backends import Backend
from llamachat.library import quantized
from llamachat.library.forecast import (
    GIB,
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
from llamachat.quant.form import BITSANDBYTES, FORM_NAMES, FormName
from llamachat.quant.recipe import Recipe

SLOW_TO_QUANTIZE = 500_000_000  # weights: from here on people may want to keep what took so long

Notice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a checkpoint is run.

    Attributes:
        checkpoint: where weights come from: the one that was asked for, or what `llamachat
            quantize` made of it.
        backend: what computes.
        quantize: the form of quantized weights, or "none" where they are unpacked.
        recipe: what is applied to weights as they stream by, or None.
        dtype: of weights that are not quantized.
        kv_cache: the form of keys and values.
        ctx_size: tokens of context.
        source: what a forecast needs of the checkpoint.
        ranks: processes that run it together.
    """

    checkpoint: Checkpoint
    backend: Backend
    quantize: str
    recipe: Recipe | None
    dtype: str
    kv_cache: str
    ctx_size: int
    source: Source
    ranks: int = 1

    @property
    def forecast(self) -> Forecast:
        """The memory that this takes, of each process."""
        kv_cache = "bf16" if self.kv_cache == "auto" else self.kv_cache
        way = Way(self.backend.name, self.quantize, self.dtype, self.recipe, kv_cache)
        return forecast(self.source, way, self.ranks)


def make_plan(
    checkpoint: Checkpoint,
    backend: Backend,
    *,
    quantize: str,
    dtype: str,
    kv_cache: str,
    ctx_size: int | None,
    ranks: int = 1,
    notice: Notice,
    force: bool = False,
) -> Plan:
    """Decide what was left to be decided ("auto", None).

    With `force` nothing is refused for memory.

    Raises:
        UsageError: the backend cannot run the form, or the context is more than the model takes.
        WillNotFitError: there is not memory enough.
    """
    form = checkpoint.form.lower()
    if quantize == "auto" and dtype != "auto" and checkpoint.form in FLOATS:
        quantize = "none"  # a type was named for weights that are floats
    if dtype == "auto":
        dtype = own_dtype(checkpoint.form, backend.name if backend.gpu is None else "cuda")
    source = source_of(checkpoint)
    plan = Plan(checkpoint, backend, "none", None, dtype, kv_cache, ctx_size or 0, source,
                ranks)  # fmt: skip
    plan = _in_form(plan, quantize, notice)
    if backend.name == "bitsandbytes" and form != "int8" and plan.quantize not in BITSANDBYTES:
        raise UsageError(
            f"bitsandbytes does not run {'floats' if plan.quantize == 'none' else plan.quantize}",
            hint=f"--quantize {', '.join(BITSANDBYTES[:-1])} or {BITSANDBYTES[-1]}",
        )
    if kv_cache == "auto":
        is_exact = plan.quantize == "none" and dtype == "float32"
        plan = replace(plan, kv_cache="f32" if is_exact else "bf16")
    return replace(plan, ctx_size=_context(plan, ctx_size, notice, force=force))


def _in_form(plan: Plan, asked: str, notice: Notice) -> Plan:
    """The plan with the form that was asked for, or the one to take."""
    own = plan.checkpoint.form.lower()
    is_float = plan.checkpoint.form in FLOATS
    if asked == "auto" and not is_float and plan.backend.name != "reference":
        asked = own
    if asked == own and not is_float:
        plan = replace(plan, quantize=own)
        return _requantized(plan, notice) if changed_in(plan.checkpoint) else plan
    if asked == "none" or (asked == "auto" and not plan.backend.is_packed):
        return plan
    return _kept(_first_that_fits(plan, asked), notice)


def _first_that_fits(plan: Plan, asked: str) -> Plan:
    names = [name for name in FORM_NAMES if name == asked] or ["int8", "int4"]
    for name in names:
        fresh = _quantized(plan, name)
        if _fitting(fresh) >= (plan.ctx_size or LEAST_CONTEXT):
            break
    return fresh


def _requantized(plan: Plan, notice: Notice) -> Plan:
    """The plan with a recipe for those weights of a quantized file that adapters change."""
    changed = changed_in(plan.checkpoint)
    fresh = _first_that_fits(plan, plan.quantize)
    assert fresh.recipe is not None
    forms = {name: form for name, form in fresh.recipe.forms.items() if name in changed}
    notice(
        f"{len(changed)} weights, {plan.checkpoint.form} in their file, are unpacked, merged with "
        f"the adapter and quantized again to {fresh.quantize}"
    )
    return replace(plan, recipe=replace(fresh.recipe, forms=forms))


def _quantized(plan: Plan, name: FormName) -> Plan:
    """The plan with a recipe."""
    return replace(plan, quantize=name, recipe=weight_recipe(plan.checkpoint.config, name))


def _kept(plan: Plan, notice: Notice) -> Plan:
    """The plan with what `llamachat quantize` made by the same recipe, if it did."""
    assert plan.recipe is not None
    is_adapted = bool(changed_in(plan.checkpoint))
    if not is_adapted and (folder := quantized.locate(plan.checkpoint, plan.recipe.key)):
        kept = open_checkpoint(folder)
        return replace(plan, checkpoint=kept, recipe=None, source=source_of(kept))
    if plan.checkpoint.form not in FLOATS:
        notice(
            f"the weights are {plan.checkpoint.form} already: {plan.quantize} adds its own error "
            "to theirs"
        )
    if plan.checkpoint.config.n_params >= SLOW_TO_QUANTIZE:
        first = "`llamachat merge` and then " if is_adapted else ""
        notice(
            f"quantizing to {plan.quantize}; {first}`llamachat quantize` does it once and keeps it"
        )
    return plan


def _fitting(plan: Plan) -> int:
    """Tokens of context that memory leaves room for."""
    return plan.forecast.fitting_context(available_bytes(plan))


def available_bytes(plan: Plan) -> int:
    """For a process, of the memory that weights and cache are in."""
    return hardware.shared_memory_bytes(plan.backend.gpu, plan.ranks)[1]


def _context(plan: Plan, asked: int | None, notice: Notice, *, force: bool) -> int:
    """Tokens of context: what was asked for if it fits, else as many as do."""
    config = plan.checkpoint.config
    limit = config.longest_context
    if asked is not None and not 0 < asked <= limit:
        raise UsageError(f"--ctx-size is {asked}, the model takes 1 to {limit} tokens")
    is_on_gpu = plan.backend.gpu is not None
    own = min(config.max_seq_len, GPU_CONTEXT) if is_on_gpu else config.max_seq_len
    wanted, fits = asked or own, _fitting(plan)
    if force:
        fits = max(fits, asked or min(wanted, LEAST_CONTEXT))
    if fits < min(wanted, LEAST_CONTEXT) or (asked and fits < asked):
        raise WillNotFitError(
            _needs(plan, wanted, available_bytes(plan)), hint=_fitting_hint(plan, fits)
        )
    if fits < wanted:
        notice(f"context: {fits} of {wanted} tokens, for memory; --ctx-size changes it")
    return min(wanted, fits)


def out_of_memory(plan: Plan, available: int) -> WillNotFitError:
    """What to say where the forecast was wrong, or was overruled, or others took the memory.

    `available` bytes were to be had when loading began.
    """
    fits = plan.forecast.fitting_context(available)
    is_expected = fits < plan.ctx_size
    return WillNotFitError(
        f"{plan.checkpoint.path}: out of memory: {_needs(plan, plan.ctx_size, available)}",
        hint=_fitting_hint(plan, fits) if is_expected else "a smaller --ctx-size or --quantize",
    )


def _needs(plan: Plan, ctx_size: int, available: int) -> str:
    """What is needed, and what there is."""
    found = plan.forecast
    needed = (found.weight_bytes + found.context_bytes(ctx_size)) / GIB
    if plan.backend.gpu is None:
        has = f"{available * MEMORY_SHARE / GIB:.1f} GiB of memory is to be had"
    else:
        has = (
            f"{available * MEMORY_SHARE / GIB:.1f} GiB is to be had of the {available / GIB:.1f} "
            f"GiB that are free on {plan.backend.device}"
        )
    each = f" in each of {plan.ranks} processes" if plan.ranks > 1 else ""
    return f"needs {needed:.1f} GiB{each} with {ctx_size} tokens of context, {has}"


def _fitting_hint(plan: Plan, ctx_size: int) -> str:
    """What would fit: that much context, or another form."""
    if ctx_size >= LEAST_CONTEXT:
        return f"--ctx-size {ctx_size} would fit"
    if ranks := next(_enough_ranks(plan), None):
        return f"--tensor-parallel {ranks} would fit"
    if plan.backend.is_packed and plan.quantize in ("none", "int8"):
        fits = _fitting(_quantized(plan, "int4")) >= LEAST_CONTEXT
        return "--quantize int4 would fit" if fits else "take a smaller model"
    return "take a smaller model"


def _enough_ranks(plan: Plan) -> Iterator[int]:
    """How many more GPUs of this machine would hold it."""
    gpu, config = plan.backend.gpu, plan.checkpoint.config
    if gpu is None or plan.backend.name != "cuda":
        return
    for ranks in range(plan.ranks + 1, len(hardware.gpus()) - gpu + 1):
        if not config.undivided(ranks) and _fitting(replace(plan, ranks=ranks)) >= LEAST_CONTEXT:
            yield ranks
