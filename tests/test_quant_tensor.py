"""QTensor: what each form of codes stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llamachat.quant.tensor import QTensor

SCALES = torch.tensor([[0.5, 2.0]])  # (1, 2): two groups of two
MINS = torch.tensor([[-1.0, 10.0]])
BOOK = torch.arange(16, dtype=torch.float32) ** 2
NIBBLES = torch.tensor([[0x21, 0xF8]], dtype=torch.uint8)  # 1, 2 and 8, 15

FORMS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "8 bits": (
        {"codes": torch.tensor([[-128, 3, 127, 0]], dtype=torch.int8), "bits": 8},
        [-64, 1.5, 254, 0],
    ),
    "8 bits with minimum": (
        {"codes": torch.tensor([[0, 255, 128, 1]], dtype=torch.uint8), "bits": 8, "mins": MINS},
        [-1, 126.5, 266, 12],
    ),
    "4 bits": ({"codes": NIBBLES, "bits": 4}, [-3.5, -3, 0, 14]),
    "4 bits with minimum": ({"codes": NIBBLES, "bits": 4, "mins": MINS}, [-0.5, 0, 26, 40]),
    "codebook": ({"codes": NIBBLES, "bits": 4, "codebook": BOOK}, [0.5, 2, 128, 450]),
}


@pytest.mark.parametrize("form", FORMS)
def test_codes_stand_for_values(form: str) -> None:
    parts, expected = FORMS[form]
    assert QTensor(scales=SCALES, group_size=2, **parts).dequantize().tolist() == [expected]


def test_the_last_four_bits_of_a_scale_say_what_its_levels_are_shifted_by() -> None:
    scales = torch.tensor([[0x3C00 | 10, 0xC000 | 7]], dtype=torch.int32).to(torch.int16)
    shifts = torch.arange(-8, 8) * 100.0
    matrix = QTensor(
        NIBBLES, scales.view(torch.float16), 4, group_size=2, codebook=BOOK, shifts=shifts
    )
    first, second = 1 + 10 * 2**-10, -2 * (1 + 7 * 2**-10)
    expected = [first * 201, first * 204, second * (64 - 100), second * (225 - 100)]
    assert matrix.dequantize(torch.float64).tolist() == [expected]


def test_half_precision_scales_multiply_in_float32() -> None:
    """0.1 in half precision, times 127, has more digits than half precision holds."""
    scale = torch.tensor([[0.1]], dtype=torch.float16)
    codes = torch.tensor([[127]], dtype=torch.int8)
    value = QTensor(codes, scale, bits=8, group_size=1).dequantize()
    assert value.dtype == torch.float32
    assert value.item() == scale.item() * 127


def test_double_precision_rounds_nothing() -> None:
    scale, least = torch.tensor([[0.1]]), torch.tensor([[-3e-5]])
    codes = torch.tensor([[201]], dtype=torch.uint8)
    matrix = QTensor(codes, scale, bits=8, group_size=1, mins=least)
    assert matrix.dequantize(torch.float64).item() == scale.item() * 201 + least.item()
    assert matrix.dequantize().item() != matrix.dequantize(torch.float64).item()


def test_rows_are_taken_whole_and_in_the_order_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (5, 4), dtype=torch.uint8, generator=generator)
    scales, mins = torch.rand(5, 2, generator=generator), torch.rand(5, 2, generator=generator)
    matrix = QTensor(codes, scales, bits=4, group_size=4, mins=mins)
    order = torch.tensor([3, 0, 3])
    assert matrix.shape == (5, 8)
    assert torch.equal(matrix.rows(order).dequantize(), matrix.dequantize()[order])


@pytest.mark.parametrize("form", FORMS)
def test_a_product_with_a_number_keeps_the_codes(form: str) -> None:
    matrix = QTensor(scales=SCALES, group_size=2, **FORMS[form][0])
    product = matrix * 1.25
    assert torch.equal(product.codes, matrix.codes)
    assert torch.equal(product.dequantize(), matrix.dequantize() * 1.25)
