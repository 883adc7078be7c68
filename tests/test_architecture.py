"""Config files of Hugging Face folders and GGUF headers, read into one `ModelConfig`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llamachat.architecture import (
    ModelConfig,
    RopeScaling,
    config_from_gguf,
    config_from_hf,
    config_from_meta,
)
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


def test_biases_are_counted() -> None:
    biased = config_from_hf(HF | {"attention_bias": True})
    assert biased.n_params == SMOLLM2.n_params + 30 * (576 + 2 * 192 + 576)


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

YARN = {
    "rope_type": "yarn", "rope_theta": 5e5, "factor": 1.0, "beta_fast": 16, "beta_slow": 2,
    "original_max_position_embeddings": 4096,
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
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, 1e5, RopeScaling("dynamic", 2.0)),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 1.5}},
            1e5,
            RopeScaling("yarn", 4.0, original_max_seq_len=8192, attention_factor=1.5),
        ),
        (
            {"rope_parameters": YARN},
            5e5,
            RopeScaling("yarn", 1.0, original_max_seq_len=4096, beta_fast=16.0, beta_slow=2.0),
        ),
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
    ("keys", "expected"),
    [
        ({"scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"scaling.finetuned": True}, None),
        ({"scale_linear": 4.0}, RopeScaling("linear", 4.0)),
        ({"scale_linear": 4.0, "scaling.factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"scale_linear": 4.0, "scaling.type": "none"}, None),
        ({"scaling.attn_factor": 0.5}, RopeScaling("linear", 1.0, attention_factor=0.5)),
    ],
    ids=str,
)
def test_scaling_of_a_gguf_without_a_type_is_what_llama_cpp_takes_it_for(
    keys: dict[str, Any], expected: RopeScaling | None
) -> None:
    """`llama_model_base::load_hparams`: "linear", unless a type is named."""
    found = GGUF | {f"llama.rope.{key}": value for key, value in keys.items()}
    assert config_from_gguf(found, tied=True, vocab_size=9).rope_scaling == expected


def test_yarn_of_a_gguf_multiplies_its_factor_with_that_of_the_paper() -> None:
    prefix = "llama.rope.scaling"
    keys = {
        f"{prefix}.type": "yarn", f"{prefix}.factor": 4.0, f"{prefix}.attn_factor": 0.5,
        f"{prefix}.original_context_length": 2048,
    }  # fmt: skip
    scaling = config_from_gguf(GGUF | keys, tied=True, vocab_size=9).rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.original_max_seq_len) == ("yarn", 4.0, 2048)
    assert scaling.attention_factor == pytest.approx(0.5 * 1.1386294361)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 8192),
        ({"type": "linear", "factor": 4}, 32768),
        ({"type": "dynamic", "factor": 1.5}, 12288),
        ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024}, 8192),
        ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 4096}, 16384),
        ({"type": "llama3", **LLAMA3}, 8192),
    ],
    ids=str,
)
def test_a_scaling_reaches_beyond_the_models_own_context(
    scaling: dict[str, Any] | None, longest: int
) -> None:
    assert config_from_hf(HF | {"rope_scaling": scaling}).longest_context == longest


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
        ({"attention_bias": "yes"}, "attention_bias is 'yes', expected true or false"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "longrope.*expected none, linear"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}}, "truncate is False"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_slow": 32}}, "beta_slow is 32"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}, "rope_theta": 1}, "yarn expects more"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4, "alpha": 9}}, "alpha of dynamic is 9"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}, "head_dim": 2}, "head_dim is 2"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0\.5"),
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
        ({"general.architecture": "gpt2"}, "gpt2.*expected 'llama' or 'chatglm'"),
        ({"general.architecture": "chatglm"}, "chatglm.embedding_length is missing"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window is 4096, expected none"),
        ({"llama.attention.scale": 0.5}, r"attention.scale is 0\.5, expected none"),
        ({"llama.logit_scale": "x"}, "logit_scale is 'x', expected none"),
        ({"llama.expert_count": 8}, "expert_count is 8, expected none"),
        ({"llama.rope.dimension_count": 32}, "dimension_count is 32, expected head_dim 64"),
        ({"llama.attention.head_count_kv": [3, 3]}, r"head_count_kv is \[3, 3\]"),
        ({"llama.rope.scaling.type": "longrope"}, "scaling.type is 'longrope', expected none, lin"),
        ({"llama.rope.scaling.type": "llama3"}, "scaling.type is 'llama3', expected none, linear"),
        ({"llama.rope.scaling.factor": "2"}, "llama.rope.scaling.factor is '2', expected"),
        ({"llama.rope.scaling.factor": 0.0}, r"llama.rope.scaling.factor is 0\.0, expected"),
        ({"llama.rope.scale_linear": -2.0}, r"llama.rope.scale_linear is -2\.0, expected"),
        ({"llama.rope.scaling.attn_factor": []}, r"llama.rope.scaling.attn_factor is \[\], exp"),
        ({"llama.rope.scaling.original_context_length": 1.5}, "original_context_length is 1.5"),
        ({"llama.rope.scaling.yarn_beta_fast": 0}, "yarn_beta_fast is 0, expected"),
        ({"llama.rope.scaling.short_factor": 1.0}, r"scaling.short_factor is 1\.0, expected none"),
        ({"llama.rope.scaling.type": "yarn"}, "factor is missing"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, r"yarn_log_multiplier is 0\.1"),
    ],
    ids=str,
)
def test_a_gguf_that_cannot_be_followed_is_refused_by_key(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(DamagedFileError, match=named):
        config_from_gguf(GGUF | changes, tied=True, vocab_size=9)


def params(dim: int, n_layers: int, n_heads: int, multiple_of: int, **more: Any) -> dict[str, Any]:
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "multiple_of": multiple_of}
    return {**sizes, "norm_eps": 1e-5, "vocab_size": -1, **more}


LLAMA3 = {"n_kv_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256}


@pytest.mark.parametrize(
    ("values", "rows", "hidden_dim", "n_kv_heads", "max_seq_len"),
    [
        pytest.param(params(4096, 32, 32, 256, norm_eps=1e-6), 32000, 11008, 32, 2048, id="1 7B"),
        pytest.param(params(5120, 40, 40, 256, norm_eps=1e-6), 32000, 13824, 40, 2048, id="1 13B"),
        pytest.param(params(6656, 60, 52, 256, norm_eps=1e-6), 32000, 17920, 52, 2048, id="1 33B"),
        pytest.param(params(8192, 80, 64, 256), 32000, 22016, 64, 2048, id="1 65B"),
        pytest.param(params(4096, 32, 32, 256), 32000, 11008, 32, 4096, id="2 7B"),
        pytest.param(
            params(8192, 80, 64, 4096, n_kv_heads=8, ffn_dim_multiplier=1.3),
            *(32000, 28672, 8, 4096),
            id="2 70B",
        ),
        pytest.param(
            params(4096, 32, 32, 256, rope_theta=1e6), 32016, 11008, 32, 16384, id="Code Llama 7B"
        ),
        pytest.param(
            params(4096, 32, 32, 1024, ffn_dim_multiplier=1.3, **LLAMA3),
            *(128256, 14336, 8, 8192),
            id="3 8B",
        ),
        pytest.param(
            params(16384, 126, 128, 4096, ffn_dim_multiplier=1.2, use_scaled_rope=True, **LLAMA3),
            *(128256, 53248, 8, 131072),
            id="3.1 405B",
        ),
        pytest.param(
            params(2048, 16, 32, 256, ffn_dim_multiplier=1.5, use_scaled_rope=True, **LLAMA3),
            *(128256, 8192, 8, 131072),
            id="3.2 1B",
        ),
        pytest.param(
            params(3072, 28, 24, 256, ffn_dim_multiplier=1.0, use_scaled_rope=True, **LLAMA3),
            *(128256, 8192, 8, 131072),
            id="3.2 3B",
        ),
    ],
)
def test_sizes_that_params_leave_open_are_those_of_the_published_models(
    values: dict[str, Any], rows: int, hidden_dim: int, n_kv_heads: int, max_seq_len: int
) -> None:
    config = config_from_meta(values, tied=False, vocab_size=rows)
    assert (config.hidden_dim, config.n_kv_heads) == (hidden_dim, n_kv_heads)
    assert (config.vocab_size, config.max_seq_len) == (rows, max_seq_len)


@pytest.mark.parametrize(("dim", "factor"), [(2048, 32.0), (3072, 32.0), (4096, 8.0)])
def test_the_factor_of_scaled_rope_is_told_by_the_size(dim: int, factor: float) -> None:
    values = params(dim, 16, 32, 256, use_scaled_rope=True, **LLAMA3)
    config = config_from_meta(values, tied=True, vocab_size=128256)
    assert config.rope_scaling == RopeScaling("llama3", factor, 1.0, 4.0, 8192)
