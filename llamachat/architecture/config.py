"""What a Llama is made of: `ModelConfig`, the same for every checkpoint form."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from llamachat.errors import DamagedFileError

RopeKind = Literal["linear", "dynamic", "yarn", "llama3"]

_SIZES = (
    "dim", "n_layers", "n_heads", "n_kv_heads",
    "head_dim", "hidden_dim", "vocab_size", "max_seq_len",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How inverse frequencies are stretched for longer contexts (transformers, `_compute_*`).

    `linear` divides them by `factor`. `dynamic` (NTK-aware) raises theta for contexts beyond the
    model's own: `ModelConfig.at_context`. `llama3` divides low frequencies, with a ramp between
    `original_max_seq_len / low_freq_factor` and `original_max_seq_len / high_freq_factor`. `yarn`
    (Peng et al. 2023, arXiv 2309.00071) does so between the pairs that turn `beta_fast` and
    `beta_slow` times in the original context, and has queries and keys `attention_factor` larger.
    """

    kind: RopeKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            found, bound = getattr(self, low), getattr(self, high)
            if not found < bound:
                raise DamagedFileError(f"{low} is {found}, expected less than {high} {bound}")


@dataclass(frozen=True, slots=True)
class PrefixTokens:
    """The ids that say how far the prefix of a prefix-LM reaches, and where it has its gap.

    Attributes:
        end: with it begins what is written for the gap; all before it see each other.
        gaps: of these, the first that the prefix holds is the gap.
    """

    end: int
    gaps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one decoder, in Meta's names; the same for every checkpoint form.

    Attributes:
        qkv_bias: whether the query, key and value projections have biases.
        o_bias: whether the attention's output projection has one.
        rope_dim: how many leading dimensions of a head turn; None: all of them.
        prefix: of ChatGLM-6B, whose block and positions are its own (`model/chatglm.py`).
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_seq_len: int
    tied: bool
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    rope_dim: int | None = None
    prefix: PrefixTokens | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not 0 < value < 2**31:
                raise DamagedFileError(f"{name} is {value}, expected a positive number")
        if self.n_heads % self.n_kv_heads:
            raise DamagedFileError(
                f"{self.n_heads} heads cannot share {self.n_kv_heads} key/value heads evenly"
            )
        self._check_head_dim()
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise DamagedFileError(f"{name} is {value}, expected a positive number")
        kind = self.rope_scaling.kind if self.rope_scaling else None
        if kind == "dynamic" and self.head_dim == 2:
            raise DamagedFileError("head_dim is 2, dynamic rope scaling expects 4 or more")
        if kind == "yarn" and self.rope_theta <= 1:
            raise DamagedFileError(f"rope_theta is {self.rope_theta}, yarn expects more than 1")

    def undivided(self, parts: int) -> str | None:
        """What of it cannot be cut into so many equal parts, or None."""
        if self.prefix is not None:
            return "ChatGLM-6B"
        for name, n in (("heads", self.n_heads), ("hidden dimensions", self.hidden_dim)):
            if n % parts:
                return f"{n} {name}"
        if self.n_kv_heads % parts and parts % self.n_kv_heads:
            return f"{self.n_kv_heads} key/value heads"
        return None

    def _check_head_dim(self) -> None:
        step, said = 2, "an even number"
        if self.prefix is not None:  # each half of a head turns on its own
            step, said = 4, "a multiple of 4"
        if self.head_dim % step:
            raise DamagedFileError(f"head_dim is {self.head_dim}, expected {said}")
        if self.rope_dim is not None and (
            self.rope_dim % 2 or not 0 < self.rope_dim <= self.head_dim
        ):
            raise DamagedFileError(
                f"rope_dim is {self.rope_dim}, expected an even number up to {self.head_dim}"
            )

    @property
    def rope_pairs(self) -> int:
        """Pairs of dimensions that turn in each head."""
        return (self.rope_dim or self.head_dim) // 2

    @property
    def longest_context(self) -> int:
        """Tokens that rope scaling reaches; without it, and by default, `max_seq_len`."""
        scaling = self.rope_scaling
        if scaling is None or scaling.kind == "llama3":
            return self.max_seq_len
        scaled = scaling.original_max_seq_len if scaling.kind == "yarn" else self.max_seq_len
        return max(self.max_seq_len, min(int(scaling.factor * scaled), 2**31 - 1))

    def at_context(self, ctx_size: int) -> ModelConfig:
        """The config for so many tokens, which dynamic scaling depends on.

        Theta is fixed from the first token on: keys are cached as they were turned. Source:
        `_compute_dynamic_ntk_parameters` of transformers.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "dynamic" or ctx_size <= self.max_seq_len:
            return self
        stretch = scaling.factor * ctx_size / self.max_seq_len - (scaling.factor - 1)
        theta = self.rope_theta * stretch ** (self.head_dim / (self.head_dim - 2))
        return replace(self, rope_theta=theta, rope_scaling=None)

    @property
    def cached_values_per_token(self) -> int:
        """Values (not bytes) that one token adds to the cache, keys and values together."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim

    @property
    def n_params(self) -> int:
        """All parameters, a tied head counted once."""
        attention = self.dim * self.head_dim * 2 * (self.n_heads + self.n_kv_heads)
        biases = self.qkv_bias * self.head_dim * (self.n_heads + 2 * self.n_kv_heads)
        biases += self.o_bias * self.dim
        ffn, norm = 3 * self.dim * self.hidden_dim, self.dim
        if self.prefix is not None:  # no gate, but biases
            ffn, norm = (2 * self.dim + 1) * self.hidden_dim + self.dim, 2 * self.dim
        layer = attention + biases + ffn + 2 * norm
        heads = 1 if self.tied else 2
        return self.n_layers * layer + heads * self.vocab_size * self.dim + norm
