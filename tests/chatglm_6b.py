"""A small random ChatGLM-6B in files of the real names, and section by section what it computes.

The forward pass is plain numpy over those tensors, written from the published modeling code and
not from ours: one sequence at a time, nothing cached, float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from llamachat.tokenizer.spm import PieceType, model_proto, with_pieces

Array = npt.NDArray[np.float64]

DIM, N_LAYERS, N_HEADS, HIDDEN, VOCAB = 64, 2, 4, 128, 448
SPECIALS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<n>", "▁"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz[]R0123456789问答：", "你", "好", "你好"]
MASK = len(WORDS) + len(LETTERS)  # the id of the first special token
GMASK, SOP, EOP = MASK + 1, MASK + 4, MASK + 5
CONFIG: dict[str, Any] = {
    "model_type": "chatglm", "hidden_size": DIM, "inner_hidden_size": HIDDEN,
    "num_layers": N_LAYERS, "num_attention_heads": N_HEADS, "layernorm_epsilon": 1e-5,
    "max_sequence_length": 256, "position_encoding_2d": True, "vocab_size": VOCAB,
    "bos_token_id": SOP, "eos_token_id": EOP, "mask_token_id": MASK, "gmask_token_id": GMASK,
    "pad_token_id": 3, "torch_dtype": "float16",
}  # fmt: skip
LAYER = "transformer.layers.{}."
SHAPES = {
    "input_layernorm": (DIM,),
    "attention.query_key_value": (3 * DIM, DIM),
    "attention.dense": (DIM, DIM),
    "post_attention_layernorm": (DIM,),
    "mlp.dense_h_to_4h": (HIDDEN, DIM),
    "mlp.dense_4h_to_h": (DIM, HIDDEN),
}


def random_tensors() -> dict[str, Tensor]:
    """Every tensor of the model by its name in the files."""
    generator = torch.Generator().manual_seed(6)

    def random(*shape: int, std: float = 0.3, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    tensors = {"transformer.word_embeddings.weight": random(VOCAB, DIM)}
    for layer in range(N_LAYERS):
        for name, shape in SHAPES.items():
            is_norm = len(shape) == 1
            module = LAYER.format(layer) + name
            tensors[f"{module}.weight"] = random(*shape, mean=float(is_norm))
            tensors[f"{module}.bias"] = random(shape[0])
        tensors[f"{LAYER.format(layer)}attention.rotary_emb.inv_freq"] = torch.ones(4).half()
    tensors["transformer.final_layernorm.weight"] = random(DIM, mean=1.0)
    tensors["transformer.final_layernorm.bias"] = random(DIM)
    tensors["lm_head.weight"] = random(VOCAB, DIM)
    return tensors


def ice_text(*, is_first: bool = False) -> bytes:
    """A model file; that of the first revision leaves to the code what it adds."""
    pieces = [*WORDS, *LETTERS]
    types = [PieceType.UNKNOWN, *[PieceType.CONTROL] * 3, PieceType.USER_DEFINED]
    types += [PieceType.NORMAL] * (len(pieces) - len(types))
    proto = model_proto(pieces, [0.0] * len(pieces), types, add_dummy_prefix=True)
    spaces = ["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]
    added = [(piece, PieceType.CONTROL) for piece in SPECIALS]
    added += [(piece, PieceType.USER_DEFINED) for piece in spaces]
    added += [(f"<0x{byte:02X}>", PieceType.BYTE) for byte in range(256)]
    return proto if is_first else with_pieces(proto, added)


def write_folder(folder: Path, tensors: Mapping[str, Tensor], **changes: Any) -> Path:
    """Everything but weights, and these in one file of safetensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"num_image_tokens": 0}', encoding="utf-8")
    (folder / "ice_text.model").write_bytes(ice_text())
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """The same with weights in two pickled shards, as they were published."""
    write_folder(folder, {})
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    files = {n: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, n in enumerate(names)}
    for file in sorted(set(files.values())):
        torch.save({n: tensors[n] for n in names if files[n] == file}, folder / file)
    index = json.dumps({"metadata": {}, "weight_map": files})
    (folder / "pytorch_model.bin.index.json").write_text(index, encoding="utf-8")
    return folder


def expected_logits(tensors: Mapping[str, Tensor], ids: Sequence[int]) -> Tensor:
    """(T, V) of a sequence that holds [gMASK] and <sop>."""
    weights = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    context, gap = ids.index(SOP), ids.index(GMASK)
    at = np.arange(len(ids))
    positions = np.where(at < context, at, gap)
    blocks = np.where(at < context, 0, at - context + 1)
    sees = (at[None, :] <= at[:, None]) | (at[None, :] < context)

    def linear(x: Array, name: str) -> Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def layer_norm(x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(x: Array, name: str) -> Array:
        mixed = linear(x, f"{name}.query_key_value").reshape(len(x), N_HEADS, -1)
        q, k, v = np.split(mixed, 3, axis=-1)
        q, k = (rotate(q, positions, blocks), rotate(k, positions, blocks))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(sees, scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        context_layer = np.einsum("hij,jhd->ihd", shares, v).reshape(len(x), -1)
        return linear(context_layer, f"{name}.dense")

    def mlp(x: Array, name: str) -> Array:
        return linear(gelu(linear(x, f"{name}.dense_h_to_4h")), f"{name}.dense_4h_to_h")

    alpha = (2 * N_LAYERS) ** 0.5
    h = weights["transformer.word_embeddings.weight"][list(ids)]
    for number in range(N_LAYERS):
        layer = LAYER.format(number)
        x = layer_norm(h, f"{layer}input_layernorm")
        h = x * alpha + attention(x, f"{layer}attention")
        x = layer_norm(h, f"{layer}post_attention_layernorm")
        h = x * alpha + mlp(x, f"{layer}mlp")
    logits = layer_norm(h, "transformer.final_layernorm") @ weights["lm_head.weight"].T
    return torch.from_numpy(logits)


def rotate(x: Array, positions: npt.NDArray[Any], blocks: npt.NDArray[Any]) -> Array:
    """Each half of every head by positions of its own."""
    halves = np.split(x, 2, axis=-1)
    return np.concatenate(
        [rotate_half(half, at) for half, at in zip(halves, (positions, blocks), strict=True)], -1
    )


def rotate_half(x: Array, at: npt.NDArray[Any]) -> Array:
    """Half-split pairs; the inverse frequencies are a float16 buffer of the model."""
    n = x.shape[-1]
    inv_freq = (1.0 / 10_000 ** (np.arange(0, n, 2) / n)).astype(np.float16).astype(np.float64)
    angles = np.tile(np.outer(at, inv_freq), 2)[:, None, :]
    turned = np.concatenate([-x[..., n // 2 :], x[..., : n // 2]], axis=-1)
    return x * np.cos(angles) + turned * np.sin(angles)


def gelu(x: Array) -> Array:
    """OpenAI's."""
    return 0.5 * x * (1.0 + np.tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x)))
