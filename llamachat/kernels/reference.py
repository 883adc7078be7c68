"""The contract in plain torch: the definition of right, on any device that torch has.

Matrices are dequantized once, to `dtype`. The residual stream, norms, rotations and logits are
float32; products accumulate in float32.

With `activation_bits=8` it defines what integer kernels compute: linears round their input to 8
bits where the weight is quantized, and products accumulate in float64, so that whatever else
differs is an error of those kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llamachat.kernels import Angles, Batch, CacheShape, Norm
from llamachat.quant.form import BITSANDBYTES, Form
from llamachat.quant.quantize import quantize
from llamachat.quant.tensor import QTensor


@dataclass(slots=True)
class Matrix:
    """A packed weight: plain rows, the same blocked for oneDNN, or both.

    Attributes:
        rows: (O, I), kept for look-up and where oneDNN is not to be had.
        blocked: (O, I) in oneDNN's own layout: half the time of `rows` for one token.
        bias: (O,) or None.
        quantized: (O,) bool, which rows were quantized, if that matters to the product.
    """

    rows: Tensor | None
    blocked: Tensor | None
    bias: Tensor | None
    quantized: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values (n_layers, K, slots, E): one head's slots lie together.

    Attributes:
        shape: of one slot.
        keys: numbers, or int8 codes.
        values: like `keys`.
        scales: (2, n_layers, K, slots) float32, of the codes of keys and of values; or None.
    """

    shape: CacheShape
    keys: Tensor
    values: Tensor
    scales: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """What is computed with."""
        return self.keys.dtype if self.scales is None else torch.float32

    def write(self, layer: int, slots: slice | Tensor, keys: Tensor, values: Tensor) -> None:
        """Keys and values (T, K, E) to the slots (T,)."""
        for i, (held, rows) in enumerate(((self.keys, keys), (self.values, values))):
            fresh = rows.transpose(0, 1)  # (K, T, E)
            if self.scales is not None:
                fresh = fresh.float()
                scale = _scale_of_8_bits(fresh)
                self.scales[i, layer][:, slots] = scale.squeeze(-1)
                fresh = torch.where(scale == 0, 0, fresh / scale).round()
            held[layer][:, slots] = fresh.to(held.dtype)

    def read(self, layer: int, slots: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (K, S, E) of the slots (S,)."""
        keys, values = self.keys[layer][:, slots], self.values[layer][:, slots]
        if self.scales is None:
            return keys, values
        key_scales, value_scales = self.scales[:, layer][:, :, slots].unsqueeze(-1)
        return keys * key_scales, values * value_scales


@dataclass(frozen=True, slots=True)
class Span:
    """One row's share of a pass: which tokens ask, which slots answer, and who sees what."""

    tokens: slice | Tensor  # of T
    slots: slice | Tensor  # S of the cache's, in order
    mask: Tensor | None  # (T, S) bool; None: every token sees all S, or T = S
    causal: bool  # token i sees the first S - T + i + 1


class Reference:
    """Every call of `Kernels`, composed from `linear`.

    Attributes:
        device: where everything is.
        dtype: of weights and of what passes between the calls.
        activation_bits: 8 rounds the input of linears with quantized weights (`rounded`);
            weights are then float64. None does not.
    """

    name = "reference"
    queues = False

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        activation_bits: Literal[8] | None = None,
    ):
        self.device = torch.device(device)
        self.dtype = dtype
        self.activation_bits = activation_bits
        self._blocks = self.device.type == "cpu" and _has_blocked_linear(dtype)
        self._stored: slice | Tensor = slice(0)  # where this pass's keys and values go
        self._spans: tuple[Span, ...] = ()

    def pack(
        self,
        parts: Sequence[Tensor | QTensor],
        *,
        bias: Tensor | None = None,
        gated: bool = False,
        lookup: bool = False,
    ) -> Matrix:
        """Stack the parts as rows; `gated` needs no other order here."""
        dtype = torch.float64 if self.activation_bits else self.dtype
        wide = torch.promote_types(dtype, torch.float32)
        plain = [p.dequantize(wide) if isinstance(p, QTensor) else p for p in parts]
        moved = [p.to(self.device, dtype) for p in plain]
        # what is looked up stays as it is; what will be blocked needs no copy of its own
        rows = torch.cat(moved) if lookup or len(moved) > 1 else moved[0]
        matrix = Matrix(rows, None, None if bias is None else bias.to(self.device, dtype))
        if self.activation_bits:
            is_quantized = torch.tensor([isinstance(p, QTensor) for p in parts])
            n_rows = torch.tensor([p.shape[0] for p in parts])
            matrix.quantized = is_quantized.repeat_interleave(n_rows).to(self.device)
        elif not lookup:
            self._block(matrix)
            matrix.rows = matrix.rows if matrix.blocked is None else None
        return matrix

    def place(self, tensor: Tensor) -> Tensor:
        """On this device; the same tensor if it is there."""
        return tensor.to(self.device)

    def quantize(self, weight: Tensor, form: Form) -> QTensor:
        """In torch, or by bitsandbytes."""
        placed = self.place(weight)
        if form.name in BITSANDBYTES:
            from llamachat.kernels import bnb

            return bnb.quantize(placed, form)
        return quantize(placed, form)

    def cache(self, shape: CacheShape, slots: int, form: str = "auto") -> Cache:
        """Memory in `dtype`; the system gives pages when they are first written."""
        size = (shape.n_layers, shape.n_kv_heads, slots, shape.head_dim)
        dtype = {
            "auto": self.dtype, "f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8,
        }[form]  # fmt: skip
        keys, values = (torch.empty(size, dtype=dtype, device=self.device) for _ in range(2))
        scales = torch.empty((2, *size[:-1]), device=self.device) if form == "int8" else None
        return Cache(shape, keys, values, scales)

    def n_bytes(self, weight: Matrix) -> int:
        """Of one of the two layouts: only one is multiplied."""
        matrix = weight.rows if weight.blocked is None else weight.blocked
        return sum(t.numel() * t.element_size() for t in (matrix, weight.bias) if t is not None)

    def slot_bytes(self, cache: Cache) -> int:
        """Codes and their scales."""
        slots = cache.keys.shape[2]
        held = (cache.keys, cache.values, cache.scales)
        return sum(tensor.nbytes for tensor in held if tensor is not None) // slots

    def run(
        self, forward: Callable[[Batch], Tensor], batch: Batch, cache: Cache | None = None
    ) -> Tensor:
        """Call `forward`; what every layer's attention needs is worked out once."""
        with torch.inference_mode():
            self._read(batch)
            return forward(batch.to(self.device))

    def then(self, action: Callable[[], object]) -> None:
        """At once."""
        action()

    def angles(self, position: Tensor, frequencies: Tensor) -> Angles:
        """(T,) times (E / 2,) -> (T, E / 2) float32 each."""
        angle = position.float().unsqueeze(-1) * frequencies
        return angle.cos(), angle.sin()

    def embed(self, batch: Batch, weight: Matrix) -> Tensor:
        """(T, D) float32."""
        assert weight.rows is not None
        return F.embedding(batch.ids, weight.rows).float()

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        """(T, I) -> (T, O) in `dtype`."""
        if weight.quantized is not None:
            return _linear_of_rounded(x, weight).to(self.dtype)
        x = x.to(self.dtype)
        if weight.blocked is None:
            self._block(weight)  # a look-up table that is the head as well
        if weight.blocked is None:
            assert weight.rows is not None
            return F.linear(x, weight.rows, weight.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, weight.blocked, weight.bias, "none", [], ""
        )
        return out

    def norm_linear(self, h: Tensor, norm: Norm, weight: Matrix) -> Tensor:
        """(T, D) float32 -> (T, O) in `dtype`."""
        return self.linear(self._norm(h, norm), weight)

    def attention(
        self, qkv: Tensor, angles: Angles, batch: Batch, cache: Cache, layer: int
    ) -> Tensor:
        """(T, (H + 2K) E) -> (T, H E)."""
        kv_heads = cache.shape.n_kv_heads
        heads = qkv.view(qkv.shape[0], -1, cache.shape.head_dim)  # (T, H + 2K, E)
        turned = _rotate(heads[:, :-kv_heads].float(), angles).to(cache.dtype)
        q, k, v = turned[:, :-kv_heads], turned[:, -kv_heads:], heads[:, -kv_heads:]
        cache.write(layer, self._stored, k, v)
        return self._attended(q, cache, layer).reshape(qkv.shape[0], -1).to(self.dtype)

    def linear_add(self, x: Tensor, weight: Matrix, h: Tensor) -> None:
        """h (T, D) float32 += W x."""
        h += self.linear(x, weight)

    def norm_swiglu(self, h: Tensor, norm: Norm, weight: Matrix) -> Tensor:
        """(T, D) -> (T, F): silu(gate) * up."""
        gate, up = self.linear(self._norm(h, norm), weight).chunk(2, dim=-1)
        return F.silu(gate) * up

    def logits(self, h: Tensor, norm: Norm, weight: Matrix, wanted: Tensor) -> Tensor:
        """(L, V) float32."""
        return self.linear(self._norm(h[wanted], norm), weight).float()

    def best(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B,)."""
        return best(logits)

    def _read(self, batch: Batch) -> None:
        """Work out what every layer's attention needs."""
        self._stored = _as_slice(batch.slot)
        self._spans = tuple(_spans(batch, self.device))

    def _attended(self, q: Tensor, cache: Cache, layer: int) -> Tensor:
        """Turned queries (T, H, E) over what their rows have stored: (T, H, E)."""
        if len(self._spans) == 1:
            span = self._spans[0]
            return self._attend(q, *cache.read(layer, span.slots), span)
        out = torch.empty_like(q)
        for span in self._spans:
            seen = cache.read(layer, span.slots)
            out[span.tokens] = self._attend(q[span.tokens], *seen, span)
        return out

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """softmax(q k^T / sqrt(E)) v for one row: q (T, H, E), keys and values (K, S, E)."""
        k, v = keys.unsqueeze(0), values.unsqueeze(0)  # (1, K, S, E)
        if q.shape[0] == 1:  # the heads that share a key are the queries: no copy of keys
            out = F.scaled_dot_product_attention(q.view(1, k.shape[1], -1, q.shape[2]), k, v)
            return out.view(q.shape)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),  # (1, H, T, E)
            k,
            v,
            attn_mask=span.mask,
            is_causal=span.causal and span.mask is None,
            enable_gqa=True,
        )
        return out.squeeze(0).transpose(0, 1)

    def _norm(self, h: Tensor, norm: Norm) -> Tensor:
        scale = torch.rsqrt(h.square().mean(-1, keepdim=True).add_(norm.eps))
        return (h * scale).mul_(norm.weight).to(self.dtype)

    def _block(self, matrix: Matrix) -> None:
        if self._blocks and matrix.rows is not None and matrix.quantized is None:
            matrix.blocked = torch.ops.mkldnn._reorder_linear_weight(matrix.rows, None)


