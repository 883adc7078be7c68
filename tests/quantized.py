"""Random weights in every form that a QTensor has, and how far packing may move them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llamachat.architecture import ModelConfig
from llamachat.checkpoints.names import iter_weights
from llamachat.kernels import Kernels
from llamachat.model.decoder import Decoder, load_decoder
from llamachat.quant.tensor import QTensor

# kvalues_iq4nl of ggml-common.h (llama.cpp)
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Appendix E of QLoRA (arXiv:2305.14314)
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    bits: Literal[4, 8]
    has_min: bool = False
    codebook: tuple[float, ...] | None = None
    shift: int = 0


FORMS = {
    "4 bits": Form(4),
    "4 bits with minimum": Form(4, has_min=True),
    "IQ4_NL": Form(4, codebook=_IQ4_NL),
    "NF4": Form(4, codebook=_NF4),
    "shifted": Form(4, codebook=_IQ4_NL, shift=3),
    "8 bits": Form(8),
    "8 bits with minimum": Form(8, has_min=True),
}


def random_qtensor(
    form: str,
    shape: tuple[int, int],
    group_size: int,
    *,
    seed: int = 0,
    largest: float = 1.0,
    dtype: torch.dtype = torch.float16,
) -> QTensor:
    """Codes without a pattern; magnitudes of about `largest` and, by groups, down to a quarter.

    Scales are of `dtype` in all forms but the shifted one, of which float16 is a part.
    """
    kind, (out, columns) = FORMS[form], shape
    dtype = torch.float16 if kind.shift else dtype
    generator = torch.Generator().manual_seed(seed)
    signed = kind.bits == 8 and not kind.has_min
    low, high = (-128, 128) if signed else (0, 256)
    codes = torch.randint(low, high, (out, columns * kind.bits // 8), generator=generator)
    sizes = torch.rand(2, out, columns // group_size, generator=generator) * 0.75 + 0.25
    middle = 2 ** (kind.bits - 1)
    steps = max(kind.codebook) if kind.codebook else middle
    scales = sizes[0] * (largest / steps)
    return QTensor(
        codes.to(torch.int8 if signed else torch.uint8),
        scales.to(dtype),
        bits=kind.bits,
        group_size=group_size,
        mins=(sizes[1] * -largest).to(dtype) if kind.has_min else None,
        codebook=torch.tensor(kind.codebook).float() if kind.codebook else None,
        shifts=(torch.arange(-8, 8) * kind.shift).float() if kind.shift else None,
    )


def as_packed(weight: Tensor | QTensor) -> Tensor | QTensor:
    """A weight in the form that it is multiplied in: groups that do not divide become floats."""
    if isinstance(weight, QTensor) and weight.group_size % 16 and weight.scales.shape[1] > 1:
        return weight.dequantize()
    return weight


def magnitude(weight: Tensor | QTensor) -> Tensor:
    """(O, I) float64: |scale * v| + |min|, what rounding errors of a value are relative to."""
    if isinstance(weight, Tensor):
        return weight.double().abs()
    values = weight.dequantize(torch.float64)
    if weight.shifts is not None:  # a minimum, which is computed and rounded
        level = weight.codebook.abs().max() + weight.shifts.abs().max()
        scales = weight.scales.double().abs().repeat_interleave(weight.group_size, dim=1)
        return scales * level.double()
    if weight.mins is None:
        return values.abs()
    mins = weight.mins.double().repeat_interleave(weight.group_size, dim=1)
    return (values - mins).abs() + mins.abs()


def packing_error(weight: Tensor | QTensor) -> Tensor:
    """(O, I) float64: how far a packed value may be from the weight's own.

    Scales and minima become float16 times a power of two: relative 2^-11, nothing if they were
    float16. A codebook becomes integers times 1/127 of its largest entry, and the 1/127 goes into
    the scale: its entries move by what is computed here, and the scale is rounded again.
    """
    if isinstance(weight, Tensor):
        return torch.zeros(weight.shape, dtype=torch.float64)
    book = weight.codebook
    is_whole = book is None or bool(torch.equal(book, book.round()))
    relative = 0.0 if is_whole and weight.scales.dtype == torch.float16 else 2**-11
    error = relative * magnitude(weight)
    if book is None or is_whole:
        return error
    step = book.double().abs().max() / 127
    moved = (book.double() / step).round() * step - book.double()
    codes = torch.stack((weight.codes & 15, weight.codes >> 4), dim=-1).view(weight.shape)
    scales = weight.scales.double().repeat_interleave(weight.group_size, dim=1)
    return error + (1 + relative) * scales.abs() * moved.abs()[codes.long()]


def gamma(n: int) -> float:
    """How far n roundings to float32 move a product, relatively (Higham, 2002, section 3.1)."""
    return n * 2**-24 / (1 - n * 2**-24)


SMALL = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=80,
    norm_eps=1e-5, rope_theta=1e4, max_seq_len=512, tied=True,
)  # fmt: skip


def random_quantized_decoder(
    kernels: Kernels, forms: Sequence[str], config: ModelConfig = SMALL
) -> Decoder:
    """A decoder whose matrices take turns over the forms ("float", "bfloat16": not quantized)."""
    generator = torch.Generator().manual_seed(1)
    tensors: list[tuple[str, Tensor | QTensor]] = []
    for i, weight in enumerate(iter_weights(config)):
        form = forms[i % len(forms)]
        if len(weight.shape) == 1:
            tensor: Tensor | QTensor = torch.rand(weight.shape, generator=generator) + 0.5
        elif form in ("float", "bfloat16"):
            values = torch.randn(weight.shape, generator=generator) * 0.2
            tensor = values.bfloat16() if form == "bfloat16" else values
        else:
            out, columns = weight.shape
            tensor = random_qtensor(form, (out, columns), 32, seed=i, largest=0.5)
        tensors.append((weight.hf, tensor))
    return load_decoder(config, tensors, kernels)
