"""bitsandbytes: what it quantizes as QTensors, and its own modules as a backend.

Its 4-bit forms have blocks over the flattened matrix, so that a block may end in the next row. A
QTensor has groups within rows: they are as long as divides both, and repeat their block's scale.
That is exact. The library's own CPU code is not, where blocks straddle rows: on AVX-512 it counts
blocks from the start of each row (0.50.2), so its modules are only given groups that do not.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from llamachat.errors import UsageError
from llamachat.kernels.reference import Matrix, Reference
from llamachat.quant.form import Form
from llamachat.quant.tensor import QTensor

BLOCK = 64  # values that share a scale, in what is quantized here
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # quantize_4bit takes these
PANEL = 32  # rows: its 4-bit layout for AVX512_BF16 takes whole panels
OUTLIER = 6.0  # LLM.int8() multiplies columns of x with such magnitudes as floats (2208.07339)


def library() -> Any:
    """The package, imported quietly and without the network; the first time takes seconds.

    Raises:
        UsageError: it is not installed, or cannot be loaded on this machine.
    """
    hint = "pip install bitsandbytes, or take another --quantize and --backend"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at import, and of casts
    try:
        with _without("kernels"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module("bitsandbytes")
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise UsageError(
                f"bitsandbytes needs {error.name}, which is missing", hint=hint
            ) from error
        raise UsageError("bitsandbytes is not installed", hint=hint) from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"bitsandbytes cannot be loaded: {reason}", hint=hint) from error


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Hide a package: with "kernels", bitsandbytes would fetch code from the Hub at import."""
    held = {package: sys.modules[package]} if package in sys.modules else {}
    sys.modules[package] = None  # type: ignore[assignment]  # importing it fails
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(held)


def quantize(weight: Tensor, form: Form) -> QTensor:
    """(O, I) floats, which must be finite, as bitsandbytes quantizes them.

    For llm-int8 it rounds them to float16 first: one that overflows makes its row NaN.

    Raises:
        UsageError: bitsandbytes is missing, or 4-bit rows would end within a byte.
    """
    functional = library().functional
    weight = weight.contiguous()
    if form.name == "llm-int8":
        codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
        return from_rows(codes, largest)
    rows, cols = weight.shape
    if cols % 2:
        raise UsageError(
            f"{form.name} takes rows of an even number of values, a weight has {cols}",
            hint="--quantize int8 takes any",
        )
    packed, state = functional.quantize_4bit(
        weight, blocksize=BLOCK, compress_statistics=form.nested, quant_type=form.name
    )
    scales = state.absmax
    if form.nested:
        inner = state.state2
        scales = nested_scales(scales, inner.code, inner.absmax, inner.blocksize, state.offset)
    return from_blocks(packed, scales, state.code, (rows, cols), BLOCK)


def from_rows(codes: Tensor, largest: Tensor) -> QTensor:
    """8 bits: codes (O, I) int8 times the rows' largest magnitudes "SCB" (O,) float32 / 127."""
    return QTensor(codes, (largest / 127).unsqueeze(1), bits=8, group_size=codes.shape[1])


