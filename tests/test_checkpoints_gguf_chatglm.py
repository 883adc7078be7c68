"""ChatGLM2 as GGUF: the model of its folder, with the real tokenizer in the metadata."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf_files import write_gguf
from test_model_chatglm import IDS, published_texts, write_folder
from test_tokenizer_sentencepiece import metadata_of, reference
from torch import Tensor

import llamachat
from llamachat.chat.builtin import template_for
from llamachat.chat.templates import Message, encode
from llamachat.checkpoints import open_checkpoint
from llamachat.checkpoints.gguf import GgufCheckpoint
from llamachat.errors import DamagedFileError
from llamachat.kernels.backends import choose
from llamachat.library.store import require
from llamachat.measure.quantizing import Wanted, quantize
from llamachat.tokenizer import Tokenizer
from llamachat.tokenizer.spm import PieceType, model_proto

LAYER = {
    "input_layernorm.weight": (64,),
    "self_attention.query_key_value.weight": (128, 64),
    "self_attention.query_key_value.bias": (128,),
    "self_attention.dense.weight": (64, 64),
    "post_attention_layernorm.weight": (64,),
    "mlp.dense_h_to_4h.weight": (192, 64),
    "mlp.dense_4h_to_h.weight": (64, 96),
}
PIECES = ["<unk>", "<s>", "</s>", "▁", *(chr(ord("0") + i) for i in range(71))]
SPECIALS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]


def random_tensors() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (80, 64),
        "transformer.encoder.final_layernorm.weight": (64,),
        "transformer.output_layer.weight": (80, 64),
    }
    for layer in range(2):
        shapes |= {f"transformer.encoder.layers.{layer}.{k}": shape for k, shape in LAYER.items()}
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(shape, generator=generator) * (1 if len(shape) == 1 else 0.2)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("chatglm2"), random_tensors())
    types = [PieceType.UNKNOWN, PieceType.CONTROL, PieceType.CONTROL, *[PieceType.NORMAL] * 72]
    proto = model_proto(PIECES, [0.0] * 75, types, add_dummy_prefix=True)
    (folder / "tokenizer.model").write_bytes(proto)
    return folder


def add_tokenizer(writer: GGUFWriter, *more: str) -> None:
    """`set_vocab_chatglm3` of convert_hf_to_gguf.py: the rest of the table is unused."""
    tokens = [*PIECES, *SPECIALS, *more]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("chatglm-spm")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    kinds = [2, 3, 3, *[1] * 72, *[3] * (len(tokens) - 75)]
    writer.add_token_types(kinds)
    writer.add_eos_token_id(2)


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(folder, tmp_path_factory.mktemp("gguf") / "glm.gguf", change=add_tokenizer)


def logits(path: Path, **settings: Any) -> Tensor:
    return llamachat.load(path, threads=1, **({"dtype": "float32"} | settings)).logits(IDS)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_gguf_gives_every_bit_of_its_folder_s_answer(
    folder: Path, file: Path, backend: str
) -> None:
    assert torch.equal(logits(file, backend=backend), logits(folder, backend=backend))


def test_both_forms_have_one_config_and_one_template(folder: Path, file: Path) -> None:
    one, other = open_checkpoint(file), open_checkpoint(folder)
    assert replace(one.config, norm_eps=1e-5) == other.config  # GGUF has it in float32
    assert one.config.rope_dim == 8
    assert one.chat_template == other.chat_template


def test_quantized_blocks_are_taken_apart_as_floats_are(folder: Path, tmp_path: Path) -> None:
    file = write_gguf(folder, tmp_path / "q8.gguf", Type.Q8_0, change=add_tokenizer)
    rounded = {
        name: through_q8_0(tensor) if tensor.ndim == 2 else tensor
        for name, tensor in random_tensors().items()
    }
    floats = write_folder(tmp_path / "floats", rounded)
    (floats / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    assert torch.equal(logits(file, quantize="none"), logits(floats))


def through_q8_0(tensor: Tensor) -> Tensor:
    blocks = gguf.quants.quantize(tensor.numpy(), Type.Q8_0)
    return torch.from_numpy(gguf.quants.dequantize(blocks, Type.Q8_0))


@pytest.mark.skipif(choose().name != "native", reason="no native kernels")
def test_what_is_quantized_from_a_gguf_keeps_biases_and_template(
    folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path / "cache"))
    made = quantize(
        require(str(file)), Wanted("int8"), name="glm", folder=tmp_path / "int8", threads=1,
        notice=lambda _: None, progress=lambda *_: None,
    )  # fmt: skip
    assert torch.equal(logits(made, dtype="auto"), logits(folder, dtype="auto", quantize="int8"))
    assert open_checkpoint(made).chat_template == open_checkpoint(file).chat_template


def test_its_own_template_comes_first(folder: Path, tmp_path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        add_tokenizer(writer)
        writer.add_chat_template("{{ messages }}")

    file = write_gguf(folder, tmp_path / "own.gguf", change=change)
    assert open_checkpoint(file).chat_template == "{{ messages }}"


def test_a_successor_with_tokens_for_roles_does_not_get_chatglm2_s_template(
    folder: Path, tmp_path: Path
) -> None:
    """ChatGLM3 has the same block."""
    file = write_gguf(folder, tmp_path / "3.gguf", change=lambda it: add_tokenizer(it, "<|user|>"))
    assert open_checkpoint(file).chat_template is None


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (
            lambda it: it.kv_data[0].pop("chatglm.rope.dimension_count"),
            {},
            "chatglm.rope.dimension_count is missing, expected a whole number",
        ),
        (
            lambda it: it.kv_data[0]["chatglm.rope.dimension_count"].__setattr__("value", 9),
            {},
            "rope_dim is 9, expected an even number up to 16",
        ),
        (
            lambda it: it.add_float32("chatglm.rope.scaling.factor", -1.0),
            {},
            "chatglm.rope.scaling.factor is -1.0, expected a positive number",
        ),
        (
            lambda it: it.add_vocab_size(81),
            {},
            "token_embd.weight: 80 rows, chatglm.vocab_size is 81",
        ),
        (
            lambda _: None,
            {"blk.0.attn_q.bias": np.zeros(64, np.float32)},
            "blk.0.attn_q.bias: 64, the config says there is no such tensor",
        ),
        (
            lambda _: None,
            {"rope_freqs.weight": np.ones(8, np.float32)},
            "rope_freqs.weight: 8, the config says 4",
        ),
        (
            lambda it: it.kv_data[0].pop("chatglm.attention.layer_norm_rms_epsilon"),
            {},
            "chatglm.attention.layer_norm_rms_epsilon is missing, expected a positive number",
        ),
        (
            lambda _: None,
            {"blk.0.attn_norm.bias": np.zeros(64, np.float32)},
            "blk.0.attn_norm.bias: 64, the config says there is no such tensor",
        ),
    ],
    ids=[
        *("no rope", "odd rope", "scaling", "vocabulary", "bias", "divisors"),
        *("ChatGLM-6B's epsilon", "ChatGLM-6B's norms"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    change: Callable[[GGUFWriter], object],
    more: dict[str, Any],
    message: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    path = write_gguf(folder, tmp_path / "bad.gguf", change=change, more=more)
    with pytest.raises(DamagedFileError) as caught:
        _ = GgufCheckpoint(path).config
    assert caught.value.message.startswith(f"{path}: {message}")


@pytest.fixture(scope="module")
def real(data: Path, tmp_path_factory: pytest.TempPathFactory) -> GgufCheckpoint:
    """The real vocabulary as the converter writes it, in a file without tensors."""
    model = reference(data, "chatglm2")
    keys = metadata_of(model)
    unused = [f"[PAD{i}]" for i in range(64794, 65024)]
    tokens = [*keys["tokenizer.ggml.tokens"], *SPECIALS, *unused]
    tokens[1:3] = ["<bos>", "<eos>"]
    path = tmp_path_factory.mktemp("real") / "chatglm2.gguf"
    writer = GGUFWriter(path, "chatglm")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("chatglm-spm")
    writer.add_token_list(tokens)
    writer.add_token_scores([*keys["tokenizer.ggml.scores"], *[0.0] * 235])
    writer.add_token_types([*keys["tokenizer.ggml.token_type"], *[3] * 5, *[5] * 230])
    writer.add_eos_token_id(2)
    writer.add_bool("tokenizer.ggml.add_bos_token", val=False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufCheckpoint(path)


@pytest.fixture(scope="module")
def tokenizer(real: GgufCheckpoint) -> Tokenizer:
    return real.tokenizer()


def test_published_conversations_have_their_ids(
    data: Path, real: GgufCheckpoint, tokenizer: Tokenizer
) -> None:
    template = template_for(real.chat_template, tokenizer)
    texts = published_texts(data)
    ids = {case["text"]: case["ids"] for case in texts["chatglm2_encode"]}
    for case in texts["chatglm2_prompt"]:
        messages = [Message(role, text) for role, text in case["messages"]]
        assert encode(template.segments(messages), tokenizer) == ids[case["prompt"]]


def test_ids_equal_sentencepieces(data: Path, tokenizer: Tokenizer) -> None:
    model = reference(data, "chatglm2")
    wiki = (data / "text/wiki.test.raw").read_text(encoding="utf-8")[:150_000]
    for text in (wiki, "[gMASK] sop eop </s> [PAD64795]", "人工智能助手 ChatGLM2-6B，很高兴见到你"):
        assert tokenizer.encode(text) == model.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_reply_ends_with_2_and_a_prompt_has_no_bos(tokenizer: Tokenizer) -> None:
    assert (tokenizer.stop_ids, tokenizer.eos_id, tokenizer.add_bos) == ({2}, 2, False)
    assert tokenizer.specials["[gMASK]"] == 64790
    assert tokenizer.specials["sop"] == 64792
