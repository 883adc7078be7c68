"""GGUF blocks: which form of QTensor each type becomes, and what odd scales do."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from llamachat.checkpoints.blocks import read_blocks
from llamachat.checkpoints.gguf_types import BLOCK_TYPES
from llamachat.quant.tensor import QTensor

KINDS = {kind.name: kind for kind in BLOCK_TYPES.values()}


def read(name: str, raw: bytes) -> QTensor:
    tensor = read_blocks(memoryview(raw), KINDS[name], (2, 256))
    assert isinstance(tensor, QTensor)
    return tensor


@pytest.mark.parametrize(
    ("name", "bits", "group_size", "extra", "scale"),
    [
        ("Q8_0", 8, 32, None, torch.float16),
        ("Q4_0", 4, 32, None, torch.float16),
        ("Q4_1", 4, 32, "mins", torch.float16),
        ("Q5_0", 8, 32, None, torch.float16),
        ("Q5_1", 8, 32, "mins", torch.float16),
        ("Q2_K", 4, 16, "mins", torch.float32),
        ("Q3_K", 4, 16, None, torch.float32),
        ("Q4_K", 4, 32, "mins", torch.float32),
        ("Q5_K", 8, 32, "mins", torch.float32),
        ("Q6_K", 8, 16, None, torch.float32),
        ("IQ4_NL", 4, 32, "codebook", torch.float16),
        ("IQ4_XS", 4, 32, "codebook", torch.float32),
    ],
)
def test_each_type_keeps_its_bits_groups_and_exact_scales(
    name: str, bits: int, group_size: int, extra: str | None, scale: torch.dtype
) -> None:
    tensor = read(name, bytes(KINDS[name].n_bytes(512)))
    assert tensor.shape == (2, 256)
    assert (tensor.bits, tensor.group_size, tensor.scales.dtype) == (bits, group_size, scale)
    assert (tensor.mins is not None) == (extra == "mins")
    assert (tensor.codebook is not None) == (extra == "codebook")


def test_an_infinite_scale_is_kept_without_a_warning() -> None:
    blocks = np.zeros(2, KINDS["Q4_K"].layout)
    blocks["d"] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scales = read("Q4_K", blocks.tobytes()).scales
    assert scales.isnan().all()  # infinity times a factor of 0


@pytest.mark.parametrize("name", ["Q8_0", "F32", "BF16"])
def test_a_single_block_has_memory_of_its_own(name: str) -> None:
    kind = KINDS[name]
    shape = (1, kind.values) if kind.is_quantized else (3,)
    raw = bytearray(kind.n_bytes(math.prod(shape)))
    tensor = read_blocks(memoryview(raw), kind, shape)
    raw[:] = b"\x01" * len(raw)
    assert not (tensor.codes if isinstance(tensor, QTensor) else tensor).any()


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "F16"])
def test_blocks_are_worked_on_where_they_are_placed(name: str) -> None:
    kind = KINDS[name]
    raw = np.random.default_rng(1).integers(0, 256, kind.n_bytes(2048), dtype=np.uint8).tobytes()
    placed: list[torch.Tensor] = []

    def place(found: torch.Tensor) -> torch.Tensor:
        placed.append(found.clone())
        return placed[-1]

    read_blocks(memoryview(raw), kind, (2, 1024), place)
    assert [tensor.numpy().tobytes() for tensor in placed] == [raw]


def test_a_tensor_does_not_share_memory_with_the_file() -> None:
    raw = bytearray(KINDS["Q8_0"].n_bytes(512))
    tensor = read_blocks(memoryview(raw), KINDS["Q8_0"], (2, 256))
    assert isinstance(tensor, QTensor)
    raw[:] = b"\x01" * len(raw)
    assert not tensor.codes.any()
