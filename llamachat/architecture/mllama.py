"""Configs of Llama 3.2 Vision ("mllama"), whose text part runs without images as a Llama does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamachat.architecture.values import brief
from llamachat.errors import DamagedFileError

MLLAMA = "mllama"
META_KEYS = (
    *("vision_chunk_size", "vision_max_num_chunks"),
    "vision_num_cross_attention_layers",  # n_layers does not count them
)
# What a text part that leaves them out means: transformers, configuration_mllama.py.
_DEFAULTS = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131_072,
}
_CROSS_ATTENTION = list(range(3, 40, 5))
_MOST_LAYERS = 1000  # they are counted before any tensor is looked for


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a `config.json` that is about text: mllama's is an object of its own.

    Raises:
        DamagedFileError: mllama's is missing.
    """
    if config.get("model_type") != MLLAMA:
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise DamagedFileError(f"text_config is {brief(text)}, expected an object")
    return text


def as_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the `config.json` of a Llama would say of the text part."""
    said = {key: value for key, value in text_config(config).items() if value is not None}
    return {
        **_DEFAULTS,
        **said,
        "model_type": "llama",
        "num_hidden_layers": len(text_layers(config)),
        "quantization_config": config.get("quantization_config"),
    }


def text_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that run without images, by the numbers that they have in the file.

    Raises:
        DamagedFileError: the others are not a list of some of all layers.
    """
    text = text_config(config)
    n_layers, crossing = text.get("num_hidden_layers"), text.get("cross_attention_layers")
    if type(n_layers) is not int or not 0 < n_layers <= _MOST_LAYERS:
        raise DamagedFileError(
            f"num_hidden_layers is {brief(n_layers)}, expected 1 to {_MOST_LAYERS}"
        )
    if crossing is None:
        crossing = _CROSS_ATTENTION
    if not isinstance(crossing, list) or not all(type(layer) is int for layer in crossing):
        raise DamagedFileError(f"cross_attention_layers is {brief(crossing)}, expected numbers")
    if unknown := set(crossing) - set(range(n_layers)):
        raise DamagedFileError(
            f"cross_attention_layers has {min(unknown)}, num_hidden_layers is {n_layers}"
        )
    return tuple(layer for layer in range(n_layers) if layer not in crossing)


def meta_has_vision(params: Mapping[str, Any]) -> bool:
    """Whether a `params.json` is Llama 3.2 Vision's."""
    nested = params.get("model")
    params = nested if isinstance(nested, Mapping) and nested else params
    return any(params.get(key) is not None for key in META_KEYS)
