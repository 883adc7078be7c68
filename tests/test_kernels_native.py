"""Native linears against the integer reference, within what float32 roundings explain.

A product W x is a chain of float32 operations on exact integer sums. Each of its terms, scale *
code * activation or min * activation, is rounded when scale meets the activation's scale, when it
becomes a product, and once for each term that is added after it: at most two a group of 16
columns or more. A bias, the residual and the reference's own result are one rounding each, so

    |error| <= gamma(2 ceil(I / 16) + 5) * sum of |terms|

in whatever order the terms are added; where packing rounds the weight, `packing_error` times the
activations comes on top. Weights that are floats have one term a column: gamma(I + 5).
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from quantized import FORMS, as_packed, gamma, magnitude, packing_error, random_qtensor
from torch import Tensor
from torch.nn.functional import silu

from llamachat.kernels import Batch, Norm
from llamachat.kernels.native import Native, instruction_sets
from llamachat.kernels.reference import Matrix, Reference, rounded
from llamachat.quant.tensor import QTensor
from llamachat.settings import native_library

Part = Tensor | QTensor
MakeNative = Callable[[int], Native]


class Integers(Reference):
    """The reference in integers, for weights in the form in which they are multiplied."""

    def __init__(self) -> None:
        super().__init__(activation_bits=8)

    def pack(self, parts: Sequence[Part], **how: Any) -> Matrix:
        return super().pack([as_packed(part) for part in parts], **how)


REFERENCE = Integers()

# (O, I, group): odd rows, rows that end within a block, groups that are no multiple of 16
SHAPES = [
    (1, 32, 32), (15, 48, 16), (17, 96, 32), (17, 96, 96), (33, 100, 100), (33, 100, 20),
    (5, 72, 8), (100, 64, 64), (33, 128, 64), (16, 256, 128), (17, 4096, 32), (3, 4096, 4096),
]  # fmt: skip
COMPILERS = ("clang-cl",) if sys.platform == "win32" else ("c++", "g++", "clang++")
TOKENS = (1, 2, 3, 5, 13, 17)


@pytest.mark.skipif(native_library() == "none", reason="native kernels are switched off")
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
def test_where_there_is_a_compiler_there_are_kernels() -> None:
    """Without them all that needs them is skipped: a build that broke would pass unseen."""
    assert "scalar" in instruction_sets()


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product_bound(x: Tensor, parts: Sequence[Part]) -> Tensor:
    """(T, O): the sum that the module's text gives, for a product without bias."""
    bounds = []
    for part in map(as_packed, parts):
        n_terms = x.shape[1] if isinstance(part, Tensor) else 2 * math.ceil(x.shape[1] / 16)
        seen = (x.double() if isinstance(part, Tensor) else rounded(x)).abs()
        error = gamma(n_terms + 5) * (magnitude(part) + packing_error(part)) + packing_error(part)
        bounds.append(seen @ error.T)
    return torch.cat(bounds, dim=1)


def assert_within(found: Tensor, expected: Tensor, bound: Tensor) -> None:
    excess = (found.double() - expected.double()).abs() - bound
    assert found.shape == expected.shape
    assert not found.isnan().any()
    assert excess.max() <= 0, f"{int((excess > 0).sum())} of {excess.numel()} too far off"


def assert_multiplies(kernels: Native, x: Tensor, parts: Sequence[Part]) -> None:
    found = kernels.linear(x, kernels.pack(parts))
    expected = REFERENCE.linear(x, REFERENCE.pack(parts))
    assert_within(found, expected, product_bound(x, parts))


@cache
def worked(form: str, shape: tuple[int, int, int]) -> tuple[QTensor, Tensor, Tensor, Tensor]:
    """A weight, activations of 512 tokens, the product and the bound of its error."""
    out, columns, group = shape
    weight, x = random_qtensor(form, (out, columns), group), random(512, columns)
    return weight, x, REFERENCE.linear(x, REFERENCE.pack([weight])), product_bound(x, [weight])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_products_are_the_reference_s(
    native: MakeNative, form: str, shape: tuple[int, int, int], threads: int
) -> None:
    weight, x, expected, bound = worked(form, shape)
    kernels = native(threads)
    packed = kernels.pack([weight])
    for n in (*TOKENS, 512) if shape[1] <= 128 else TOKENS:
        assert_within(kernels.linear(x[:n], packed), expected[:n], bound[:n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 32), (17, 48), (33, 100), (100, 7), (3, 4096)], ids=str)
