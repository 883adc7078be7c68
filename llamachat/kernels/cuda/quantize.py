"""int8 and int4 on the GPU: one kernel searches what quant/quantize.py does in many operations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llamachat.kernels.cuda import structures
from llamachat.kernels.cuda.compiler import Kernel
from llamachat.quant.form import CODEBOOK, SHIFT, Form
from llamachat.quant.quantize import of_codes
from llamachat.quant.tensor import QTensor

THREADS = 128
UNIT = 8  # values that a lane reads at once
SOURCES = {
    torch.float16: ("uint16_t", "of_half"),
    torch.bfloat16: ("uint16_t", "of_bfloat16"),
    torch.float32: ("uint32_t", "__uint_as_float"),
}


def quantize(weight: Tensor, form: Form, kernel: Callable[..., Kernel]) -> QTensor:
    """Codes and scales of an (O, I) matrix: those of `quant.quantize`, but where two are as good.

    Args:
        weight: on the GPU, finite, I a multiple of the form's group size.
        form: int8 or int4.
        kernel: `Compiler.kernel` of that GPU.
    """
    weight = (weight if weight.dtype in SOURCES else weight.float()).contiguous()
    out, columns = weight.shape
    value, to_float = SOURCES[weight.dtype]
    lanes = math.gcd(form.group_size, 256) // UNIT
    coded = torch.int8 if form.bits == 8 else torch.uint8
    codes = weight.new_empty((out, columns * form.bits // 8), dtype=coded)
    scales = weight.new_empty((out, columns // form.group_size), dtype=torch.float16)
    search = kernel(
        "quantize.cu",
        "quantize",
        TYPE=value,
        FLOAT=to_float,
        BITS=form.bits,
        LANES=lanes,
        VALUES=form.group_size // lanes,
        BOOK=",".join(map(str, CODEBOOK)),
        SHIFT=SHIFT,
    )
    args = structures.Quantize(
        x=weight.data_ptr(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        groups=scales.numel(),
    )
    search((-(-scales.numel() * lanes // THREADS),), THREADS, args)
    return of_codes(codes, scales, form)
