"""What a model is made of, whatever its checkpoint calls that. Torch-free."""

from llamachat.architecture.config import ModelConfig, RopeScaling
from llamachat.architecture.foreign import (
    CHATGLM,
    brief,
    config_from_chatglm,
    config_from_gguf,
    config_from_hf,
    config_from_meta,
)

__all__ = [
    "CHATGLM",
    "ModelConfig",
    "RopeScaling",
    "brief",
    "config_from_chatglm",
    "config_from_gguf",
    "config_from_hf",
    "config_from_meta",
]
