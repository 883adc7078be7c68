"""Config files of Hugging Face folders and GGUF headers, read into one `ModelConfig`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llamachat.architecture import ModelConfig, RopeScaling, config_from_gguf, config_from_hf
from llamachat.errors import DamagedFileError

HF: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 100000, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "attention_bias": False, "rope_scaling": None,
}  # fmt: skip
GGUF: dict[str, Any] = {
    "general.architecture": "llama", "llama.embedding_length": 576, "llama.block_count": 30,
    "llama.attention.head_count": 9, "llama.attention.head_count_kv": 3,
    "llama.feed_forward_length": 1536, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100000.0, "llama.context_length": 8192,
    "llama.rope.dimension_count": 64,
}  # fmt: skip
SMOLLM2 = ModelConfig(
    dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, hidden_dim=1536, vocab_size=49152,
    norm_eps=1e-5, rope_theta=1e5, max_seq_len=8192, tied=True,
)  # fmt: skip


def test_both_forms_of_one_model_are_one_config() -> None:
    assert config_from_hf(HF) == SMOLLM2
    assert config_from_gguf(GGUF, tied=True, vocab_size=49152) == SMOLLM2


def test_the_parameters_of_smollm2_are_135_million() -> None:
    assert SMOLLM2.n_params == 134_515_008
    assert SMOLLM2.cached_values_per_token == 30 * 2 * 3 * 64


def test_an_untied_head_is_counted() -> None:
    assert replace(SMOLLM2, tied=False).n_params == SMOLLM2.n_params + 49152 * 576


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def test_older_configs_leave_out_what_they_have_by_default() -> None:
    names = ("num_key_value_heads", "rope_theta", "max_position_embeddings", "rms_norm_eps")
    config = config_from_hf(without(HF, *names, "tie_word_embeddings", "rope_scaling"))
    assert config.n_kv_heads == 9
    assert (config.rope_theta, config.max_seq_len, config.norm_eps) == (1e4, 2048, 1e-6)
    assert not config.tied


def test_a_head_dim_of_its_own_is_kept() -> None:
    assert config_from_hf(HF | {"head_dim": 128}).head_dim == 128
    lengths = {f"llama.{name}": 128 for name in ("attention.key_length", "rope.dimension_count")}
    assert config_from_gguf(GGUF | lengths, tied=True, vocab_size=9).head_dim == 128


LLAMA3 = {
    "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 1e5, RopeScaling("linear", 4.0)),
        ({"rope_scaling": {"rope_type": "default"}}, 1e5, None),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            1e5,
            RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            5e5,
            RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
    ],
)
def test_rope_scaling_is_read_in_every_spelling(
    changes: dict[str, Any], theta: float, scaling: RopeScaling | None
) -> None:
    config = config_from_hf(HF | changes)
    assert config.rope_theta == theta
    assert config.rope_scaling == scaling


@pytest.mark.parametrize("kind", ["none", "linear"])
def test_rope_scaling_of_a_gguf_is_read(kind: str) -> None:
    keys = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 2.0}
    expected = RopeScaling("linear", 2.0) if kind == "linear" else None
    assert config_from_gguf(GGUF | keys, tied=True, vocab_size=9).rope_scaling == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2.*expected 'llama'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "576"}, "hidden_size is '576'"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_hidden_layers": 2.5}, r"num_hidden_layers is 2\.5"),
        ({"num_key_value_heads": 2}, "9 heads cannot share 2"),
        ({"head_dim": 63}, "head_dim is 63, expected an even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "yarn.*expected none, linear or llama3"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\], expected an object"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4}},
            "low_freq_factor is 4",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_cannot_be_followed_is_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(DamagedFileError, match=named):
        config_from_hf(HF | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"general.architecture": "gpt2"}, "gpt2.*expected 'llama'"),
        ({"llama.expert_count": 8}, "expert_count is 8, expected none"),
        ({"llama.rope.dimension_count": 32}, "dimension_count is 32, expected head_dim 64"),
        ({"llama.attention.head_count_kv": [3, 3]}, r"head_count_kv is \[3, 3\]"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
    ],
    ids=str,
)
def test_a_gguf_that_cannot_be_followed_is_refused_by_key(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(DamagedFileError, match=named):
        config_from_gguf(GGUF | changes, tied=True, vocab_size=9)
