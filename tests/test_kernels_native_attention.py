"""Native attention against softmax(q k^T / sqrt(E)) v in float64, within float32 roundings.

A score is a chain of E products of a turned and scaled query with a turned key: 5 and 3 roundings
of its factors (angles, 1 / sqrt(E), a key's scale), then E additions, so it is off by at most
gamma(E + 8) times the sum of magnitudes. A weight is e^(score - largest): the difference is rounded
(relative to the range of scores), e^x is right to 2 ulp, and each block of 128 entries may scale
what came before by another such power. Both the weighted sum and the sum of weights are chains of
at most S + 2 S / 128 additions. If a weight is off by `slip` relatively, a mean is off by at most
2 slip / (1 - slip) times the mean of magnitudes.

Where a set multiplies bfloat16 in pairs, queries are rounded to it once they are float32, and
weights before they are summed: a slip of 2^-8 more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import pytest
import torch
from quantized import gamma
from torch import Tensor

from llamachat.kernels import Batch, Cache, CacheShape
from llamachat.kernels.native import Native

MakeNative = Callable[[int], Native]
FORMS = ("f32", "bf16", "int8")
HEADS = {"gqa": (4, 2, 8), "mqa": (3, 1, 20), "mha": (2, 2, 64), "wide": (6, 2, 128)}  # H, K, E
ROUNDING = 2**-24
PAIRS = "avx512bf16"  # the set that multiplies bfloat16 in pairs


def as_cached(x: Tensor, form: str) -> Tensor:
    """Head rows (..., E) as a cache of this form gives them back, float64."""
    if form == "int8":
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round().double() * scale
    return (x.bfloat16() if form == "bf16" else x).double()


@dataclass(frozen=True, eq=False)
class Text:
    """Tokens of several rows in the order in which they are written, each with its slot.

    Attributes:
        heads: H, K, E.
        qkv: (N, H + 2K, E) float32.
        angles: cos and sin (N, E / 2).
        row: (N,) int32.
        slot: (N,) int32, all different.
    """

    heads: tuple[int, int, int]
    qkv: Tensor
    angles: tuple[Tensor, Tensor]
    row: Tensor
    slot: Tensor

    def new_cache(self, kernels: Native, form: str, layers: int = 1) -> Cache:
        _, kv_heads, head_dim = self.heads
        return kernels.cache(CacheShape(layers, kv_heads, head_dim), int(self.slot.max()) + 1, form)

    def run(self, kernels: Native, cache: Cache, tokens: Sequence[int], layer: int = 0) -> Tensor:
        """One pass of these tokens: (T, H, E)."""
        return self._run(kernels, cache, tokens, layer, self._seen[list(tokens)])

    def store(self, kernels: Native, cache: Cache, tokens: Sequence[int]) -> None:
        """Write keys and values in a pass that is cheap: each token sees one entry only."""
        self._run(kernels, cache, tokens, 0, torch.ones(len(tokens), dtype=torch.int32))

    def _run(
        self, kernels: Native, cache: Cache, tokens: Sequence[int], layer: int, seen: Tensor
    ) -> Tensor:
        at = torch.tensor(tokens)
        zeros = torch.zeros(len(at), dtype=torch.int32)
        batch = Batch(zeros, self.row[at], self.slot[at], seen, zeros, self._table, zeros[:1])
        qkv, turn = self.qkv[at].flatten(1), (self.angles[0][at], self.angles[1][at])
        out = kernels.run(lambda b: kernels.attention(qkv, turn, b, cache, layer), batch)
        return out.view(len(at), self.heads[0], self.heads[2])

    @cached_property
    def _seen(self) -> Tensor:
        """(N,) int32: how many entries of its row each token sees."""
        rows = self.row.unsqueeze(1) == torch.arange(int(self.row.max()) + 1)
        return rows.cumsum(0)[rows].int()

    @cached_property
    def _table(self) -> Tensor:
        """Slots of each row; what is past its end is somebody else's."""
        rows = [self.slot[self.row == row] for row in range(int(self.row.max()) + 1)]
        table = torch.full((len(rows), max(map(len, rows)) + 3), int(self.slot[0]))
        for row, slots in enumerate(rows):
            table[row, : len(slots)] = slots
        return table.int()

    def answers(self, tokens: Sequence[int], form: str, *, pairs: bool) -> tuple[Tensor, Tensor]:
        """(T, H, E) as plain float64 gives it, and how far float32 may be off.

        With `pairs` queries and weights are rounded to bfloat16.
        """
        (n_heads, kv_heads, head_dim), at = self.heads, torch.tensor(tokens)
        sees = (self.row == self.row[at].unsqueeze(1)) & (
            torch.arange(len(self.row)) <= at[:, None]
        )
        seen = sees.any(0).nonzero().squeeze(1)
        hidden = ~sees[:, seen].unsqueeze(1)  # (T, 1, S)
        of_head = torch.arange(n_heads) // (n_heads // kv_heads)
        keys = as_cached(self.qkv[seen, n_heads : n_heads + kv_heads], form)[:, of_head]
        values = as_cached(self.qkv[seen, n_heads + kv_heads :], form)[:, of_head]  # (S, H, E)
        asked, scale = self.qkv[at, :n_heads], 1 / torch.tensor(float(head_dim)).sqrt()
        queries = self._turned(asked.double(), at) / math.sqrt(head_dim)
        if pairs:
            queries = (self._turned(asked, at) * scale).bfloat16().double()
        scores = torch.einsum("the,she->ths", queries, self._turned(keys, seen))
        magnitudes = scale * torch.einsum(
            "the,she->ths", self._turned_magnitudes(asked, at), self._turned_magnitudes(keys, seen)
        )
        span = scores.masked_fill(hidden, -math.inf).amax(-1, keepdim=True) - scores
        span = span.masked_fill(hidden, 0).amax(-1, keepdim=True)
        n_seen = sees.sum(1).double().view(-1, 1, 1)
        n_blocks = (n_seen / 128).ceil()
        exponent = gamma(head_dim + 8) * magnitudes.masked_fill(hidden, 0).amax(-1, keepdim=True)
        exponent += 2 * ROUNDING * span
        slip = exponent.expm1() + gamma(n_seen + 8 * n_blocks + 6) + pairs * 2**-8
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)  # (T, H, S)
        found, size = (torch.einsum("ths,she->the", weights, v) for v in (values, values.abs()))
        return found, 2 * slip / (1 - slip) * size + 1e-30

    def _turned(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (S, heads, E) turned by the angles of tokens (S,), in its own precision."""
        cos, sin = (a[tokens].to(x.dtype).unsqueeze(1) for a in self.angles)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    def _turned_magnitudes(self, x: Tensor, tokens: Tensor) -> Tensor:
        cos, sin = (a[tokens].double().abs().unsqueeze(1) for a in self.angles)
        a, b = x.double().abs().chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, a * sin + b * cos), dim=-1)


@cache
def random_text(
    heads: tuple[int, int, int],
    rows: tuple[int, ...],
    *,
    turning: bool = False,
    scattered: bool = True,
    spare: int = 0,
) -> Text:
    """Tokens of these rows; slots in no order, or one after the other; `spare` are left free."""
    generator = torch.Generator().manual_seed(len(rows))
    n_heads, kv_heads, head_dim = heads
    shape = (len(rows), n_heads + 2 * kv_heads, head_dim)
    angle = torch.rand(len(rows), head_dim // 2, generator=generator) * 6.3 * turning
    order = torch.randperm(len(rows) + spare, generator=generator)
    slots = order[: len(rows)] if scattered else torch.arange(len(rows))
    return Text(
        heads,
        torch.randn(shape, generator=generator) * 2,
        (angle.cos(), angle.sin()),
        torch.tensor(rows, dtype=torch.int32),
        slots.int(),
    )


@cache
def answers(
    text: Text, tokens: tuple[int, ...], form: str, *, pairs: bool
) -> tuple[Tensor, Tensor]:
    return text.answers(tokens, form, pairs=pairs)


def assert_answers(
    kernels: Native, text: Text, form: str, tokens: Sequence[int], found: Tensor
) -> None:
    pairs = form == "bf16" and kernels.isa == PAIRS
    expected, bound = answers(text, tuple(tokens), form, pairs=pairs)
    excess = (found.double() - expected).abs() - bound
    assert not found.isnan().any()
    assert excess.max() <= 0, f"{int((excess > 0).sum())} of {excess.numel()} too far off"


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 1000])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_last_tokens_of_a_context_attend_to_all_of_it(
    native: MakeNative, form: str, length: int, threads: int
) -> None:
    """Slots of odd contexts are scattered, and their heads no multiple of 16."""
    kernels, odd = native(threads), length % 2 == 1
    text = random_text(HEADS["gqa" if odd else "mha"], (0,) * length, scattered=odd)
    cache = text.new_cache(kernels, form)
    text.store(kernels, cache, range(length))
    for n in (1, 3, 20):
        tokens = range(max(0, length - n), length)
        assert_answers(kernels, text, form, tokens, text.run(kernels, cache, tokens))


@pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_prompt_attends_to_itself_and_its_past(
    native: MakeNative, form: str, heads: tuple[int, int, int], threads: int
) -> None:
    kernels, text = native(threads), random_text(heads, (0,) * 150, scattered=False)
    cache = text.new_cache(kernels, form)
    for tokens in (range(140), range(140, 149), range(149, 150)):
        found = text.run(kernels, cache, tokens)
        asked = [t for t in (0, 15, 16, 63, 127, 128, 139, 140, 148, 149) if t in tokens]
        assert_answers(kernels, text, form, asked, found[[t - tokens[0] for t in asked]])


@pytest.mark.parametrize("form", FORMS)
def test_a_context_of_8000_tokens_is_attended_to(native: MakeNative, form: str) -> None:
    kernels, text = native(2), random_text((2, 1, 64), (0,) * 8000, scattered=False)
    cache = text.new_cache(kernels, form)
    text.store(kernels, cache, range(8000))
    for tokens in (range(7999, 8000), range(7997, 8000)):
        assert_answers(kernels, text, form, tokens, text.run(kernels, cache, tokens))


@pytest.mark.parametrize("which", [0, 1], ids=["cos", "sin"])
def test_angles_are_those_of_positions_times_frequencies(native: MakeNative, which: int) -> None:
    """The product is rounded, and then a cosine or sine that is right to 2 ulp of 1."""
    kernels, frequencies = native(1), 1e4 ** -(torch.arange(10) / 10)
    position = torch.tensor([0, 1, 4097, 7, 100_000, 31], dtype=torch.int32)
    batch = Batch(*[position] * 5, position.view(1, -1), position)
    found = kernels.run(lambda b: kernels.angles(b.position, frequencies)[which], batch)
    angle = position.double().unsqueeze(1) * frequencies.double()
    expected = angle.sin() if which else angle.cos()
    assert ((found - expected).abs() <= ROUNDING * (angle + 4)).all()


@pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))
@pytest.mark.parametrize("n", [1, 20])
def test_queries_and_keys_are_turned_by_their_positions(
    native: MakeNative, heads: tuple[int, int, int], n: int
) -> None:
    kernels, text = native(1), random_text(heads, (0,) * 40, turning=True)
    cache = text.new_cache(kernels, "f32")
    text.run(kernels, cache, range(40 - n))
    tokens = range(40 - n, 40)
    assert_answers(kernels, text, "f32", tokens, text.run(kernels, cache, tokens))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_in_one_pass_see_nothing_of_each_other(
    native: MakeNative, form: str, threads: int
) -> None:
    """Short and long rows, token by token in turn; then one more token of each."""
    kernels = native(threads)
    rows = [row for i in range(140) for row, length in enumerate((140, 17, 1, 60)) if i < length]
    text = random_text(HEADS["gqa"], (*rows, 0, 1, 2, 3), spare=20)
    cache, n = text.new_cache(kernels, form), len(rows)
    found = text.run(kernels, cache, range(n))
    asked = [*range(0, n, 37), n - 1]
    assert_answers(kernels, text, form, asked, found[asked])
    last = range(n, n + 4)
    assert_answers(kernels, text, form, last, text.run(kernels, cache, last))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("heads", ["mqa", "mha"])
@pytest.mark.parametrize("scattered", [True, False], ids=["among", "after"])
def test_slots_that_nobody_sees_may_hold_anything(
    native: MakeNative, form: str, n: int, heads: str, *, scattered: bool
) -> None:
    """Row 1 shares lines of the cache with row 0, and is full of what spoils all it meets."""
    kernels = native(2)
    text = random_text(HEADS[heads], (0,) * 69 + (1,) * 50, scattered=scattered)
    spoilt = text.qkv.clone()
    spoilt[69:] = 1e30 if form == "int8" else math.nan
    text = replace(text, qkv=spoilt)
    cache = text.new_cache(kernels, form)
    text.store(kernels, cache, range(69, 119))
    text.store(kernels, cache, range(69 - n))
    tokens = range(69 - n, 69)
    assert_answers(kernels, text, form, tokens, text.run(kernels, cache, tokens))


@pytest.mark.parametrize("form", FORMS)
def test_layers_keep_their_keys_and_values_apart(native: MakeNative, form: str) -> None:
    kernels, text = native(1), random_text(HEADS["gqa"], (0,) * 20)
    cache = text.new_cache(kernels, form, layers=2)
    last = text.run(kernels, cache, range(20))[19:]
    replace(text, qkv=text.qkv + 1).run(kernels, cache, range(20), layer=1)
    assert torch.equal(text.run(kernels, cache, [19]), last)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_give_the_mean_of_nothing(native: MakeNative, form: str) -> None:
    kernels, text = native(1), random_text(HEADS["gqa"], (0,) * 20)
    text = replace(text, qkv=torch.zeros_like(text.qkv))
    found = text.run(kernels, text.new_cache(kernels, form), range(20))
    assert not found.any()


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_of_equal_values_is_that_value(native: MakeNative, form: str) -> None:
    """Weights are summed as they are multiplied, to whatever form they were rounded."""
    kernels, text = native(1), random_text(HEADS["gqa"], (0,) * 301)
    qkv = text.qkv.clone()
    qkv[:, -2:] = 3
    text = replace(text, qkv=qkv)
    found = text.run(kernels, text.new_cache(kernels, form), range(301))
    assert (found / 3 - 1).abs().max() <= 3 * gamma(301)


def test_scores_far_apart_leave_the_largest_alone(native: MakeNative) -> None:
    """e^-1000 is nothing in float32, and e^1000 must never be computed."""
    kernels, text = native(1), random_text((1, 1, 64), (0,) * 300, scattered=False)
    qkv = text.qkv.clone()
    qkv[:, :2] = 0
    qkv[:, 0, 0], qkv[:, 1, 0], qkv[170, 1, 0] = 800, -10, 10
    text = replace(text, qkv=qkv)
    cache = text.new_cache(kernels, "f32")
    found = text.run(kernels, cache, range(300))
    assert torch.equal(found[299, 0], qkv[170, 2])
