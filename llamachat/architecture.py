"""What a Llama is made of: `ModelConfig`, and the only place where foreign config names live."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from llamachat.errors import DamagedFileError

RopeKind = Literal["linear", "llama3"]
Number = TypeVar("Number", int, float)

_SIZES = (
    "dim", "n_layers", "n_heads", "n_kv_heads",
    "head_dim", "hidden_dim", "vocab_size", "max_seq_len",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How inverse frequencies are stretched for longer contexts.

    `linear` divides them by `factor`. `llama3` divides low frequencies only, with a ramp between
    `original_max_seq_len / low_freq_factor` and `original_max_seq_len / high_freq_factor`
    (transformers, `_compute_llama3_parameters`).
    """

    kind: RopeKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        if not self.low_freq_factor < self.high_freq_factor:
            raise DamagedFileError(
                f"low_freq_factor is {self.low_freq_factor}, "
                f"expected less than high_freq_factor {self.high_freq_factor}"
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one decoder, in Meta's names; the same for every checkpoint form."""

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

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not 0 < value < 2**31:
                raise DamagedFileError(f"{name} is {value}, expected a positive number")
        if self.n_heads % self.n_kv_heads:
            raise DamagedFileError(
                f"{self.n_heads} heads cannot share {self.n_kv_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise DamagedFileError(f"head_dim is {self.head_dim}, expected an even number")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise DamagedFileError(f"{name} is {value}, expected a positive number")

    @property
    def cached_values_per_token(self) -> int:
        """Values (not bytes) that one token adds to the cache, keys and values together."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim

    @property
    def n_params(self) -> int:
        """All parameters, a tied head counted once."""
        attention = self.dim * self.head_dim * 2 * (self.n_heads + self.n_kv_heads)
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        heads = 1 if self.tied else 2
        return self.n_layers * layer + heads * self.vocab_size * self.dim + self.dim


def brief(value: object) -> str:
    """A value from a foreign file, whatever it is, on one short line."""
    return " ".join(reprlib.repr(value).split())


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face `config.json` (model_type "llama").

    Raises:
        DamagedFileError: another architecture, a missing key, or a feature that is not supported.
    """
    _expect(config, "model_type", "llama")
    if config.get("hidden_act") is not None:
        _expect(config, "hidden_act", "silu")
    for feature in ("attention_bias", "mlp_bias"):
        if config.get(feature):
            raise DamagedFileError(f"{feature} is {brief(config[feature])}, expected none")
    if _table(config, "quantization_config"):
        _expect_bitsandbytes(config["quantization_config"])
    dim, n_heads = _number(config, "hidden_size", int), _number(config, "num_attention_heads", int)
    rope = _table(config, "rope_parameters")  # transformers >= 5 keeps theta and scaling here
    return ModelConfig(
        dim=dim,
        n_layers=_number(config, "num_hidden_layers", int),
        n_heads=n_heads,
        n_kv_heads=_number(config, "num_key_value_heads", int, n_heads),
        head_dim=_number(config, "head_dim", int, dim // max(n_heads, 1)),
        hidden_dim=_number(config, "intermediate_size", int),
        vocab_size=_number(config, "vocab_size", int),
        norm_eps=_number(config, "rms_norm_eps", float, 1e-6),
        rope_theta=_number({**config, **rope}, "rope_theta", float, 10_000.0),
        max_seq_len=_number(config, "max_position_embeddings", int, 2048),
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_scaling=_rope_scaling(_table(config, "rope_scaling") or rope),
    )


def config_from_gguf(metadata: Mapping[str, Any], *, tied: bool, vocab_size: int) -> ModelConfig:
    """Read the `llama.*` keys of a GGUF header.

    Args:
        metadata: the header's key/value pairs.
        tied: whether the file has no `output.weight`.
        vocab_size: rows of `token_embd.weight`; the header's own count is optional.

    Raises:
        DamagedFileError: another architecture, a missing key, or a feature that is not supported.
    """
    _expect(metadata, "general.architecture", "llama")
    experts = metadata.get("llama.expert_count", 0)
    if not isinstance(experts, int) or experts:
        raise DamagedFileError(f"llama.expert_count is {brief(experts)}, expected none")
    dim = _number(metadata, "llama.embedding_length", int)
    n_heads = _number(metadata, "llama.attention.head_count", int)
    head_dim = _number(metadata, "llama.attention.key_length", int, dim // n_heads)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if (found := _number(metadata, key, int, head_dim)) != head_dim:
            raise DamagedFileError(f"{key} is {found}, expected head_dim {head_dim}")
    return ModelConfig(
        dim=dim,
        n_layers=_number(metadata, "llama.block_count", int),
        n_heads=n_heads,
        n_kv_heads=_number(metadata, "llama.attention.head_count_kv", int, n_heads),
        head_dim=head_dim,
        hidden_dim=_number(metadata, "llama.feed_forward_length", int),
        vocab_size=vocab_size,
        norm_eps=_number(metadata, "llama.attention.layer_norm_rms_epsilon", float),
        rope_theta=_number(metadata, "llama.rope.freq_base", float, 10_000.0),
        max_seq_len=_number(metadata, "llama.context_length", int),
        tied=tied,
        rope_scaling=_rope_scaling(
            {
                "rope_type": metadata.get("llama.rope.scaling.type"),
                "factor": metadata.get("llama.rope.scaling.factor"),
            }
        ),
    )


def _expect(values: Mapping[str, Any], key: str, expected: str) -> None:
    found = values.get(key)
    if not isinstance(found, str) or found != expected:
        raise DamagedFileError(f"{key} is {brief(found)}, expected {expected!r}")


def _expect_bitsandbytes(quantization: Mapping[str, Any]) -> None:
    if quantization.get("quant_method") != "bitsandbytes":
        raise DamagedFileError(
            f"quantization_config is {brief(quantization)}, expected none or bitsandbytes's",
            hint="take the model's float or GGUF files, and --quantize",
        )


def _table(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = values.get(key)
    if table is None:
        return {}
    if not isinstance(table, Mapping):
        raise DamagedFileError(f"{key} is {brief(table)}, expected an object")
    return table


def _number(
    values: Mapping[str, Any], key: str, kind: type[Number], default: Number | None = None
) -> Number:
    value = values.get(key)
    if value is None:
        value = default
    expected, largest = (
        ("a whole number from 1 to 2147483647", 2**31 - 1)
        if kind is int
        else ("a positive number", 1e30)
    )
    if value is None:
        raise DamagedFileError(f"{key} is missing, expected {expected}")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= largest or kind(value) != value:
        raise DamagedFileError(f"{key} is {brief(value)}, expected {expected}")
    return kind(value)


def _rope_scaling(values: Mapping[str, Any]) -> RopeScaling | None:
    kind = values.get("rope_type")
    if kind is None:
        kind = values.get("type", "default")  # the older name
    if not isinstance(kind, str):
        raise DamagedFileError(f"the type of rope scaling is {brief(kind)}, expected a name")
    if kind in ("default", "none"):
        return None
    if kind == "linear":
        return RopeScaling("linear", _number(values, "factor", float))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=_number(values, "factor", float),
            low_freq_factor=_number(values, "low_freq_factor", float, 1.0),
            high_freq_factor=_number(values, "high_freq_factor", float, 4.0),
            original_max_seq_len=_number(values, "original_max_position_embeddings", int, 8192),
        )
    raise DamagedFileError(f"rope scaling is {brief(kind)}, expected none, linear or llama3")
