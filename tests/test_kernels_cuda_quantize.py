"""int8 and int4 as the GPU searches them, on the CPU: the lanes of each warp take turns there."""

from __future__ import annotations

import pytest
import torch
from emulated import COMPILER, Compiler
from torch import Tensor

from llamachat.kernels.cuda.quantize import quantize
from llamachat.quant.form import Form
from llamachat.quant.quantize import quantize as expected_of
from llamachat.quant.tensor import QTensor

FORMS = [Form("int8"), Form("int4"), Form("int8", 256), Form("int8", 192), Form("int4", 16)]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler on Linux")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return Compiler(tmp_path_factory.mktemp("kernels"))


def ids(form: Form) -> str:
    return f"{form.name}-g{form.group_size}"


def random_matrix(rows: int, columns: int) -> Tensor:
    """Gaussian with a few outliers, as trained weights are."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (1 + 3 * (torch.rand(rows, columns, generator=generator) > 0.98)) * 0.02


def squared_errors(weight: Tensor, q: QTensor) -> Tensor:
    """Of each group."""
    return (weight - q.dequantize()).double().view(*q.scales.shape, -1).square().sum(-1)


def grouped_codes(q: QTensor) -> Tensor:
    return q.codes.view(*q.scales.shape, -1)


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_codes_are_the_cpu_s_but_where_two_scales_are_as_good(
    compiler: Compiler, form: Form
) -> None:
    """At 8 bits errors are so small a part of sums that float32 does not tell some scales apart."""
    weight = random_matrix(9, 7 * form.group_size)  # of the last warp only some have a group
    found, expected = quantize(weight, form, compiler.kernel), expected_of(weight, form)
    is_same = found.scales == expected.scales
    assert is_same.double().mean() >= (0.85 if form.bits == 8 else 1)
    assert torch.equal(grouped_codes(found)[is_same], grouped_codes(expected)[is_same])
    errors, best = squared_errors(weight, found), squared_errors(weight, expected)
    assert bool((errors <= 1.05 * best).all())
    assert errors.sum() < 1.001 * best.sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_of_any_type_are_read_as_they_are(compiler: Compiler, dtype: torch.dtype) -> None:
    weight = random_matrix(4, 96).to(dtype)
    found = quantize(weight, Form("int4"), compiler.kernel)
    expected = quantize(weight.float(), Form("int4"), compiler.kernel)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)


EXTREMES = {
    "zeros": torch.zeros(32),
    "one value": torch.full((32,), -0.7),
    "one spike": torch.eye(32)[5],
    "two signs": torch.tensor([1.0, -1.0]).repeat(16),
    "all positive": torch.linspace(1, 2, 32),
    "least float16": torch.full((32,), 2.0**-24),
    "subnormal": torch.linspace(-1e-39, 1e-39, 32),
    "largest allowed": torch.linspace(-7e6, 7e6, 32),
    "largest of float16": torch.linspace(-8.31e6, 8.31e6, 32),
    "beyond float16": torch.linspace(-8.5e6, 8.5e6, 32),
    "whose squares are infinite": torch.linspace(-1e30, 1e30, 32),
    "infinite": torch.tensor([torch.inf, *[1.0] * 31]),
    "no number": torch.tensor([torch.nan, *[1.0] * 31]),
}


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("kind", EXTREMES)
def test_extremes_become_what_they_do_on_the_cpu(compiler: Compiler, kind: str, name: str) -> None:
    weight, form = EXTREMES[kind].view(1, 32), Form(name)  # type: ignore[arg-type]
    found, expected = quantize(weight, form, compiler.kernel), expected_of(weight, form)
    values, others = found.dequantize(), expected.dequantize()
    assert bool(values.isfinite().all())
    assert not (expected.scales == 0).logical_xor(found.scales == 0).any()
    if not (values == others).all():
        assert (weight - values).norm() <= (weight - others).norm() * 1.0001


def test_a_group_does_not_depend_on_those_beside_it(compiler: Compiler) -> None:
    weight = random_matrix(5, 224)
    whole = quantize(weight, Form("int4"), compiler.kernel)
    weight[:, :32], weight[:, 64:] = torch.nan, 1e9
    alone = quantize(weight, Form("int4"), compiler.kernel)
    assert torch.equal(alone.scales[:, 1], whole.scales[:, 1])
    assert torch.equal(alone.codes[:, 16:32], whole.codes[:, 16:32])
