"""The reference kernels against worked numbers, plain loops, and separate runs of each row."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from rows import Rows, alone
from torch import Tensor

from llamachat.kernels import Batch, CacheShape, Norm
from llamachat.kernels.reference import Reference
from llamachat.model.decoder import Decoder
from llamachat.quant.tensor import QTensor

K, H, E = 2, 4, 8  # kv heads, heads, head_dim


def test_rms_norm_gives_the_worked_numbers() -> None:
    kernels = Reference()
    identity = kernels.pack([torch.eye(4)])
    h = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    found = kernels.norm_linear(h, Norm(torch.ones(4), 1e-5), identity)
    assert found[0].tolist() == pytest.approx([0.365148, 0.730296, 1.095444, 1.460593], abs=1e-6)


def test_the_norm_multiplies_by_its_weight_and_has_eps_inside_the_root() -> None:
    kernels = Reference()
    h, weight = torch.tensor([[1.0, 1.0]]), torch.tensor([2.0, 3.0])
    found = kernels.norm_linear(h, Norm(weight, eps=3.0), kernels.pack([torch.eye(2)]))
    assert found[0].tolist() == pytest.approx([1.0, 1.5])


@pytest.mark.parametrize(("gate", "up", "expected"), [(2, 3, 5.284782), (-1, 2, -0.537883)])
def test_swiglu_gates_before_it_multiplies(gate: float, up: float, expected: float) -> None:
    kernels = Reference()
    weight = kernels.pack([torch.tensor([[gate]]), torch.tensor([[up]])], gated=True)
    found = kernels.norm_swiglu(torch.tensor([[1.0]]), Norm(torch.ones(1), 1e-12), weight)
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_linear_add_changes_the_stream_in_place() -> None:
    kernels = Reference()
    h = torch.tensor([[1.0, 2.0]])
    weight = kernels.pack([torch.tensor([[3.0], [5.0]])], bias=torch.tensor([0.5, 0.25]))
    kernels.linear_add(torch.tensor([[2.0]]), weight, h)
    assert h.tolist() == [[7.5, 12.25]]


def test_quantized_and_plain_parts_stack_in_one_weight() -> None:
    kernels = Reference()
    codes = torch.tensor([[1, -2], [127, 0]], dtype=torch.int8)
    quantized = QTensor(codes, torch.tensor([[0.5], [2.0]]), bits=8, group_size=2)
    weight = kernels.pack([quantized, torch.tensor([[4.0, 8.0]])])
    found = kernels.linear(torch.eye(2), weight)
    assert found.T.tolist() == [[0.5, -1.0], [254.0, 0.0], [4.0, 8.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_blocked_weights_multiply_as_plain_ones_do(dtype: torch.dtype, n_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(77, 40, generator=generator)
    x = torch.randn(n_tokens, 40, generator=generator).to(dtype)
    kernels = Reference(dtype=dtype)
    found, expected = (
        kernels.linear(x, kernels.pack([rows])),
        x.double() @ rows.to(dtype).double().T,
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


INTEGERS = Reference(activation_bits=8)


def identity(size: int) -> QTensor:
    codes = torch.eye(size, dtype=torch.int8)
    return QTensor(codes, torch.ones(size, 1), bits=8, group_size=size)


def test_activations_become_8_bits_in_groups_of_32_columns_with_ties_to_even() -> None:
    """The first scale is 1; the second group has two columns and 1 / 127: 0.5 is code 63.5."""
    first = [127.0, -127.0, 1.4, -2.6, 2.5, 3.5, -0.5, 0.0] + [0.0] * 24
    x = torch.tensor([[*first, 1.0, 0.5]])
    found = INTEGERS.linear(x, INTEGERS.pack([identity(34)]))
    assert found[0, :8].tolist() == [127, -127, 1, -3, 2, 4, 0, 0]
    assert found[0, 32:].tolist() == pytest.approx([1.0, 64 / 127])


def test_groups_of_no_size_or_next_to_none_become_zeros() -> None:
    x = torch.zeros(1, 64)
    x[0, 32:] = 1e-39
    assert not INTEGERS.linear(x, INTEGERS.pack([identity(64)])).any()


def test_activations_keep_their_digits_for_rows_that_were_not_quantized() -> None:
    weight = INTEGERS.pack([identity(2), torch.eye(2)], bias=torch.tensor([0.0, 0.0, 8.0, 0.0]))
    found = INTEGERS.linear(torch.tensor([[1.0, 0.3]]), weight)
    assert found[0].tolist() == pytest.approx([1.0, 38 / 127, 9.0, 0.3])


def test_an_int8_cache_keeps_each_head_row_with_a_scale_of_its_own() -> None:
    kernels = Reference()
    cache = kernels.cache(CacheShape(1, 1, 4), slots=3, form="int8")
    keys = torch.tensor([[[1.0, 0.3, -0.6, 0.0]], [[0.0, 0.0, 0.0, 0.0]]])
    cache.write(0, torch.tensor([2, 0]), keys, keys * 254)
    found, values = cache.read(0, torch.tensor([0, 2]))
    assert found[0].tolist() == [[0, 0, 0, 0], pytest.approx([1.0, 38 / 127, -76 / 127, 0.0])]
    assert values[0, 1].tolist() == pytest.approx([254.0, 76.0, -152.0, 0.0])


def attended(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One head's softmax(q k^T / sqrt(E)) v in float64: q (E,), keys and values (S, E)."""
    scores = keys.double() @ q.double() / math.sqrt(len(q))
    return scores.softmax(0) @ values.double()


