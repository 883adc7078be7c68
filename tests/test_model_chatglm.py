"""ChatGLM2: folders as its authors write them, against published vectors and transformers' GLM."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized import random_qtensor
from rows import Rows
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM, set_seed

import llamachat
from llamachat.architecture import config_from_hf
from llamachat.chat.builtin import template_for
from llamachat.chat.templates import Message, encode, render
from llamachat.checkpoints import open_checkpoint
from llamachat.checkpoints.chatglm import layout
from llamachat.checkpoints.joined import iter_joined
from llamachat.checkpoints.safetensors import FolderCheckpoint
from llamachat.errors import DamagedFileError
from llamachat.kernels import Kernels
from llamachat.kernels.native import Native
from llamachat.kernels.reference import Reference
from llamachat.library.store import require
from llamachat.measure.quantizing import Wanted, quantize
from llamachat.model.decoder import load_decoder
from llamachat.quant.tensor import QTensor
from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.spm import PieceType, model_proto

CONFIG: dict[str, Any] = {
    "model_type": "chatglm", "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4,
    "kv_channels": 16, "multi_query_attention": True, "multi_query_group_num": 2,
    "ffn_hidden_size": 96, "padded_vocab_size": 80, "layernorm_epsilon": 1e-5, "seq_length": 256,
    "add_qkv_bias": True, "add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True,
    "original_rope": True, "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
IDS = [(7 * i * i + 31 * i + 5) % 80 for i in range(40)]


def write_folder(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


# The published layer: README of the vectors.

VECTOR_CONFIG = {
    "hidden_size": 32, "num_layers": 1, "num_attention_heads": 8, "kv_channels": 4,
    "ffn_hidden_size": 48, "padded_vocab_size": 32, "seq_length": 64,
}  # fmt: skip
LAYER = "transformer.encoder.layers.0"
VECTOR_SHAPES = {
    "transformer.embedding.word_embeddings.weight": (5, 32),
    f"{LAYER}.input_layernorm.weight": (32,),
    f"{LAYER}.self_attention.query_key_value.weight": (48, 32),
    f"{LAYER}.self_attention.query_key_value.bias": (48,),
    f"{LAYER}.self_attention.dense.weight": (32, 32),
    f"{LAYER}.post_attention_layernorm.weight": (32,),
    "gate": (48, 32),
    "up": (48, 32),
    f"{LAYER}.mlp.dense_4h_to_h.weight": (32, 48),
    "transformer.encoder.final_layernorm.weight": (32,),
}


def vectors(data: Path) -> tuple[dict[str, Tensor], list[tuple[list[int], Tensor]]]:
    """The weights, and for each of three passes its ids and what the final norm gives."""
    raw = (data / "vectors" / "chatglm2" / "glm2_model.data").read_bytes()
    at = 0

    def take(shape: tuple[int, ...], dtype: str = "<f4") -> Tensor:
        nonlocal at
        values = np.frombuffer(raw, dtype, int(np.prod(shape)), at).reshape(shape)
        at += values.nbytes
        return torch.from_numpy(values.copy())

    tensors = {name: take(shape) for name, shape in VECTOR_SHAPES.items()}
    passes = [(take((n,), "<i4").tolist(), take((n, 32))) for n in (3, 1, 1)]
    assert at == len(raw)
    tensors[f"{LAYER}.mlp.dense_h_to_4h.weight"] = torch.cat(
        [tensors.pop("gate"), tensors.pop("up")]
    )
    return tensors, passes


@pytest.fixture(scope="module")
def published(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FolderCheckpoint, list[tuple[list[int], Tensor]]]:
    """The layer as a folder whose logits are what the final norm gives, and the passes."""
    tensors, passes = vectors(data)
    embedding = "transformer.embedding.word_embeddings.weight"
    tensors[embedding] = torch.cat([tensors[embedding], torch.zeros(27, 32)])
    tensors["transformer.output_layer.weight"] = torch.eye(32)
    folder = tmp_path_factory.mktemp("published")
    return FolderCheckpoint(write_folder(folder, tensors, **VECTOR_CONFIG)), passes


def check_passes(published: tuple[FolderCheckpoint, Any], kernels: Kernels) -> None:
    checkpoint, passes = published
    rows = Rows(load_decoder(checkpoint.config, checkpoint.tensors(), kernels), form="f32")
    for ids, expected in passes:
        found = rows.run([(0, token) for token in ids])
        assert (found - expected).abs().max() < 1e-5


def test_a_published_layer_gives_the_published_values(
    published: tuple[FolderCheckpoint, Any],
) -> None:
    check_passes(published, Reference())


def test_native_kernels_give_the_published_values(
    published: tuple[FolderCheckpoint, Any], native: Callable[[int], Native]
) -> None:
    check_passes(published, native(1))


@pytest.fixture(scope="module")
def glm() -> GlmForCausalLM:
    """A small random GLM: the same block, in transformers' own code."""
    set_seed(3)
    model = GlmForCausalLM(
        GlmConfig(
            vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, attention_bias=True,
            rms_norm_eps=1e-5, initializer_range=0.2, pad_token_id=0, eos_token_id=2,
            tie_word_embeddings=False, max_position_embeddings=256,
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
            },
        )
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.5)
    return model


