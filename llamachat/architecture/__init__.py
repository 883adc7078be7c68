"""What a model is made of, whatever its checkpoint calls that. Torch-free."""

from llamachat.architecture.chatglm import CHATGLM
from llamachat.architecture.config import ModelConfig, PrefixTokens, RopeScaling
from llamachat.architecture.foreign import (
    config_from_gguf,
    config_from_hf,
    config_from_meta,
)
from llamachat.architecture.mllama import MLLAMA, meta_has_vision, text_config, text_layers
from llamachat.architecture.values import brief

__all__ = [
    "CHATGLM",
    "MLLAMA",
    "ModelConfig",
    "PrefixTokens",
    "RopeScaling",
    "brief",
    "config_from_gguf",
    "config_from_hf",
    "config_from_meta",
    "meta_has_vision",
    "text_config",
    "text_layers",
]
