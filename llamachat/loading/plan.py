"""How a checkpoint is run: in which form, by which backend, with how much context. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from llamachat import hardware
from llamachat.checkpoints import Checkpoint, open_checkpoint
from llamachat.checkpoints.names import iter_weights
from llamachat.checkpoints.overlay import changed_in
from llamachat.checkpoints.stored import FLOATS
from llamachat.errors import UsageError, WillNotFitError
from llamachat.kernels.backends import Backend
from llamachat.library import quantized
from llamachat.quant.form import BITSANDBYTES, FORM_NAMES, FormName
from llamachat.quant.recipe import Recipe, recipe

MEMORY_SHARE = 0.8  # of what is available: the rest is for activations and for other programs
GIB = 2**30
CACHE_BYTES = {"f32": 4, "bf16": 2, "int8": 1}  # of a key's or value's element
GPU_CONTEXT = 8192  # tokens by default, which a GPU has memory for from the start
LEAST_CONTEXT = 512  # tokens that a form must leave room for
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
        weight_bytes: of all weights in memory.
        ctx_size: tokens of context.
    """

    checkpoint: Checkpoint
    backend: Backend
    quantize: str
    recipe: Recipe | None
    dtype: str
    kv_cache: str
    weight_bytes: int
    ctx_size: int


def make_plan(
    checkpoint: Checkpoint,
    backend: Backend,
    *,
    quantize: str,
    dtype: str,
    kv_cache: str,
    ctx_size: int | None,
    notice: Notice,
) -> Plan:
    """Decide what was left to be decided ("auto", None).

    Raises:
        UsageError: the backend cannot run the form, or the context is more than the model takes.
        WillNotFitError: there is not memory enough.
    """
    form = checkpoint.form.lower()
    if quantize == "auto" and dtype != "auto" and checkpoint.form in FLOATS:
        quantize = "none"  # a type was named for weights that are floats
    if dtype == "auto":
        own = FLOATS.get(checkpoint.form, "bfloat16")
        dtype = own if backend.is_packed else hardware.fast_dtype()
    plan = Plan(checkpoint, backend, "none", None, dtype, kv_cache, 0, ctx_size or 0)
    plan = _in_form(plan, quantize, notice)
    if backend.name == "bitsandbytes" and form != "int8" and plan.quantize not in BITSANDBYTES:
        raise UsageError(
            f"bitsandbytes does not run {'floats' if plan.quantize == 'none' else plan.quantize}",
            hint=f"--quantize {', '.join(BITSANDBYTES[:-1])} or {BITSANDBYTES[-1]}",
        )
    if kv_cache == "auto":
        is_exact = plan.quantize == "none" and dtype == "float32"
        plan = replace(plan, kv_cache="f32" if is_exact else "bf16")
    return replace(plan, ctx_size=_context(plan, ctx_size, notice))


def _in_form(plan: Plan, asked: str, notice: Notice) -> Plan:
    """The plan with the form that was asked for, or the one to take."""
    own = plan.checkpoint.form.lower()
    is_float = plan.checkpoint.form in FLOATS
    if asked == "auto" and not is_float and plan.backend.name != "reference":
        asked = own
    if asked == own and not is_float:
        n_bytes = sum(file.stat().st_size for file in plan.checkpoint.files)
        plan = replace(plan, quantize=own, weight_bytes=n_bytes)
        return _requantized(plan, notice) if changed_in(plan.checkpoint) else plan
    if asked == "none" or (asked == "auto" and not plan.backend.is_packed):
        return replace(plan, weight_bytes=_unpacked_bytes(plan))
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
    n_bytes = max(plan.weight_bytes, fresh.weight_bytes)
    return replace(plan, recipe=replace(fresh.recipe, forms=forms), weight_bytes=n_bytes)