def as_chatglm(model: GlmForCausalLM) -> dict[str, Tensor]:
    theirs = model.state_dict()
    tensors = {
        "transformer.embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "transformer.rotary_pos_emb.inv_freq": torch.ones(4),
        "transformer.encoder.final_layernorm.weight": theirs["model.norm.weight"],
        "transformer.output_layer.weight": theirs["lm_head.weight"],
    }
    for layer in range(2):
        old, new = f"model.layers.{layer}", f"transformer.encoder.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{new}.{norm}.weight"] = theirs[f"{old}.{norm}.weight"]
        for kind in ("weight", "bias"):
            tensors[f"{new}.self_attention.query_key_value.{kind}"] = torch.cat(
                [theirs[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
        tensors[f"{new}.self_attention.dense.weight"] = theirs[f"{old}.self_attn.o_proj.weight"]
        tensors[f"{new}.mlp.dense_h_to_4h.weight"] = theirs[f"{old}.mlp.gate_up_proj.weight"]
        tensors[f"{new}.mlp.dense_4h_to_h.weight"] = theirs[f"{old}.mlp.down_proj.weight"]
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def folder(glm: GlmForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ChatGLM2 whose tokenizer has 75 pieces, and 5 tokens that follow them."""
    folder = write_folder(tmp_path_factory.mktemp("chatglm2"), as_chatglm(glm))
    pieces = ["<unk>", "<s>", "</s>", "▁", *(chr(ord("0") + i) for i in range(71))]
    types = [PieceType.UNKNOWN, PieceType.CONTROL, PieceType.CONTROL, *[PieceType.NORMAL] * 72]
    proto = model_proto(pieces, [0.0] * 75, types, add_dummy_prefix=True)
    (folder / "tokenizer.model").write_bytes(proto)
    return folder


def relative_error(model: llamachat.Model, glm: GlmForCausalLM) -> float:
    with torch.inference_mode():
        expected = glm(torch.tensor([IDS])).logits[0]
    return float((model.logits(IDS) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_logits_equal_those_of_transformers_glm(
    folder: Path, glm: GlmForCausalLM, backend: str
) -> None:
    model = llamachat.load(folder, dtype="float32", threads=1, backend=backend)
    assert relative_error(model, glm) < 1e-5


def test_quantized_weights_keep_their_biases(folder: Path, glm: GlmForCausalLM) -> None:
    model = llamachat.load(folder, quantize="int8", threads=1, kv_cache="f32")
    assert 1e-5 < relative_error(model, glm) < 0.1


def test_what_llamachat_quantize_writes_is_the_same_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path))
    made = tmp_path / "made"
    quantize(
        require(str(folder)), Wanted("int8"), name="tiny", folder=made, threads=1,
        notice=lambda _: None, progress=lambda *_: None,
    )  # fmt: skip
    model, source = (llamachat.load(path, quantize="int8", threads=1) for path in (made, folder))
    assert torch.equal(model.logits(IDS), source.logits(IDS))
    assert model.config == source.config
    assert model.chat_template == source.chat_template
    assert model.tokenizer.specials == source.tokenizer.specials


QKV = "transformer.encoder.layers.1.self_attention.query_key_value"
DENSE = "transformer.encoder.layers.0.mlp.dense_h_to_4h"
TABLE = "transformer.embedding.word_embeddings"


def adapter_for(folder: Path, to: Path, *, rows: int = 128) -> tuple[Path, dict[str, Tensor]]:
    """An adapter as PEFT saves one over ChatGLM2's own code, and the tensors that it leaves."""
    generator = torch.Generator().manual_seed(5)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    sides = {QKV: (values(4, 64), values(rows, 4)), DENSE: (values(4, 64), values(192, 4))}
    table = values(80, 64)
    saved = {f"base_model.model.{TABLE}.weight": table}
    for module, (a, b) in sides.items():
        saved |= {
            f"base_model.model.{module}.lora_{s}.weight": it for s, it in (("A", a), ("B", b))
        }
    to.mkdir()
    save_file(saved, to / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": folder.name}
    (to / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    merged = load_file(folder / "model.safetensors") | {f"{TABLE}.weight": table}
    for module, (a, b) in sides.items():
        weight = f"{module}.weight"
        if merged[weight].shape == (len(b), a.shape[1]):
            merged[weight] = merged[weight] + 2 * (b @ a)
    return to, merged


def test_an_adapter_adds_to_the_tensors_that_hold_several_weights(
    folder: Path, tmp_path: Path
) -> None:
    adapter, merged = adapter_for(folder, tmp_path / "lora")
    expected = llamachat.load(write_folder(copied(folder, tmp_path / "m"), merged), **EXACT)
    found = llamachat.load(folder, lora=[adapter], **EXACT)
    assert torch.allclose(found.logits(IDS), expected.logits(IDS), rtol=0, atol=1e-5)


def test_an_adapter_adds_to_what_llamachat_quantize_made(folder: Path, tmp_path: Path) -> None:
    adapter, merged = adapter_for(folder, tmp_path / "lora")
    quantize(
        require(str(folder)), Wanted("int8"), name="tiny", folder=tmp_path / "made", threads=1,
        notice=lambda _: None, progress=lambda *_: None,
    )  # fmt: skip
    expected = llamachat.load(write_folder(copied(folder, tmp_path / "m"), merged), **EXACT)
    found = llamachat.load(tmp_path / "made", lora=[adapter], quantize="none", **EXACT)
    difference = (found.logits(IDS) - expected.logits(IDS)).abs().max()
    assert difference < 0.1 * expected.logits(IDS).abs().max()


def test_an_adapter_of_other_heads_is_refused_with_both_shapes(
    folder: Path, tmp_path: Path
) -> None:
    adapter, _ = adapter_for(folder, tmp_path / "lora", rows=192)
    with pytest.raises(DamagedFileError, match=f"{QKV}.weight: 192 x 64, the config says 128 x 64"):
        llamachat.load(folder, lora=[adapter], **EXACT)


EXACT: dict[str, Any] = {"dtype": "float32", "threads": 1}


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_quantized_weights_are_taken_apart_as_floats_are(folder: Path) -> None:
    config = open_checkpoint(folder).config
    joined = next(it for it in iter_joined(config, layout(config)) if len(it.weights) > 1)
    assert joined.name == f"{LAYER}.self_attention.query_key_value.weight"
    fused = random_qtensor("NF4", (128, 64), 64)
    codes, floats = (dict(joined.split(it)) for it in (fused, fused.dequantize()))
    for name, weight in codes.items():
        assert isinstance(weight, QTensor)
        assert torch.equal(weight.dequantize(), floats[name])


def test_the_whole_config_is_read() -> None:
    real = {
        "hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32, "kv_channels": 128,
        "ffn_hidden_size": 13696, "padded_vocab_size": 65024, "seq_length": 32768,
    }  # fmt: skip
    config = config_from_hf(CONFIG | real)
    assert config.n_params == 6_243_584_000
    assert (config.n_kv_heads, config.head_dim, config.rope_dim) == (2, 128, 64)
    assert (config.max_seq_len, config.vocab_size, config.tied) == (32768, 65024, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multi_query_attention": None}, "multi_query_attention is None, expected true"),
        ({"rmsnorm": False}, "rmsnorm is False, expected true"),
        ({"add_bias_linear": True}, "add_bias_linear is True, expected false"),
        ({"post_layer_norm": "yes"}, "post_layer_norm is 'yes', expected true or false"),
        ({"position_encoding_2d": True}, "position_encoding_2d is True, expected none"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq.*expected none or bitsandbytes"),
        ({"quantization_bit": 4}, "quantization_bit is 4, expected none"),
        ({"pre_seq_len": 128}, "pre_seq_len is 128, expected none"),
        ({"rope_ratio": 50}, "rope_ratio is 50, expected 1"),
        ({"kv_channels": 18}, "rope_dim is 9, expected an even number up to 18"),
        ({"padded_vocab_size": None}, "padded_vocab_size is missing"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_followed_is_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DamagedFileError, match=message):
        config_from_hf(CONFIG | changes)


def test_a_fused_tensor_of_another_shape_is_refused(glm: GlmForCausalLM, tmp_path: Path) -> None:
    name = f"{LAYER}.self_attention.query_key_value.weight"
    tensors = as_chatglm(glm)
    tensors[name] = tensors[name][:-1].contiguous()
    with pytest.raises(DamagedFileError, match=f"{name}: 127 x 64, the config says 128 x 64"):
        _ = open_checkpoint(write_folder(tmp_path, tensors)).config


def test_a_missing_tensor_is_named_as_the_file_would(glm: GlmForCausalLM, tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.dense_h_to_4h.weight"
    tensors = as_chatglm(glm)
    del tensors[name]
    with pytest.raises(DamagedFileError, match=f"{name} is missing, the config says 192 x 64"):
        _ = open_checkpoint(write_folder(tmp_path, tensors)).config


def test_a_folder_without_a_template_has_the_family_s(folder: Path) -> None:
    model = llamachat.load(folder, dtype="float32", threads=1)
    template = template_for(model.chat_template, model.tokenizer)
    assert template.segments([Message("user", "0")])[:2] == [76, 78]
    assert (model.tokenizer.vocab_size, model.tokenizer.stop_ids) == (80, {2})


@pytest.fixture(scope="module")
def tokenizer(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The real one."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    shutil.copy(data / "tokenizers" / "chatglm2" / "tokenizer.model", folder)
    return open_checkpoint(folder).tokenizer()


def test_published_texts_have_their_published_ids(data: Path, tokenizer: Tokenizer) -> None:
    for case in published_texts(data)["chatglm2_encode"]:
        assert encode([64790, 64792, case["text"]], tokenizer) == case["ids"]


def test_published_conversations_have_their_prompts_and_ids(
    data: Path, folder: Path, tokenizer: Tokenizer
) -> None:
    template = template_for(open_checkpoint(folder).chat_template, tokenizer)
    texts = published_texts(data)
    ids = {case["text"]: case["ids"] for case in texts["chatglm2_encode"]}
    for case in texts["chatglm2_prompt"]:
        segments = template.segments([Message(role, text) for role, text in case["messages"]])
        assert render(segments, tokenizer) == f"[gMASK]sop{case['prompt']}"
        assert encode(segments, tokenizer) == ids[case["prompt"]]


def published_texts(data: Path) -> dict[str, Any]:
    path = data / "vectors" / "chatglm2" / "tokenizer_and_prompts.json"
    texts: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return texts


def test_a_system_message_goes_before_the_first_question(
    folder: Path, tokenizer: Tokenizer
) -> None:
    template = template_for(open_checkpoint(folder).chat_template, tokenizer)
    talk = [
        Message("system", "Be brief."), Message("user", "1"),
        Message("assistant", "2"), Message("user", " 3 "),
    ]  # fmt: skip
    assert render(template.segments(talk), tokenizer) == (
        "[gMASK]sop[Round 1]\n\n问：Be brief.\n\n1\n\n答：2\n\n[Round 2]\n\n问：3\n\n答："
    )


def test_a_reply_s_own_ids_are_followed_by_the_next_round_without_a_space(
    folder: Path, tokenizer: Tokenizer
) -> None:
    """So that the cache of the first round is reused."""
    template = template_for(open_checkpoint(folder).chat_template, tokenizer)
    first = [Message("user", "你好")]
    reply = tuple(tokenizer.encode("你好")[1:])
    talk = [*first, Message("assistant", "你好", reply), Message("user", "3")]
    start = [*encode(template.segments(first), tokenizer), *reply]
    ids = encode(template.segments(talk), tokenizer)
    assert ids[: len(start)] == start
    assert ids[len(start) :][:5] == [13, 13, 30995, 30951, 517]  # as in the published vector


def test_text_that_spells_special_tokens_stays_text(folder: Path, tokenizer: Tokenizer) -> None:
    text = "[gMASK] sop eop [MASK] </s> <s>"
    template = template_for(open_checkpoint(folder).chat_template, tokenizer)
    ids = encode(template.segments([Message("user", text)]), tokenizer)
    assert ids[:2] == [64790, 64792]
    assert not {*ids[2:]} & {0, 1, 2, *range(64789, 64794)}
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_not_decoded_and_a_reply_ends_with_2(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([64790, 64792, 36474, 54591, 64793, 2]) == "你好"
    assert tokenizer.stop_ids == {2}
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.add_bos) == (64794, None, False)