def _has_blocked_linear(dtype: torch.dtype) -> bool:
    """Whether torch was built with oneDNN and it multiplies `dtype` from a blocked weight.

    These are the operators that torch.compile lowers linears to; their names begin with an
    underscore, so they are tried once rather than trusted.
    """
    try:
        weight, x = torch.eye(16, dtype=dtype), torch.ones(1, 16, dtype=dtype)
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        out = torch.ops.mkldnn._linear_pointwise(x, blocked, None, "none", [], "")
        return bool(torch.equal(out, x))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def best(logits: Tensor) -> Tensor:
    """The ids (B,) of the largest of logits (B, V), of equal ones the lowest."""
    if not logits.is_cpu:
        return logits.argmax(-1)
    return torch.from_numpy(logits.numpy().argmax(-1))  # ten times as fast as torch's


def rounded(x: Tensor) -> Tensor:
    """x (T, I) as 8-bit codes times scales, float64: one scale for a token's 32 columns.

    The last 32 may be fewer. All steps are float32: inverse = 127 / largest magnitude, code = x *
    inverse to the nearest integer, ties to even, scale = largest magnitude / 127.
    """
    n_columns = x.shape[-1]
    groups = F.pad(x.float(), (0, -n_columns % 32)).view(len(x), -1, 32)
    scale = _scale_of_8_bits(groups)
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(scale == 0, 0, torch.full_like(largest, 127) / largest)
    codes = (groups * inverse).round()
    return (codes.double() * scale).view(len(x), -1)[:, :n_columns]


