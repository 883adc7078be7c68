"""Configs of ChatGLM-6B and ChatGLM2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamachat.architecture.config import ModelConfig, PrefixTokens
from llamachat.architecture.values import brief, expect_bitsandbytes, flag, number, table
from llamachat.errors import DamagedFileError

CHATGLM = "chatglm"  # the model_type of both
# What ChatGLM2's code takes for what a config leaves out, and what this decoder computes.
_FLAGS = {
    "multi_query_attention": (False, True),
    "rmsnorm": (True, True),
    "post_layer_norm": (True, True),
    "original_rope": (True, True),
    "add_bias_linear": (False, False),
    "apply_residual_connection_post_layernorm": (False, False),
    "interleaved_qkv": (False, False),
}


def config_from_chatglm(config: Mapping[str, Any]) -> ModelConfig:
    """Read the `config.json` of ChatGLM-6B or ChatGLM2 (their configuration_chatglm.py).

    Raises:
        DamagedFileError: a missing key, or a feature that is not supported.
    """
    _expect_none(config, "quantization_bit", "pre_seq_len")
    if table(config, "quantization_config"):
        expect_bitsandbytes(config["quantization_config"])
    return _chatglm_6b(config) if "inner_hidden_size" in config else _chatglm2(config)


def _chatglm2(config: Mapping[str, Any]) -> ModelConfig:
    """Rope turns the first half of each head; theta and that half are constants of its code."""
    _expect_none(config, "position_encoding_2d", "rope_scaling")
    for name, (default, expected) in _FLAGS.items():
        if flag(config, name, default=default) != expected:
            found, wanted = brief(config.get(name)), str(expected).lower()
            raise DamagedFileError(f"{name} is {found}, expected {wanted}, as in ChatGLM2")
    if config.get("rope_ratio", 1) != 1:
        raise DamagedFileError(f"rope_ratio is {brief(config['rope_ratio'])}, expected 1")
    head_dim = number(config, "kv_channels", int, 128)
    return ModelConfig(
        dim=number(config, "hidden_size", int),
        n_layers=number(config, "num_layers", int),
        n_heads=number(config, "num_attention_heads", int),
        n_kv_heads=number(config, "multi_query_group_num", int, 1),
        head_dim=head_dim,
        hidden_dim=number(config, "ffn_hidden_size", int),
        vocab_size=number(config, "padded_vocab_size", int),
        norm_eps=number(config, "layernorm_epsilon", float, 1e-5),
        rope_theta=10_000.0,
        max_seq_len=number(config, "seq_length", int, 2048),
        tied=flag(config, "tie_word_embeddings", default=False),
        qkv_bias=flag(config, "add_qkv_bias", default=False),
        rope_dim=head_dim // 2,
    )


def _chatglm_6b(config: Mapping[str, Any]) -> ModelConfig:
    """Its revisions differ in the vocabulary: the first had 20,000 ids of images before it."""
    if not flag(config, "position_encoding_2d", default=True):
        raise DamagedFileError("position_encoding_2d is False, expected true, as in ChatGLM-6B")
    dim, n_heads = number(config, "hidden_size", int), number(config, "num_attention_heads", int)
    vocab_size = number(config, "vocab_size", int)
    first = 150_000 if vocab_size > 150_000 else 130_000  # constants in the first revision's code
    prefix = PrefixTokens(
        end=number(config, "bos_token_id", int, first + 4),
        gaps=(
            number(config, "gmask_token_id", int, first + 1),
            number(config, "mask_token_id", int, first),
        ),
    )
    return ModelConfig(
        dim=dim,
        n_layers=number(config, "num_layers", int),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=dim // n_heads,
        hidden_dim=number(config, "inner_hidden_size", int),
        vocab_size=vocab_size,
        norm_eps=number(config, "layernorm_epsilon", float, 1e-5),
        rope_theta=10_000.0,
        max_seq_len=number(config, "max_sequence_length", int, 2048),
        tied=False,  # as in ChatGLM2, the head is there or it is not
        qkv_bias=True,
        o_bias=True,
        prefix=prefix,
    )


def _expect_none(config: Mapping[str, Any], *features: str) -> None:
    for feature in features:
        if config.get(feature):
            raise DamagedFileError(f"{feature} is {brief(config[feature])}, expected none")
