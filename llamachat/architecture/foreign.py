"""Configs of Hugging Face, GGUF and Meta; those of families that have their own are beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llamachat.architecture import mllama
from llamachat.architecture.chatglm import CHATGLM, config_from_chatglm
from llamachat.architecture.config import ModelConfig, RopeScaling
from llamachat.architecture.values import (
    brief,
    expect,
    expect_bitsandbytes,
    flag,
    number,
    table,
)
from llamachat.errors import DamagedFileError

_GGUF_ARCHITECTURES = ("llama", CHATGLM)
# What llama.cpp computes for a key of these that is not zero, and this decoder does not.
_GGUF_FEATURES = (
    *("expert_count", "logit_scale", "residual_scale", "embedding_scale", "use_parallel_residual"),
    *("attn_logit_softcapping", "final_logit_softcapping", "attention.scale"),
    *("attention.sliding_window", "attention.clamp_kqv", "attention.max_alibi_bias"),
)
_GGUF_SCALING = frozenset(
    (
        *("type", "factor", "attn_factor", "original_context_length"),
        *("yarn_beta_fast", "yarn_beta_slow"),
        "finetuned",  # tells of the training only
    )
)


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face `config.json` (model_type "llama", "mllama" or "chatglm").

    Of mllama, Llama 3.2 Vision, it is the text part, which without images is a Llama.

    Raises:
        DamagedFileError: another architecture, a missing key, or a feature that is not supported.
    """
    if config.get("model_type") == CHATGLM:
        return config_from_chatglm(config)
    if config.get("model_type") == mllama.MLLAMA:
        return config_from_hf(mllama.as_llama(config))
    expect(config, "model_type", "llama")
    if config.get("hidden_act") is not None:
        expect(config, "hidden_act", "silu")
    if config.get("mlp_bias"):
        raise DamagedFileError(f"mlp_bias is {brief(config['mlp_bias'])}, expected none")
    attention_bias = flag(config, "attention_bias", default=False)
    if table(config, "quantization_config"):
        expect_bitsandbytes(config["quantization_config"])
    dim, n_heads = number(config, "hidden_size", int), number(config, "num_attention_heads", int)
    rope = table(config, "rope_parameters")  # transformers >= 5 keeps theta and scaling here
    max_seq_len = number(config, "max_position_embeddings", int, 2048)
    return ModelConfig(
        dim=dim,
        n_layers=number(config, "num_hidden_layers", int),
        n_heads=n_heads,
        n_kv_heads=number(config, "num_key_value_heads", int, n_heads),
        head_dim=number(config, "head_dim", int, dim // max(n_heads, 1)),
        hidden_dim=number(config, "intermediate_size", int),
        vocab_size=number(config, "vocab_size", int),
        norm_eps=number(config, "rms_norm_eps", float, 1e-6),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        rope_theta=number({**config, **rope}, "rope_theta", float, 10_000.0),
        max_seq_len=max_seq_len,
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_scaling=_rope_scaling(table(config, "rope_scaling") or rope, max_seq_len),
    )


def config_from_gguf(metadata: Mapping[str, Any], *, tied: bool, vocab_size: int) -> ModelConfig:
    """Read the `llama.*` or `chatglm.*` keys of a GGUF header, which do not tell of biases.

    Args:
        metadata: the header's key/value pairs.
        tied: whether the file has no `output.weight`.
        vocab_size: rows of `token_embd.weight`; the header's own count is optional.

    Raises:
        DamagedFileError: another architecture, a missing key, or a feature that is not supported.
    """
    kind = metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in _GGUF_ARCHITECTURES:
        expected = " or ".join(map(repr, _GGUF_ARCHITECTURES))
        raise DamagedFileError(f"general.architecture is {brief(kind)}, expected {expected}")
    for key in (f"{kind}.{feature}" for feature in _GGUF_FEATURES):
        if not _is_zero(metadata.get(key, 0)):
            raise DamagedFileError(f"{key} is {brief(metadata[key])}, expected none")
    dim = number(metadata, f"{kind}.embedding_length", int)
    n_heads = number(metadata, f"{kind}.attention.head_count", int)
    head_dim = number(metadata, f"{kind}.attention.key_length", int, dim // n_heads)
    max_seq_len = number(metadata, f"{kind}.context_length", int)
    whole = (f"{kind}.rope.dimension_count", f"{kind}.attention.value_length")
    for key in whole[kind == CHATGLM :]:
        if (found := number(metadata, key, int, head_dim)) != head_dim:
            raise DamagedFileError(f"{key} is {found}, expected head_dim {head_dim}")
    return ModelConfig(
        dim=dim,
        n_layers=number(metadata, f"{kind}.block_count", int),
        n_heads=n_heads,
        n_kv_heads=number(metadata, f"{kind}.attention.head_count_kv", int, n_heads),
        head_dim=head_dim,
        hidden_dim=number(metadata, f"{kind}.feed_forward_length", int),
        vocab_size=vocab_size,
        norm_eps=number(metadata, f"{kind}.attention.layer_norm_rms_epsilon", float),
        rope_theta=number(metadata, f"{kind}.rope.freq_base", float, 10_000.0),
        max_seq_len=max_seq_len,
        tied=tied,
        rope_scaling=_rope_scaling_of_gguf(metadata, f"{kind}.rope.", max_seq_len),
        rope_dim=number(metadata, whole[0], int) if kind == CHATGLM else None,
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
    params = table(params, "model") or params
    for key, value in params.items():
        if key not in _META_KEYS and value not in (None, False):
            raise DamagedFileError(f"{brief(key)} is {brief(value)}, expected none")
    if params.get("vocab_size") not in (None, -1):
        vocab_size = number(params, "vocab_size", int)
    dim, n_heads = number(params, "dim", int), number(params, "n_heads", int)
    # The factor is not in the file: transformers, convert_llama_weights_to_hf.py
    factor = 32.0 if dim in (2048, 3072) else 8.0
    scaling = RopeScaling("llama3", factor) if params.get("use_scaled_rope") else None
    config = ModelConfig(
        dim=dim,
        n_layers=number(params, "n_layers", int),
        n_heads=n_heads,
        n_kv_heads=number(params, "n_kv_heads", int, n_heads),
        head_dim=dim // n_heads,
        hidden_dim=_meta_hidden_dim(params, dim),
        vocab_size=vocab_size,
        norm_eps=number(params, "norm_eps", float, 1e-5),
        rope_theta=number(params, "rope_theta", float, 10_000.0),
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
        *mllama.META_KEYS,
    )
)


def _meta_hidden_dim(params: Mapping[str, Any], dim: int) -> int:
    """`FeedForward` of Meta's model.py."""
    multiple_of = number(params, "multiple_of", int, 256)
    multiplier = number(params, "ffn_dim_multiplier", float, 1.0)
    hidden_dim = int(multiplier * (8 * dim // 3))
    return multiple_of * -(-hidden_dim // multiple_of)


def _meta_max_seq_len(config: ModelConfig) -> int:
    """What a model was trained with, by what tells the generations apart."""
    if config.rope_theta > 10_000:
        return 8192 if config.vocab_size > 100_000 else 16_384  # Llama 3, Code Llama
    # LLaMA 65B has the epsilon of Llama 2, whose 70B has 8 key/value heads
    is_first = config.norm_eps < 1e-5 or (config.n_layers, config.n_kv_heads) == (80, 64)
    return 2048 if is_first else 4096


def _is_zero(value: object) -> bool:
    return isinstance(value, int | float) and not value


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
        return RopeScaling("linear", number(values, "factor", float))
    if kind == "dynamic":
        if values.get("alpha") is not None:
            raise DamagedFileError(f"alpha of dynamic is {brief(values['alpha'])}, expected none")
        return RopeScaling("dynamic", number(values, "factor", float))
    if kind == "yarn":
        return _yarn(values, max_seq_len)
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=number(values, "factor", float),
            low_freq_factor=number(values, "low_freq_factor", float, 1.0),
            high_freq_factor=number(values, "high_freq_factor", float, 4.0),
            original_max_seq_len=number(values, "original_max_position_embeddings", int, 8192),
        )
    raise DamagedFileError(
        f"rope scaling is {brief(kind)}, expected none, linear, dynamic, yarn or llama3"
    )


def _yarn(values: Mapping[str, Any], max_seq_len: int) -> RopeScaling:
    if values.get("truncate") not in (None, True):
        raise DamagedFileError(f"truncate is {brief(values['truncate'])}, expected true")
    factor = number(values, "factor", float)
    attention_factor = _larger(factor)
    if values.get("mscale") and values.get("mscale_all_dim"):
        attention_factor = _larger(factor, number(values, "mscale", float)) / _larger(
            factor, number(values, "mscale_all_dim", float)
        )
    return RopeScaling(
        "yarn",
        factor,
        original_max_seq_len=number(values, "original_max_position_embeddings", int, max_seq_len),
        beta_fast=number(values, "beta_fast", float, 32.0),
        beta_slow=number(values, "beta_slow", float, 1.0),
        attention_factor=number(values, "attention_factor", float, attention_factor),
    )


def _larger(factor: float, weight: float = 1.0) -> float:
    """What yarn multiplies queries and keys with (section 3.4 of the paper)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _rope_scaling_of_gguf(
    metadata: Mapping[str, Any], prefix: str, max_seq_len: int
) -> RopeScaling | None:
    """Of `rope.scaling.*`, as llama.cpp reads them: without a type, a factor is linear.

    `attn_factor` multiplies queries and keys beside what yarn has anyway.
    """
    scaling = f"{prefix}scaling."
    for key, value in metadata.items():
        name = key.removeprefix(scaling)
        if name != key and name not in _GGUF_SCALING:
            shown = name if name.isidentifier() else brief(name)
            raise DamagedFileError(f"{scaling}{shown} is {brief(value)}, expected none")
    named = metadata.get(f"{scaling}type")
    kind = "linear" if named is None else named
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn"):
        found = brief(kind)
        raise DamagedFileError(f"{scaling}type is {found}, expected none, linear or yarn")
    older, newer = f"{prefix}scale_linear", f"{scaling}factor"
    is_needed = named is not None and kind != "none"
    key = older if newer not in metadata and older in metadata else newer
    factor = number(metadata, key, float, None if is_needed else 1.0)
    times = number(metadata, f"{scaling}attn_factor", float, 1.0)
    original = number(metadata, f"{scaling}original_context_length", int, max_seq_len)
    beta_fast = number(metadata, f"{scaling}yarn_beta_fast", float, 32.0)
    beta_slow = number(metadata, f"{scaling}yarn_beta_slow", float, 1.0)
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor,
            original_max_seq_len=original,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            attention_factor=_larger(factor) * times,
        )
    factor = factor if kind == "linear" else 1.0
    if (factor, times) == (1.0, 1.0):
        return None
    return RopeScaling("linear", factor, attention_factor=times)
