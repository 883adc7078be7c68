"""The contract between the decoder and whatever computes it.

The model is written once (`model/decoder.py`), in five fused calls a layer; a backend is one
object with these methods. `reference.py` composes all of them from `linear` in plain torch and is
the definition of right; another backend overrides what it does better.

Shapes: T new tokens, S cached and new, D dim, H heads, K kv heads, E head_dim, F hidden_dim,
V vocab, (O, I) weight out x in, B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from llamachat.quant.form import Form

if TYPE_CHECKING:  # which backends there are is known without torch
    import torch
    from torch import Tensor

    from llamachat.quant.tensor import QTensor

Weight = Any  # opaque: only the backend that packed it reads it
Cache = Any
Act = Any  # an activation in whatever form the backend passes from one call to the next


@dataclass(frozen=True)
class Batch:
    """One pass: T tokens of B rows; int32, fixed shapes.

    It is made on the host; a backend brings it to where it computes.

    Attributes:
        ids: (T,) token ids; on the device already, of any integer type, where they were chosen
            there and the host has not read them (`Kernels.queues`).
        row: (T,) the row each token belongs to.
        slot: (T,) the cache slot its key and value go to.
        seen: (T,) how many entries of its row's table it attends to (causal: position + 1).
        position: (T,) what rope turns by; the decoder makes it angles once a pass. (T, 2) where
            it turns by two.
        table: (B, C) cache slots of each row, in order; entries past a row's length are unread.
        wanted: (L,) indices of the tokens whose logits are returned.
    """

    ids: Tensor
    row: Tensor
    slot: Tensor
    seen: Tensor
    position: Tensor
    table: Tensor
    wanted: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        if self.ids.device == self.table.device == device:
            return self
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one slot of the cache holds: a key and a value for every layer."""

    n_layers: int
    n_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm: weight (D,) float32 and the epsilon inside the root."""

    weight: Tensor
    eps: float


Angles: TypeAlias = "tuple[Tensor, Tensor]"  # cos and sin, (T, E / 2) float32 each


class Kernels(Protocol):
    """One backend on one device. Weights, caches and acts are its own and opaque to others."""

    @property
    def name(self) -> str:
        """What people call it: "reference", "native", "cuda"..."""
        ...

    @property
    def device(self) -> torch.device:
        """Where weights are, and logits will be."""
        ...

    @property
    def queues(self) -> bool:
        """Whether `run` comes back before the pass is over, and takes ids that are on the way."""
        ...

    def pack(
        self,
        parts: Sequence[Tensor | QTensor],
        *,
        bias: Tensor | None = None,
        gated: bool = False,
        lookup: bool = False,
    ) -> Weight:
        """One weight (sum of O, I) from parts stacked along O.

        `gated`: the parts are gate and up of a SwiGLU; `lookup`: `embed` will read it too.
        """
        ...

    def place(self, tensor: Tensor) -> Tensor:
        """What was read of a file, where it is worked on before it is packed."""
        ...

    def quantize(self, weight: Tensor, form: Form) -> QTensor:
        """(O, I) floats, which must be finite, in a form that `pack` takes."""
        ...

    def cache(self, shape: CacheShape, slots: int, form: str) -> Cache:
        """Memory for `slots` keys and values a layer, reserved but not touched; form "auto"..."""
        ...

    def n_bytes(self, weight: Weight) -> int:
        """What one product reads of a weight."""
        ...

    def slot_bytes(self, cache: Cache) -> int:
        """What a pass reads of a cache for each token of context, in all layers."""
        ...

    def run(
        self, forward: Callable[[Batch], Tensor], batch: Batch, cache: Cache | None = None
    ) -> Tensor:
        """One pass of `forward`, which calls nothing but this backend.

        With a `cache` the pass is the same for every batch of its shape over that cache, so it may
        be recorded and replayed: a CUDA graph, a native program. Others just call it.
        """
        ...

    def then(self, action: Callable[[], object]) -> None:
        """Do `action` once all that was called before is computed: of a recorded pass each time.

        It works in place on what calls have returned, and on tensors of its own.
        """
        ...

    def angles(self, position: Tensor, frequencies: Tensor) -> Angles:
        """Cos and sin of position (T,) times frequencies (E / 2,)."""
        ...

    def embed(self, batch: Batch, weight: Weight) -> Tensor:
        """The hidden state (T, D) of `batch.ids`; `weight` may also be the tied head."""
        ...

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """(T, I) -> (T, O), of floats of any width."""
        ...

    def norm_linear(self, h: Tensor, norm: Norm, weight: Weight) -> Act:
        """RMSNorm, then one linear: (T, D) -> (T, (H + 2K) E), q | k | v."""
        ...

    def attention(self, qkv: Act, angles: Angles, batch: Batch, cache: Cache, layer: int) -> Act:
        """Turn q and k, store k and v, attend over the table: -> (T, H E)."""
        ...

    def linear_add(self, x: Act, weight: Weight, h: Tensor) -> None:
        """Add W x to h (T, D), in place."""
        ...

    def norm_swiglu(self, h: Tensor, norm: Norm, weight: Weight) -> Act:
        """RMSNorm, gate and up in one linear, silu(gate) * up: (T, D) -> (T, F)."""
        ...

    def logits(self, h: Tensor, norm: Norm, weight: Weight, wanted: Tensor) -> Tensor:
        """Final norm and head for the rows `wanted` only: (L, V) float32."""
        ...

    def best(self, logits: Tensor) -> Tensor:
        """The ids (B,) of the largest of logits (B, V), of equal ones the lowest: int64."""
        ...