def _scale_of_8_bits(x: Tensor) -> Tensor:
    """The largest magnitude of the last dimension / 127; 0 where that would be subnormal."""
    largest = x.abs().amax(-1, keepdim=True)
    scale = largest / torch.full_like(largest, 127)  # torch divides by numbers as it sees fit
    return torch.where(scale < torch.finfo(torch.float32).tiny, 0, scale)


def _linear_of_rounded(x: Tensor, weight: Matrix) -> Tensor:
    """W x in float64: rows that were quantized times the rounded x, others times x itself."""
    assert weight.rows is not None
    assert weight.quantized is not None
    exact, coded = (given @ weight.rows.T for given in (x.double(), rounded(x)))
    out = torch.where(weight.quantized, coded, exact)
    return out if weight.bias is None else out + weight.bias


def _rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn the pairs (x[i], x[i + E/2]) of x (T, heads, E) by the angles of each token."""
    cos, sin = (a.unsqueeze(1) for a in angles)  # (T, 1, E / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def _spans(batch: Batch, device: torch.device) -> Iterator[Span]:
    """Sort a pass by rows; masks are made on `device`."""
    row_of = batch.row.tolist()
    for row in sorted(set(row_of)):
        tokens = torch.tensor([i for i, r in enumerate(row_of) if r == row])
        seen = batch.seen[tokens]
        longest = int(seen.max())
        slots = _as_slice(batch.table[row, :longest])
        causal = torch.equal(seen.long(), torch.arange(longest - len(seen), longest) + 1)
        mask = None
        if int(seen.min()) < longest and not (causal and len(seen) == longest):
            there = seen.to(device, non_blocking=True)  # the passes before are not waited for
            mask = torch.arange(longest, device=device) < there.unsqueeze(1)
        yield Span(_as_slice(tokens), slots, mask, causal)


def _as_slice(index: Tensor) -> slice | Tensor:
    """Consecutive indices as a slice, which reads and writes without a copy."""
    first, last = int(index[0]), int(index[-1])
    if last - first + 1 == len(index) and bool((index.diff() == 1).all()):
        return slice(first, last + 1)
    return index.long()
