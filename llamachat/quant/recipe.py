"""Which weight is stored how: bits are spent where they pay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from llamachat.quant.form import BITSANDBYTES, Form, FormName
from llamachat.quant.tensor import QTensor

VERSION = 1  # of what recipes say: raised when the same name begins to mean something else
Shape = tuple[int, ...]
Quantize = Callable[[Tensor, Form, "Tensor | None"], QTensor]


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

    Args:
        name: the form of most weights.
        weights: every weight's Hugging Face name and shape.
        group_size: of int8 and int4; halved for a matrix whose rows it does not divide, down to 16.
        nested: of nf4 and fp4.
    """
    matrices = {weight: shape for weight, shape in weights if len(shape) == 2}
    forms = {
        weight: form
        for weight, shape in matrices.items()
        if (form := _form(name, weight, shape[1], group_size, nested))
    }
    return Recipe(name, group_size, nested, forms)


def _form(name: FormName, weight: str, cols: int, group_size: int, nested: bool) -> Form | None:
    if name in BITSANDBYTES:
        is_linear = ".layers." in weight
        return Form(name, nested=nested) if is_linear else None
    group = math.gcd(group_size, cols)
    return Form(name, group) if group >= 16 else None


class Quantizer:
    """Applies a recipe to weights as they stream by in the order of a forward pass."""

    def __init__(self, recipe: Recipe, quantize: Quantize) -> None:
        self._recipe = recipe
        self._quantize = quantize
        self._norm: Tensor | None = None

    def __call__(self, name: str, tensor: Tensor | QTensor) -> Tensor | QTensor:
        """The weight in the form of the recipe; what is quantized already is unpacked first."""
        self.observe(name, tensor)
        form = self._recipe.forms.get(name)
        if form is None:
            return tensor
        if isinstance(tensor, QTensor):
            tensor = tensor.dequantize()
        return self._quantize(tensor, form, None)

    def observe(self, name: str, tensor: Tensor | QTensor) -> None:
        """Take notice of a weight that was quantized before (only vectors matter)."""
