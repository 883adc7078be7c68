"""Which weight is stored how: bits are spent where they pay. Torch-free until weights stream by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamachat.errors import DamagedFileError
from llamachat.quant.form import BITSANDBYTES, LARGEST_GROUP, SMALLEST_GROUP, Form, FormName

if TYPE_CHECKING:
    from torch import Tensor

    from llamachat.quant.tensor import QTensor

VERSION = 2  # of what recipes say: raised when the same name begins to mean something else
EXTRA_BITS = 0.4  # a weight, that int4 spends beyond its own (4.9 in all in groups of 32)
LEAST_EXTRA_BITS = 0.09  # that it spends beside the head, however much of a model that is

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LARGEST = 7e6  # magnitude of a value: float16 scales end at 65504, times a level of up to 127
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How each weight of one model is stored.

    Attributes:
        name: what was asked for.
        group_size: what was asked for.
        nested: what was asked for.
        forms: by Hugging Face name; a weight without one stays as it is.
    """

    name: FormName
    group_size: int
    nested: bool
    forms: Mapping[str, Form]

    @property
    def key(self) -> str:
        """Short and exact, such as "int4-g32-v1": the same key, the same bits from one source."""
        if self.name in BITSANDBYTES:
            return f"{self.name}{'-nested' if self.nested else ''}-v{VERSION}"
        return f"{self.name}-g{self.group_size}-v{VERSION}"


def recipe(
    name: FormName,
    weights: Iterable[tuple[str, Shape]],
    *,
    group_size: int = 32,
    nested: bool = False,
) -> Recipe:
    """The recipe for a model; it depends on nothing but the arguments.

    int8 is int8 throughout, with groups twice as large in the gates, which matter least. int4 has
    the head (or the table that is the head as well) at 8 bits, then what `_by_worth` names, as
    far as `EXTRA_BITS` go. What bitsandbytes quantizes are the
    linear layers of blocks; embeddings and head stay as they are, as transformers has it.

    Args:
        name: the form of most weights.
        weights: every weight's Hugging Face name and shape, in the order of a forward pass.
        group_size: of int8 and int4. A matrix whose rows it does not divide has the largest
            power of two that does; one with rows of no multiple of 16 stays as it is.
        nested: of nf4 and fp4.
    """
    shapes = {weight: shape for weight, shape in weights if len(shape) == 2}
    if name in BITSANDBYTES:
        forms = {weight: Form(name, 0, nested) for weight in shapes if ".layers." in weight}
        return Recipe(name, group_size, nested, forms)
    forms = {
        weight: Form(name, group)
        for weight, (_, columns) in shapes.items()
        if (group := math.gcd(group_size, columns)) >= SMALLEST_GROUP
    }
    other = _raised(forms, shapes) if name == "int4" else _coarser_gates(forms, shapes)
    return Recipe(name, group_size, nested, forms | other)


def _coarser_gates(forms: Mapping[str, Form], shapes: Shapes) -> dict[str, Form]:
    return {
        weight: Form(form.name, 2 * form.group_size)
        for weight, form in forms.items()
        if ".gate_proj." in weight and shapes[weight][1] % (2 * form.group_size) == 0
    }


def _raised(forms: Mapping[str, Form], shapes: Shapes) -> dict[str, Form]:
    """What has 8 bits instead of 4: the head, and what else can be paid for."""
    wide = {weight: Form("int8", _wide(shapes[weight][1], form)) for weight, form in forms.items()}
    n_weights = sum(math.prod(shape) for shape in shapes.values())
    extra = {
        weight: (wide[weight].bits_per_weight - form.bits_per_weight)
        * math.prod(shapes[weight]) / n_weights
        for weight, form in forms.items()
    }  # fmt: skip
    head = HEAD if HEAD in shapes else EMBEDDING
    left = max(EXTRA_BITS - extra.get(head, 0), LEAST_EXTRA_BITS)
    raised = [head] if head in forms else []
    for weight in _by_worth(shapes):
        if weight in extra and weight not in raised and extra[weight] <= left:
            raised.append(weight)
            left -= extra[weight]
    return {weight: wide[weight] for weight in raised}


def _wide(columns: int, form: Form) -> int:
    """The largest group for a row: what scales take is better spent elsewhere."""
    divisors = range(LARGEST_GROUP, form.group_size, -32)
    return next((group for group in divisors if columns % group == 0), form.group_size)


def _by_worth(shapes: Shapes) -> Iterator[str]:
    """What gains most by more bits, by divergence won for a byte on SmolLM2 (docs/kernels.md)."""
    layers = sorted({int(weight.split(".")[2]) for weight in shapes if ".layers." in weight})
    for part, last_first in (
        ("mlp.down_proj", layers[-1:]),
        ("self_attn.v_proj", layers[::-1]),
        ("mlp.down_proj", layers[:1]),
        ("self_attn.k_proj", layers[::-1]),
        ("mlp.down_proj", layers[::-1]),
    ):
        yield from (f"model.layers.{layer}.{part}.weight" for layer in last_first)
    yield EMBEDDING


class Quantizer:
    """Applies a recipe to weights as they stream by."""

    def __init__(self, recipe: Recipe, quantize: Callable[[Tensor, Form], QTensor]) -> None:
        self._recipe = recipe
        self._quantize = quantize

    def __call__(self, name: str, tensor: Tensor | QTensor) -> Tensor | QTensor:
        """The weight in the form of the recipe; what is quantized already is unpacked first.

        Raises:
            DamagedFileError: a value is not a number, or too large for a float16 scale.
        """
        form = self._recipe.forms.get(name)
        if form is None:
            return tensor
        from llamachat.quant.tensor import QTensor

        if isinstance(tensor, QTensor):
            tensor = tensor.dequantize()
        lowest, highest = (float(value) for value in tensor.aminmax())
        if not max(-lowest, highest) <= LARGEST:  # NaN is not, either
            raise DamagedFileError(
                f"{name}: values from {lowest:g} to {highest:g}, expected none beyond {LARGEST:g}"
            )
        return self._quantize(tensor, form)
