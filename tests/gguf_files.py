"""Hugging Face folders rewritten as GGUF, named and permuted as llama.cpp does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf import GGUFWriter as Writer
from safetensors.torch import load_file

Array = npt.NDArray[Any]


def write_gguf(
    folder: Path,
    file: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    more: dict[str, Array] | None = None,
    only: dict[str, Array] | None = None,
    change: Callable[[Writer], object] = lambda _: None,
) -> Path:
    """The model of a folder (model_type "llama" or "chatglm") in one file.

    Matrices become `kind`, vectors stay float32. `more` are tensors of GGUF's own, `only` all that
    there are; without keys of a tokenizer, which `change` may add, there is a vocabulary of bytes.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    is_chatglm = config["model_type"] == "chatglm"
    writer = Writer(file, config["model_type"])
    (_add_chatglm if is_chatglm else _add_llama)(writer, config)
    change(writer)
    if "tokenizer.ggml.model" not in writer.kv_data[0]:
        _add_bytes(writer)
    if only is None:
        _add_tensors(writer, folder, config, kind)
    for name, values in (only or more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tensors(
    writer: Writer, folder: Path, config: dict[str, Any], kind: GGMLQuantizationType
) -> None:
    is_chatglm = config["model_type"] == "chatglm"
    arch = gguf.MODEL_ARCH.CHATGLM if is_chatglm else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(arch, 9)
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float().numpy()
        if not is_chatglm and ("q_proj" in name or "k_proj" in name):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            values = permuted(values, config[key])
        as_kind = kind if values.ndim == 2 else GGMLQuantizationType.F32
        stored = names.get_name(name.removeprefix("transformer."), (".weight", ".bias"))
        assert stored is not None
        writer.add_tensor(stored, gguf.quants.quantize(values, as_kind), raw_dtype=as_kind)


def permuted(values: Array, heads: int) -> Array:
    """`LlamaModel.permute` of convert_hf_to_gguf.py, for weights and biases."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _add_llama(writer: Writer, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])


def _add_chatglm(writer: Writer, config: dict[str, Any]) -> None:
    """`ChatGLMModel.set_gguf_parameters` of convert_hf_to_gguf.py."""
    writer.add_context_length(config["seq_length"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_layers"])
    writer.add_feed_forward_length(config["ffn_hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["multi_query_group_num"])
    writer.add_layer_norm_rms_eps(config["layernorm_epsilon"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"] // 2)
    writer.add_rope_freq_base(10_000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", val=False)


def _add_bytes(writer: Writer) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * 259)
    writer.add_token_types([2, 3, 3, *[6] * 256])