def test_float_weights_multiply_unrounded_activations(
    native: MakeNative, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, x = random(*shape).to(dtype), random(17, shape[1], seed=2)
    for n in TOKENS:
        assert_multiplies(native(2), x[:n], [weight])


def extreme(form: str, code: int, columns: int) -> QTensor:
    """One row of the same code, times 1, above 0."""
    kind = FORMS[form]
    dtype = torch.uint8 if kind.bits == 4 or kind.has_min else torch.int8
    stored = code * 17 if kind.bits == 4 else code
    return QTensor(
        torch.full((1, columns * kind.bits // 8), stored, dtype=dtype),
        torch.ones(1, columns // 32),
        bits=kind.bits,
        group_size=32,
        mins=torch.zeros(1, columns // 32) if kind.has_min else None,
        codebook=torch.tensor(kind.codebook) if kind.codebook else None,
    )


@pytest.mark.parametrize("activation", [127.0, -127.0])
@pytest.mark.parametrize(
    ("form", "code", "value"),
    [
        ("4 bits", 0, -8), ("4 bits", 15, 7), ("4 bits with minimum", 15, 15),
        ("IQ4_NL", 0, -127), ("IQ4_NL", 15, 113), ("8 bits", -128, -128), ("8 bits", 127, 127),
        ("8 bits with minimum", 255, 255), ("8 bits with minimum", 0, 0),
    ],
)  # fmt: skip
def test_the_largest_codes_and_activations_do_not_saturate(
    native: MakeNative, form: str, code: int, value: int, activation: float
) -> None:
    """All sums are integers below 2^24: float32 holds them exactly."""
    kernels = native(1)
    weight = kernels.pack([extreme(form, code, 512)])
    for n in (1, 5, 17):
        found = kernels.linear(torch.full((n, 512), activation), weight)
        assert found.tolist() == [[512 * value * activation]] * n


def test_activations_half_way_between_codes_go_to_the_even_one(native: MakeNative) -> None:
    codes = torch.eye(32, dtype=torch.int8)
    weight = QTensor(codes, torch.ones(32, 1), bits=8, group_size=32)
    x = torch.tensor([[127, 0.5, 1.5, 2.5, 63.5, 125.5, -0.5, -1.5, -2.5, -63.5] + [0.0] * 22])
    found = native(1).linear(x, native(1).pack([weight]))
    assert found[0, :10].tolist() == [127, 0, 2, 2, 64, 126, 0, -2, -2, -64]


@pytest.mark.parametrize("form", FORMS)
def test_groups_without_weight_or_activation_add_nothing(native: MakeNative, form: str) -> None:
    weight, x = random_qtensor(form, (17, 96), 32), random(5, 96)
    weight.scales[:, 1] = 0
    if weight.mins is not None:
        weight.mins[:, 1] = 0
    x[1, 64:] = 0
    x[2] = 0
    kernels = native(1)
    found = kernels.linear(x, kernels.pack([weight]))
    kept = x.clone()
    kept[:, 32:64] = 7
    assert torch.equal(kernels.linear(kept, kernels.pack([weight])), found)
    assert found[2].tolist() == [0] * 17
    assert_multiplies(kernels, x, [weight])


@pytest.mark.parametrize("size", [1e-36, 1e-38, 1e-44])
def test_activations_too_small_to_divide_by_do_no_harm(native: MakeNative, size: float) -> None:
    weight, x = random_qtensor("8 bits", (17, 64), 32), random(3, 64)
    tiny = x.clone()
    tiny[:, :32] *= size
    found, without = (
        native(1).linear(given, native(1).pack([weight]))
        for given in (tiny, torch.cat((0 * x[:, :32], x[:, 32:]), dim=1))
    )
    assert torch.equal(found, without)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("form", ["4 bits", "8 bits"])
def test_a_token_that_is_no_number_shows_and_stays_alone(
    native: MakeNative, form: str, bad: float
) -> None:
    kernels, x = native(1), random(5, 64)
    packed = kernels.pack([random_qtensor(form, (17, 64), 32)])
    sound = kernels.linear(x, packed)
    x[3, 40] = bad
    found = kernels.linear(x, packed)
    assert not found[3].isfinite().any()
    assert torch.equal(found[[0, 1, 2, 4]], sound[[0, 1, 2, 4]])


MIXED: list[list[Part]] = [
    [random_qtensor("4 bits", (40, 96), 32), random_qtensor("8 bits", (17, 96), 16)],
    [
        random_qtensor("4 bits with minimum", (33, 96), 96),
        random(15, 96),
        random_qtensor("NF4", (16, 96), 48),
        random(1, 96).bfloat16(),
    ],
]


@pytest.mark.parametrize("parts", MIXED, ids=["two forms", "floats among codes"])
@pytest.mark.parametrize("threads", [1, 2])
def test_parts_of_different_forms_stack_in_one_weight(
    native: MakeNative, parts: list[Part], threads: int
) -> None:
    for n in TOKENS:
        assert_multiplies(native(threads), random(n, 96), parts)


@pytest.mark.parametrize("parts", MIXED, ids=["two forms", "floats among codes"])
def test_a_bias_is_added_to_every_token(native: MakeNative, parts: list[Part]) -> None:
    bias, x = random(sum(part.shape[0] for part in parts), seed=3), random(5, 96)
    found, expected = (k.linear(x, k.pack(parts, bias=bias)) for k in (native(1), REFERENCE))
    assert_within(found, expected, product_bound(x, parts) + gamma(3) * bias.abs().double())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, 5, 17])
def test_linear_add_changes_the_stream_in_place(native: MakeNative, form: str, n: int) -> None:
    weight, x, h = random_qtensor(form, (33, 96), 32), random(n, 96), random(n, 33, seed=2)
    streams = []
    for kernels in (native(2), REFERENCE):
        streams.append(h.clone())
        kernels.linear_add(x, kernels.pack([weight]), streams[-1])
    assert_within(*streams, product_bound(x, [weight]) + gamma(3) * streams[-1].abs().double())


def normed(h: Tensor, norm: Norm) -> Tensor:
    """RMSNorm in float64."""
    wide = h.double()
    return wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


def norm_bound(h: Tensor, norm: Norm, parts: Sequence[Part]) -> Tensor:
    """(T, O): how far a product may be off if its input is a norm computed in float32.

    D squares are summed, then come a division, eps, a root, a reciprocal and two products: each
    element is off by `slip`, relatively, and so are the scales of its groups. The code of an
    element is x * inverse; where that is within 2 slip + 4 roundings of a tie, the code may be the
    next one, and the product move by one scale times the weight.
    """
    x = normed(h, norm)
    slip = gamma(h.shape[1] + 8)
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True)
    codes = groups * (127 / largest)
    is_near = ((codes.abs() % 1) - 0.5).abs() <= codes.abs() * (2 * slip + gamma(4))
    steps = (is_near * (largest / 127)).flatten(-2)[:, : x.shape[1]]
    wide = x.abs() + steps
    bounds = []
    for part in map(as_packed, parts):
        moved = slip * wide if isinstance(part, Tensor) else 2 * slip * wide + steps
        bounds.append(moved @ (magnitude(part) + packing_error(part)).T)
    return torch.cat(bounds, dim=1) * (1 + 2**-10) + product_bound(x.float(), parts) * (1 + 2**-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 2])
def test_norm_linear_norms_before_it_rounds(native: MakeNative, form: str, threads: int) -> None:
    parts: list[Part] = [random_qtensor(form, (33, 100), 20), random(17, 100)]
    norm, h = Norm(random(100, seed=4), 1e-5), random(17, 100) * 3
    expected = REFERENCE.norm_linear(h, norm, REFERENCE.pack(parts))
    bound = norm_bound(h, norm, parts)
    for n in TOKENS:
        kernels = native(threads)
        found = kernels.norm_linear(h[:n], norm, kernels.pack(parts))
        assert_within(found, expected[:n], bound[:n])


def test_the_norm_has_its_eps_inside_the_root(native: MakeNative) -> None:
    """(1 + 3)^-1/2 is one half: the normed stream is exact, and so is the product."""
    kernels, h = native(1), torch.ones(2, 64)
    found = kernels.norm_linear(h, Norm(torch.full((64,), 6.0), 3.0), kernels.pack([torch.eye(64)]))
    assert found.tolist() == [[3.0] * 64] * 2


GATED = {
    "equal forms": ("4 bits", "4 bits"),
    "different forms": ("4 bits", "8 bits with minimum"),
    "a float gate": ("", "IQ4_NL"),
}


@pytest.mark.parametrize("hidden", [1, 16, 33, 100])
@pytest.mark.parametrize("forms", GATED.values(), ids=list(GATED))
@pytest.mark.parametrize("threads", [1, 2])
def test_swiglu_gates_before_it_multiplies(
    native: MakeNative, forms: tuple[str, str], hidden: int, threads: int
) -> None:
    """silu' is at most 1.1; silu itself is an exponential (2 ulp), a sum and a quotient."""
    shape = (hidden, 96)
    parts: list[Part] = [
        random_qtensor(form, shape, 32, seed=i, largest=0.3) if form else random(*shape) / 8
        for i, form in enumerate(forms)
    ]
    norm, h = Norm(random(96, seed=4), 1e-5), random(17, 96)
    gate, up = REFERENCE.norm_linear(h, norm, REFERENCE.pack(parts)).double().chunk(2, dim=1)
    of_gate, of_up = norm_bound(h, norm, parts).chunk(2, dim=1)
    bound = 1.1 * of_gate * (up.abs() + of_up) + of_up * silu(gate).abs()
    bound += gamma(12) * (silu(gate) * up).abs()
    kernels = native(threads)
    weight = kernels.pack(parts, gated=True)
    for n in TOKENS:
        found = kernels.norm_swiglu(h[:n], norm, weight)
        assert_within(found, (silu(gate) * up)[:n], bound[:n])


@pytest.mark.parametrize("gate", [-200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0])
def test_swiglu_is_sound_where_an_exponential_would_overflow(
    native: MakeNative, gate: float
) -> None:
    kernels, size = native(1), 32
    parts = [torch.eye(size) * gate, torch.eye(size)]
    ones, norm = torch.ones(1, size), Norm(torch.ones(size), 0.0)
    found = kernels.norm_swiglu(ones, norm, kernels.pack(parts, gated=True))
    expected = silu(torch.tensor(gate, dtype=torch.float64)).item()
    assert found.tolist() == [[pytest.approx(expected, rel=1e-6, abs=1e-35)] * size]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [[8, 0, 3], [8, 7, 6, 5, 4, 3, 2, 1, 0]], ids=str)
def test_logits_are_those_of_the_wanted_tokens_and_a_tied_table(
    native: MakeNative, form: str, tokens: list[int]
) -> None:
    table, h = random_qtensor(form, (100, 64), 32), random(9, 64)
    norm, wanted = Norm(random(64, seed=4), 1e-5), torch.tensor(tokens, dtype=torch.int32)
    kernels = native(2)
    tied = kernels.pack([table], lookup=True)
    zeros = torch.zeros(9, dtype=torch.int32)
    batch = Batch(zeros, zeros, zeros, zeros + 1, zeros, zeros.view(1, -1), wanted)
    found = kernels.run(lambda b: kernels.logits(h, norm, tied, b.wanted), batch)
    expected = REFERENCE.logits(h, norm, REFERENCE.pack([table], lookup=True), wanted)
    assert_within(found, expected, norm_bound(h[wanted.long()], norm, [table]))
