"""The only place where the names of foreign configs live: Hugging Face, ChatGLM, GGUF, Meta."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from llamachat.architecture.config import ModelConfig, RopeScaling
from llamachat.errors import DamagedFileError

Number = TypeVar("Number", int, float)

CHATGLM = "chatglm"  # the model_type of ChatGLM-6B as well
# What ChatGLM2's code takes for what a config leaves out, and what this decoder computes.
_CHATGLM_FLAGS = {
    "multi_query_attention": (False, True),
    "rmsnorm": (True, True),
    "post_layer_norm": (True, True),
    "original_rope": (True, True),
    "add_bias_linear": (False, False),
    "apply_residual_connection_post_layernorm": (False, False),
    "interleaved_qkv": (False, False),
}


def brief(value: object) -> str:
    """A value from a foreign file, whatever it is, on one short line."""
    return " ".join(reprlib.repr(value).split())


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face `config.json` (model_type "llama" or "chatglm").

    Raises:
        DamagedFileError: another architecture, a missing key, or a feature that is not supported.
    """
    if config.get("model_type") == CHATGLM:
        return config_from_chatglm(config)
    _expect(config, "model_type", "llama")
    if config.get("hidden_act") is not None:
        _expect(config, "hidden_act", "silu")
    if config.get("mlp_bias"):
        raise DamagedFileError(f"mlp_bias is {brief(config['mlp_bias'])}, expected none")
    attention_bias = _flag(config, "attention_bias", default=False)
    if _table(config, "quantization_config"):
        _expect_bitsandbytes(config["quantization_config"])
    dim, n_heads = _number(config, "hidden_size", int), _number(config, "num_attention_heads", int)
    rope = _table(config, "rope_parameters")  # transformers >= 5 keeps theta and scaling here
    max_seq_len = _number(config, "max_position_embeddings", int, 2048)
    return ModelConfig(
        dim=dim,
        n_layers=_number(config, "num_hidden_layers", int),
        n_heads=n_heads,
        n_kv_heads=_number(config, "num_key_value_heads", int, n_heads),
        head_dim=_number(config, "head_dim", int, dim // max(n_heads, 1)),
        hidden_dim=_number(config, "intermediate_size", int),
        vocab_size=_number(config, "vocab_size", int),
        norm_eps=_number(config, "rms_norm_eps", float, 1e-6),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        rope_theta=_number({**config, **rope}, "rope_theta", float, 10_000.0),
        max_seq_len=max_seq_len,
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_scaling=_rope_scaling(_table(config, "rope_scaling") or rope, max_seq_len),
    )


def config_from_chatglm(config: Mapping[str, Any]) -> ModelConfig:
    """Read the `config.json` of ChatGLM2 (THUDM/chatglm2-6b, configuration_chatglm.py).

    Rope turns the first half of each head; theta and that half are constants of its code.

    Raises:
        DamagedFileError: a missing key, or a feature that is not supported (ChatGLM-6B's block).
    """
    for feature in ("position_encoding_2d", "quantization_bit", "pre_seq_len", "rope_scaling"):
        if config.get(feature):
            raise DamagedFileError(f"{feature} is {brief(config[feature])}, expected none")
    for flag, (default, expected) in _CHATGLM_FLAGS.items():
        if _flag(config, flag, default=default) != expected:
            found, wanted = brief(config.get(flag)), str(expected).lower()
            raise DamagedFileError(f"{flag} is {found}, expected {wanted}, as in ChatGLM2")
    if _table(config, "quantization_config"):
        _expect_bitsandbytes(config["quantization_config"])
    if config.get("rope_ratio", 1) != 1:
        raise DamagedFileError(f"rope_ratio is {brief(config['rope_ratio'])}, expected 1")
    head_dim = _number(config, "kv_channels", int, 128)
    return ModelConfig(
        dim=_number(config, "hidden_size", int),
        n_layers=_number(config, "num_layers", int),
        n_heads=_number(config, "num_attention_heads", int),
        n_kv_heads=_number(config, "multi_query_group_num", int, 1),
        head_dim=head_dim,
        hidden_dim=_number(config, "ffn_hidden_size", int),
        vocab_size=_number(config, "padded_vocab_size", int),
        norm_eps=_number(config, "layernorm_epsilon", float, 1e-5),
        rope_theta=10_000.0,
        max_seq_len=_number(config, "seq_length", int, 2048),
        tied=_flag(config, "tie_word_embeddings", default=False),
        qkv_bias=_flag(config, "add_qkv_bias", default=False),
        rope_dim=head_dim // 2,
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
    max_seq_len = _number(metadata, "llama.context_length", int)
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
        max_seq_len=max_seq_len,
        tied=tied,
        rope_scaling=_rope_scaling_of_gguf(metadata, max_seq_len),
    )


def config_from_meta(params: Mapping[str, Any], *, tied: bool, vocab_size: int) -> ModelConfig:
    """Read Meta's `params.json`.

    Args:
        params: the object in the file.
        tied: whether the shards have no `output.weight` of its own.
        vocab_size: rows of `tok_embeddings.weight`; the file's own count may be -1.

    Raises:
        DamagedFileError: a missing key, or a feature that is not supported.
    """
    params = _table(params, "model") or params
    for key, value in params.items():
        if key not in _META_KEYS and value not in (None, False):
            raise DamagedFileError(f"{brief(key)} is {brief(value)}, expected none")
    if params.get("vocab_size") not in (None, -1):
        vocab_size = _number(params, "vocab_size", int)
    dim, n_heads = _number(params, "dim", int), _number(params, "n_heads", int)
    # The factor is not in the file: transformers, convert_llama_weights_to_hf.py
    factor = 32.0 if dim in (2048, 3072) else 8.0
    scaling = RopeScaling("llama3", factor) if params.get("use_scaled_rope") else None
    config = ModelConfig(
        dim=dim,
        n_layers=_number(params, "n_layers", int),
        n_heads=n_heads,
        n_kv_heads=_number(params, "n_kv_heads", int, n_heads),
        head_dim=dim // n_heads,
        hidden_dim=_meta_hidden_dim(params, dim),
        vocab_size=vocab_size,
        norm_eps=_number(params, "norm_eps", float, 1e-5),
        rope_theta=_number(params, "rope_theta", float, 10_000.0),
        max_seq_len=131_072,
        tied=tied,
        rope_scaling=scaling,
    )
    return config if scaling else replace(config, max_seq_len=_meta_max_seq_len(config))


_META_KEYS = frozenset(
    (
        *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"),
        *("ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope"),
        *("max_batch_size", "max_seq_len"),  # of Meta's own run
        *("quantization_args", "lora_args"),  # whose tensors have names of their own
    )
)


def _meta_hidden_dim(params: Mapping[str, Any], dim: int) -> int:
    """`FeedForward` of Meta's model.py."""
    multiple_of = _number(params, "multiple_of", int, 256)
    multiplier = _number(params, "ffn_dim_multiplier", float, 1.0)
    hidden_dim = int(multiplier * (8 * dim // 3))
    return multiple_of * -(-hidden_dim // multiple_of)


def _meta_max_seq_len(config: ModelConfig) -> int:
    """What a model was trained with, by what tells the generations apart."""
    if config.rope_theta > 10_000:
        return 8192 if config.vocab_size > 100_000 else 16_384  # Llama 3, Code Llama
    # LLaMA 65B has the epsilon of Llama 2, whose 70B has 8 key/value heads
    is_first = config.norm_eps < 1e-5 or (config.n_layers, config.n_kv_heads) == (80, 64)
    return 2048 if is_first else 4096


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


def _flag(values: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise DamagedFileError(f"{key} is {brief(value)}, expected true or false")
    return value


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


def _rope_scaling(values: Mapping[str, Any], max_seq_len: int) -> RopeScaling | None:
    kind = values.get("rope_type")
    if kind is None:
        kind = values.get("type", "default")  # the older name
    if not isinstance(kind, str):
        raise DamagedFileError(f"the type of rope scaling is {brief(kind)}, expected a name")
    if values.get("partial_rotary_factor") not in (None, 1):
        found = brief(values["partial_rotary_factor"])
        raise DamagedFileError(f"partial_rotary_factor is {found}, expected none")
    if kind in ("default", "none"):
        return None
    if kind == "linear":
        return RopeScaling("linear", _number(values, "factor", float))
    if kind == "dynamic":
        if values.get("alpha") is not None:
            raise DamagedFileError(f"alpha of dynamic is {brief(values['alpha'])}, expected none")
        return RopeScaling("dynamic", _number(values, "factor", float))
    if kind == "yarn":
        return _yarn(values, max_seq_len)
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=_number(values, "factor", float),
            low_freq_factor=_number(values, "low_freq_factor", float, 1.0),
            high_freq_factor=_number(values, "high_freq_factor", float, 4.0),
            original_max_seq_len=_number(values, "original_max_position_embeddings", int, 8192),
        )
    raise DamagedFileError(
        f"rope scaling is {brief(kind)}, expected none, linear, dynamic, yarn or llama3"
    )


def _yarn(values: Mapping[str, Any], max_seq_len: int) -> RopeScaling:
    if values.get("truncate") not in (None, True):
        raise DamagedFileError(f"truncate is {brief(values['truncate'])}, expected true")
    factor = _number(values, "factor", float)
    attention_factor = _larger(factor)
    if values.get("mscale") and values.get("mscale_all_dim"):
        attention_factor = _larger(factor, _number(values, "mscale", float)) / _larger(
            factor, _number(values, "mscale_all_dim", float)
        )
    return RopeScaling(
        "yarn",
        factor,
        original_max_seq_len=_number(values, "original_max_position_embeddings", int, max_seq_len),
        beta_fast=_number(values, "beta_fast", float, 32.0),
        beta_slow=_number(values, "beta_slow", float, 1.0),
        attention_factor=_number(values, "attention_factor", float, attention_factor),
    )


def _larger(factor: float, weight: float = 1.0) -> float:
    """What yarn multiplies queries and keys with (section 3.4 of the paper)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _rope_scaling_of_gguf(metadata: Mapping[str, Any], max_seq_len: int) -> RopeScaling | None:
    """Of `llama.rope.scaling.*`; `attn_factor` multiplies what yarn has anyway (llama.cpp)."""
    prefix = "llama.rope.scaling."
    found = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    for name in ("yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"):
        if name in found:
            raise DamagedFileError(f"{prefix}{name} is {brief(found[name])}, expected none")
    scaling = _rope_scaling(
        {
            "rope_type": found.get("type"),
            "factor": found.get("factor"),
            "original_max_position_embeddings": found.get("original_context_length"),
            "beta_fast": found.get("yarn_beta_fast"),
            "beta_slow": found.get("yarn_beta_slow"),
        },
        max_seq_len,
    )
    if scaling is None or scaling.kind != "yarn":
        return scaling
    times = _number(found, "attn_factor", float, 1.0)
    return replace(scaling, attention_factor=scaling.attention_factor * times)