def _quantized(plan: Plan, name: FormName) -> Plan:
    """The plan with a recipe. The reference unpacks what it is given."""
    weights = {weight.hf: weight.shape for weight in iter_weights(plan.checkpoint.config)}
    made = recipe(name, weights.items())
    if plan.backend.name == "reference":
        return replace(plan, quantize=name, recipe=made, weight_bytes=_unpacked_bytes(plan))
    rest = 32 if plan.dtype == "float32" else 16
    bits = sum(
        math.prod(shape) * (made.forms[weight].bits_per_weight if weight in made.forms else rest)
        for weight, shape in weights.items()
    )
    return replace(plan, quantize=name, recipe=made, weight_bytes=int(bits / 8))


def _kept(plan: Plan, notice: Notice) -> Plan:
    """The plan with what `llamachat quantize` made by the same recipe, if it did."""
    assert plan.recipe is not None
    is_adapted = bool(changed_in(plan.checkpoint))
    if not is_adapted and (folder := quantized.locate(plan.checkpoint, plan.recipe.key)):
        return replace(plan, checkpoint=open_checkpoint(folder), recipe=None)
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


def _unpacked_bytes(plan: Plan) -> int:
    """Of floats; the reference keeps a tied table twice: to look up, and as the head."""
    config = plan.checkpoint.config
    twice = config.tied and not plan.backend.is_packed
    n_values = config.n_params + (config.vocab_size * config.dim if twice else 0)
    return n_values * (4 if plan.dtype == "float32" else 2)


def _token_bytes(plan: Plan) -> int:
    """What a token of context takes."""
    config = plan.checkpoint.config
    form = "bf16" if plan.kv_cache == "auto" else plan.kv_cache
    n_bytes = config.cached_values_per_token * CACHE_BYTES[form]
    if form == "int8":  # and a float32 scale for each head's share
        n_bytes += 4 * config.cached_values_per_token // config.head_dim
    return n_bytes


def _fitting(plan: Plan) -> int:
    """Tokens of context that memory leaves room for."""
    return max(0, (_usable_bytes(plan) - plan.weight_bytes) // _token_bytes(plan))


def _usable_bytes(plan: Plan) -> int:
    """Of the memory that weights and cache are in."""
    gpu = plan.backend.gpu
    _, available = hardware.memory_bytes() if gpu is None else hardware.gpu_memory_bytes(gpu)
    return int(available * MEMORY_SHARE)


def _context(plan: Plan, asked: int | None, notice: Notice) -> int:
    """Tokens of context: what was asked for if it fits, else as many as do."""
    config = plan.checkpoint.config
    limit = config.longest_context
    if asked is not None and not 0 < asked <= limit:
        raise UsageError(f"--ctx-size is {asked}, the model takes 1 to {limit} tokens")
    is_on_gpu = plan.backend.gpu is not None
    own = min(config.max_seq_len, GPU_CONTEXT) if is_on_gpu else config.max_seq_len
    wanted, fits = asked or own, _fitting(plan)
    if fits < min(wanted, LEAST_CONTEXT) or (asked and fits < asked):
        needed = (plan.weight_bytes + _token_bytes(plan) * wanted) / GIB
        raise WillNotFitError(
            f"needs {needed:.1f} GiB with {wanted} tokens of context, "
            f"{_usable_bytes(plan) / GIB:.1f} GiB of {'GPU ' if is_on_gpu else ''}memory "
            "is to be had",
            hint=f"--ctx-size {fits} would fit" if fits >= LEAST_CONTEXT else _smaller(plan),
        )
    if fits < wanted:
        notice(f"context: {fits} of {wanted} tokens, for memory; --ctx-size changes it")
    return min(wanted, fits)


def _smaller(plan: Plan) -> str:
    """What else may fit."""
    if plan.backend.is_packed and plan.quantize in ("none", "int8"):
        fits = _fitting(_quantized(plan, "int4")) >= LEAST_CONTEXT
        return "--quantize int4 would fit" if fits else "take a smaller model"
    return "take a smaller model"