@pytest.mark.parametrize("n_tokens", [1, 4])
def test_attention_over_scattered_slots_is_that_of_plain_loops(n_tokens: int) -> None:
    """Three tokens were there before; slots lie in no order, and others are full of NaN.

    From the first slot to the last it is as far as if they were in order.
    """
    generator = torch.Generator().manual_seed(0)
    kernels, n_seen = Reference(), 3 + n_tokens
    cache = kernels.cache(CacheShape(1, K, E), slots=16)
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    slots = torch.tensor([4, 9, 2, 7, 5, 0, 10][:n_seen], dtype=torch.int32)
    past = torch.randn(2, 3, K, E, generator=generator)
    cache.keys[0, :, slots[:3].long()] = past[0].transpose(0, 1)
    cache.values[0, :, slots[:3].long()] = past[1].transpose(0, 1)
    qkv = torch.randn(n_tokens, H + 2 * K, E, generator=generator)
    seen = torch.arange(4, n_seen + 1, dtype=torch.int32)
    zeros = torch.zeros(n_tokens, dtype=torch.int32)
    table = torch.full((1, 16), 7, dtype=torch.int32)
    table[0, :n_seen] = slots
    batch = Batch(zeros, zeros, slots[3:], seen, seen - 1, table, zeros[:1])
    still = torch.ones(n_tokens, E // 2), torch.zeros(n_tokens, E // 2)  # turned by nothing
    found = kernels.run(
        lambda b: kernels.attention(qkv.view(n_tokens, -1), still, b, cache, 0), batch
    ).view(n_tokens, H, E)
    keys = torch.cat((past[0], qkv[:, H : H + K]))  # (S, K, E)
    values = torch.cat((past[1], qkv[:, H + K :]))
    for token in range(n_tokens):
        for head in range(H):
            kv, end = head // (H // K), 4 + token
            expected = attended(qkv[token, head], keys[:end, kv], values[:end, kv])
            assert torch.allclose(found[token, head].double(), expected, atol=1e-6)


def same(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def test_rows_of_different_length_in_one_pass_are_as_if_run_alone(
    random_decoder: Callable[..., Decoder],
) -> None:
    decoder = random_decoder()
    texts = [[5, 9, 17, 3], [40], [22, 8, 61, 30, 2, 7]]
    turns = [(row, text[i]) for i in range(6) for row, text in enumerate(texts) if i < len(text)]
    logits = Rows(decoder, 3).run(turns)
    for row, text in enumerate(texts):
        last = max(i for i, (at, _) in enumerate(turns) if at == row)
        assert same(logits[last], alone(decoder, text))


def test_forked_rows_share_a_prefix_and_go_their_own_ways(
    random_decoder: Callable[..., Decoder],
) -> None:
    decoder, prefix = random_decoder(), [5, 9, 17, 3, 33]
    rows = Rows(decoder, 3)
    rows.run([(0, token) for token in prefix])
    rows.slots.fork([0, 0, 0])
    rows.run([(1, 50), (0, 10), (2, 20), (1, 51)])
    logits = rows.run([(0, 11), (1, 52), (2, 21)])
    tails = [[10, 11], [50, 51, 52], [20, 21]]
    for row, tail in enumerate(tails):
        assert same(logits[row], alone(decoder, prefix + tail))


def test_reordered_rows_go_on_from_their_parents(random_decoder: Callable[..., Decoder]) -> None:
    decoder = random_decoder()
    rows = Rows(decoder, 2)
    rows.run([(0, 5), (1, 6), (0, 7), (1, 8)])
    rows.slots.fork([1, 0])
    logits = rows.run([(0, 30), (1, 31)])
    assert same(logits[0], alone(decoder, [6, 8, 30]))
    assert same(logits[1], alone(decoder, [5, 7, 31]))


def test_slots_that_were_given_back_are_used_again(random_decoder: Callable[..., Decoder]) -> None:
    decoder = random_decoder()
    rows = Rows(decoder, 2)
    rows.run([(0, 5), (1, 6), (0, 7), (1, 8), (0, 9)])
    rows.slots.truncate(0, 1)
    logits = rows.run([(0, 40), (1, 41), (0, 42)])
    assert same(logits[2], alone(decoder, [5, 40, 42]))
    assert same(logits[1], alone(decoder, [6, 8, 41]))


@pytest.mark.parametrize(("form", "bound"), [("f32", 1e-6), ("bf16", 3e-2), ("int8", 3e-2)])
def test_a_cache_form_changes_logits_by_its_rounding_alone(
    random_decoder: Callable[..., Decoder], form: str, bound: float
) -> None:
    decoder, ids = random_decoder(), [5, 9, 17, 3, 33]
    rows = Rows(decoder, form=form)
    found, expected = rows.run([(0, token) for token in ids])[-1], alone(decoder, ids)
    assert (found - expected).abs().max() <= bound * expected.abs().max()