def from_blocks(
    packed: Tensor, scales: Tensor, codebook: Tensor, shape: tuple[int, int], block: int
) -> QTensor:
    """4 bits: value = codebook[code] * scale of its block.

    Args:
        packed: (O * I / 2, 1) uint8, row by row, the even element in the high nibble.
        scales: (ceil(O * I / block),) float32.
        codebook: (16,) float32.
        shape: (O, I), I even.
        block: values that share a scale.
    """
    rows, cols = shape
    group = math.gcd(block, cols)
    scales = scales.repeat_interleave(block // group)[: rows * cols // group]
    codes = _swapped(packed.view(rows, cols // 2))
    return QTensor(codes, scales.view(rows, -1), bits=4, group_size=group, codebook=codebook)


def nested_scales(
    codes: Tensor, codebook: Tensor, scales: Tensor, block: int, offset: Tensor | float
) -> Tensor:
    """Scales (N,) float32 that were quantized in turn ("double quantization").

    Args:
        codes: (N,) uint8.
        codebook: (256,) float32.
        scales: (ceil(N / block),) float32.
        block: codes that share one of these.
        offset: what was taken from all N scales first.
    """
    values = codebook[codes.long()] * scales.repeat_interleave(block)[: len(codes)]
    return values + offset


def _swapped(codes: Tensor) -> Tensor:
    """High nibbles low, and low ones high."""
    return (codes << 4) | (codes >> 4)


@dataclass(slots=True)
class Stack(Matrix):
    """A packed weight that lies, at least partly, in the library's modules.

    Attributes:
        parts: each gives some rows of the product, in order.
        part_bytes: what one product reads of them.
    """

    parts: tuple[nn.Module | Matrix, ...] = ()
    part_bytes: int = 0


class BitsAndBytes(Reference):
    """`Reference` with products by bitsandbytes where a weight has one of its forms.

    Those are nf4 and fp4 with rows that come in panels of 32 and are divided by blocks of 32 or
    more, and llm-int8, whose products keep the outlier decomposition. All others are dequantized.
    """

    name = "bitsandbytes"

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__(device, dtype)
        self._library = library()

    def pack(
        self,
        parts: Sequence[Tensor | QTensor],
        *,
        bias: Tensor | None = None,
        gated: bool = False,
        lookup: bool = False,
    ) -> Matrix:
        """A module for each part that has one; a table to look up rows in is dequantized."""
        modules = [None if lookup else self._module(part) for part in parts]
        if not any(modules):
            return super().pack(parts, bias=bias, gated=gated, lookup=lookup)
        packed: list[nn.Module | Matrix] = []
        for module, part in zip(modules, parts, strict=True):
            packed.append(module or super().pack([part]))
        n_bytes = sum(_n_bytes(p) if isinstance(p, nn.Module) else self.n_bytes(p) for p in packed)
        bias = None if bias is None else bias.to(self.device, self.dtype)
        return Stack(None, None, bias, parts=tuple(packed), part_bytes=n_bytes)

    def n_bytes(self, weight: Matrix) -> int:
        """Codes and scales, floats, bias."""
        return super().n_bytes(weight) + (weight.part_bytes if isinstance(weight, Stack) else 0)

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        """(T, I) -> (T, O) in `dtype`."""
        if not isinstance(weight, Stack):
            return super().linear(x, weight)
        x = x.to(self.dtype)
        products = [
            self.linear(x, part) if isinstance(part, Matrix) else part(x) for part in weight.parts
        ]
        out = torch.cat(products, dim=-1)
        return out if weight.bias is None else out + weight.bias

    def _module(self, part: Tensor | QTensor) -> nn.Module | None:
        if not isinstance(part, QTensor) or part.mins is not None or part.factor != 1:
            return None
        return self._module_of_8_bits(part) if part.bits == 8 else self._module_of_4_bits(part)

    def _module_of_8_bits(self, part: QTensor) -> nn.Module | None:
        largest = (part.scales.float() * 127).half().float()  # it was the maximum of float16 values
        if part.scales.shape[1] != 1 or not torch.equal(largest / 127, part.scales):
            return None
        codes, largest = part.codes.to(self.device), largest.flatten().to(self.device)
        bnb, (rows, cols) = self._library.nn, part.shape
        module: nn.Module = bnb.Linear8bitLt(
            cols, rows, bias=False, has_fp16_weights=False, threshold=OUTLIER, device="meta"
        )
        module.weight = bnb.Int8Params(codes, requires_grad=False, CB=codes, SCB=largest)
        return module.eval()

    def _module_of_4_bits(self, part: QTensor) -> nn.Module | None:
        kind = self._kind(part.codebook)
        rows, cols = part.shape
        if kind is None or rows % PANEL or part.group_size not in BLOCK_SIZES:
            return None
        bnb = self._library.nn
        module: nn.Module = bnb.Linear4bit(
            cols, rows, bias=False, compute_dtype=self.dtype, quant_type=kind, device="meta"
        )
        state = self._library.functional.QuantState(
            absmax=part.scales.flatten().float(),
            shape=torch.Size(part.shape),
            code=part.codebook,
            blocksize=part.group_size,
            quant_type=kind,
            dtype=self.dtype,
        )
        state.to(self.device)
        codes = _swapped(part.codes).view(-1, 1).to(self.device)
        module.weight = bnb.Params4bit(
            codes, quant_state=state, blocksize=part.group_size, quant_type=kind, bnb_quantized=True
        )
        module.eval()
        module(torch.zeros(1, cols, dtype=self.dtype, device=self.device))  # it may repack once
        return module

    def _kind(self, codebook: Tensor | None) -> str | None:
        if codebook is None:
            return None
        own = self._library.functional.get_4bit_type
        kinds = ("nf4", "fp4")
        return next((k for k in kinds if torch.equal(own(k, device="cpu"), codebook.cpu())), None)


def _n_bytes(module: nn.Module) -> int:
    weight: Any = module.weight
    scales = weight.SCB if weight.dtype == torch.int8 else weight.quant_state.absmax
    return int(weight.nbytes + scales.nbytes)
