"""What packing keeps of a weight: seen through look-up, and through products with known bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized import FORMS, gamma, magnitude, packing_error, random_qtensor
from torch import Tensor

from llamachat.kernels import Batch
from llamachat.kernels.native import Native
from llamachat.quant.tensor import QTensor

MakeNative = Callable[[int], Native]


def looked_up(kernels: Native, table: Tensor | QTensor, ids: Sequence[int]) -> Tensor:
    at = torch.tensor(ids, dtype=torch.int32)
    zeros = torch.zeros_like(at)
    batch = Batch(at, zeros, zeros, zeros + 1, zeros, zeros.view(1, -1), zeros)
    packed = kernels.pack([table], lookup=True)
    return kernels.run(lambda b: kernels.embed(b, packed), batch)


def assert_kept(kernels: Native, weight: QTensor) -> None:
    """Look-up multiplies and adds: two roundings on top of those of packing."""
    found = looked_up(kernels, weight, range(weight.shape[0]))
    bound = (1 + gamma(2)) * packing_error(weight) + gamma(2) * magnitude(weight)
    assert ((found.double() - weight.dequantize(torch.float64)).abs() <= bound).all()


@pytest.mark.parametrize("form", ["4 bits", "IQ4_NL", "8 bits"])
@pytest.mark.parametrize("group_size", [16, 20, 32, 48, 64, 96])
def test_scales_in_half_precision_and_whole_codes_are_kept_exactly(
    native: MakeNative, form: str, group_size: int
) -> None:
    weight = random_qtensor(form, (33, 3 * group_size), group_size)
    assert torch.equal(looked_up(native(1), weight, range(33)), weight.dequantize())


@st.composite
def weights(draw: st.DrawFn) -> QTensor:
    """Of any form, with groups that suit the panels and groups that do not."""
    form = draw(st.sampled_from(list(FORMS)))
    group_size = draw(st.sampled_from([2, 8, 16, 20, 32, 48, 64, 96, 100, 128]))
    return random_qtensor(
        form,
        (draw(st.integers(1, 40)), group_size * draw(st.integers(1, 5))),
        group_size,
        seed=draw(st.integers(0, 99)),
        largest=10.0 ** draw(st.integers(-3, 3)),
        dtype=draw(st.sampled_from([torch.float16, torch.float32])),
    )


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(weight=weights())
def test_every_packed_row_is_what_its_qtensor_stands_for(
    native: MakeNative, weight: QTensor
) -> None:
    assert_kept(native(2), weight)


@pytest.mark.parametrize("largest", [1e-30, 3e-8, 1e-6, 1e3, 1e6, 1e30])
@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"shifted"}))  # whose scales are float16
def test_scales_of_any_size_keep_their_precision(
    native: MakeNative, form: str, largest: float
) -> None:
    assert_kept(native(1), random_qtensor(form, (17, 96), 32, largest=largest, dtype=torch.float32))


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_scales_below_its_normal_range_are_kept(
    native: MakeNative, form: str
) -> None:
    weight = random_qtensor(form, (17, 64), 16, largest=6e-5)
    assert (weight.scales < 2**-14).all()
    assert weight.scales.min() > 0
    assert_kept(native(1), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_row_far_smaller_than_another_is_kept_to_a_part_of_the_largest(
    native: MakeNative, dtype: torch.dtype
) -> None:
    """Steps of float16 below its normal range are 2^-24; the largest scale is 2^13 or more."""
    weight = random_qtensor("8 bits", (3, 64), 32, largest=127.0, dtype=dtype)
    weight.scales[1] *= 2**-30 if dtype == torch.float32 else 2**-14
    found = looked_up(native(1), weight, range(3)).double()
    off = (found - weight.dequantize(torch.float64)).abs()
    bound = packing_error(weight) + 128 * 2.0**-38 * weight.scales.max().item()
    assert (off <= bound).all()


def test_negative_scales_turn_the_signs(native: MakeNative) -> None:
    """As Q3_K and Q6_K have them."""
    weight = random_qtensor("8 bits", (17, 64), 16)
    weight.scales[:, 1] *= -1
    assert_kept(native(1), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_a_float_table_are_looked_up_unchanged(
    native: MakeNative, dtype: torch.dtype
) -> None:
    table = torch.randn(33, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = [32, 0, 16, 16, 15]
    assert torch.equal(looked_up(native(1), table, ids), table[ids].float())


def test_a_weight_may_be_a_view(native: MakeNative) -> None:
    table = torch.randn(40, 33, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(looked_up(native(1), table, range(33)), table)
