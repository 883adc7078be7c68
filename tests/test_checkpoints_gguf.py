"""GGUF files: what is read equals what was written, whatever the type, order or split."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file

from llamachat.checkpoints import open_checkpoint
from llamachat.checkpoints.gguf import GgufCheckpoint
from llamachat.checkpoints.gguf_header import read_header
from llamachat.checkpoints.safetensors import FolderCheckpoint
from llamachat.errors import DamagedFileError
from llamachat.quant.tensor import QTensor

QUANTIZED = (
    *(Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1),
    *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS),
)
# Where a block keeps its float16 numbers: random bits there would be infinities.
FLOAT16_AT = {
    **dict.fromkeys((Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.IQ4_NL, Type.IQ4_XS), (0,)),
    **dict.fromkeys((Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K), (0, 2)),
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q6_K: (208,),
}
DIM, HEADS, KV_HEADS, HIDDEN, VOCAB = 256, 4, 2, 512, 40
LAYER = {
    "attn_q": ("self_attn.q_proj", (DIM, DIM)),
    "attn_k": ("self_attn.k_proj", (DIM // 2, DIM)),
    "attn_v": ("self_attn.v_proj", (DIM // 2, DIM)),
    "attn_output": ("self_attn.o_proj", (DIM, DIM)),
    "ffn_gate": ("mlp.gate_proj", (HIDDEN, DIM)),
    "ffn_up": ("mlp.up_proj", (HIDDEN, DIM)),
    "ffn_down": ("mlp.down_proj", (DIM, HIDDEN)),
    "attn_norm": ("input_layernorm", (DIM,)),
    "ffn_norm": ("post_attention_layernorm", (DIM,)),
}
Tensors = dict[str, tuple[Type, np.ndarray]]  # rows of bytes, or of floats


def random_blocks(kind: Type, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of random bits, but finite scales: (rows, bytes) uint8."""
    rng = np.random.default_rng(seed)
    per_block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // per_block, n_bytes), dtype=np.uint8)
    for at in FLOAT16_AT[kind]:
        scales = rng.standard_normal((len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def tiny_llama(kind: Type = Type.F32, layers: int = 2, *, tied: bool = False) -> Tensors:
    """Weights in Hugging Face's row order, by their GGUF names."""
    shapes = {"token_embd": (VOCAB, DIM), "output_norm": (DIM,)}
    shapes |= {} if tied else {"output": (VOCAB, DIM)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, (_, shape) in LAYER.items()}
    tensors: Tensors = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 2 and kind in QUANTIZED:
            tensors[f"{name}.weight"] = kind, random_blocks(kind, *shape, seed)
            continue
        values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        if kind is Type.F32 or len(shape) == 1:
            tensors[f"{name}.weight"] = Type.F32, values
        else:
            tensors[f"{name}.weight"] = kind, gguf.quants.quantize(values, kind)
    return tensors


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of llama.cpp's converter: Hugging Face's row order to GGUF's."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    tensors: Tensors,
    layers: int = 2,
    *,
    architecture: str = "llama",
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    **options: Any,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture, **options)
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    change(writer)
    for name, (kind, values) in tensors.items():
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        stored = values if heads is None else interleaved(values, heads)
        writer.add_tensor(name, np.ascontiguousarray(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_all(path: Path) -> dict[str, torch.Tensor | QTensor]:
    return dict(open_checkpoint(path).tensors())


def hf_items(tensors: Tensors) -> Iterator[tuple[str, Type, np.ndarray]]:
    for name, (kind, values) in tensors.items():
        outer = {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
        }
        if name in outer:
            yield outer[name], kind, values
        else:
            _, layer, part, _ = name.split(".")
            yield f"model.layers.{layer}.{LAYER[part][0]}.weight", kind, values


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_quantized_weights_equal_those_of_the_gguf_package_bit_for_bit(
    kind: Type, tmp_path: Path
) -> None:
    tensors = tiny_llama(kind, layers=1)
    found = read_all(write_gguf(tmp_path / "tiny.gguf", tensors, layers=1))
    for name, stored_kind, raw in hf_items(tensors):
        expected = gguf.quants.dequantize(raw, stored_kind)
        tensor = found[name]
        if stored_kind is not Type.F32:
            assert isinstance(tensor, QTensor)
            tensor = tensor.dequantize()
        assert np.array_equal(tensor.numpy().view(np.int32), expected.view(np.int32)), name


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Type.F32, torch.float32), (Type.F16, torch.float16), (Type.BF16, torch.bfloat16)],
    ids=lambda value: value.name if isinstance(value, Type) else "",
)
def test_gguf_and_folder_of_one_model_give_equal_tensors(
    kind: Type, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = tiny_llama(kind)
    expected = {
        name: torch.from_numpy(gguf.quants.dequantize(values, stored_kind)).to(
            torch.float32 if values.ndim == 1 else dtype
        )
        for name, stored_kind, values in hf_items(tensors)
    }
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 256, "intermediate_size": 512,'
        ' "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,'
        ' "vocab_size": 40, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}'
    )
    save_file(expected, folder / "model.safetensors")
    from_gguf = list(open_checkpoint(write_gguf(tmp_path / "tiny.gguf", tensors)).tensors())
    from_folder = list(FolderCheckpoint(folder).tensors())
    assert [name for name, _ in from_gguf] == [name for name, _ in from_folder]
    for (name, one), (_, other) in zip(from_gguf, from_folder, strict=True):
        assert isinstance(one, torch.Tensor)
        assert isinstance(other, torch.Tensor)
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


def test_without_an_output_weight_the_head_is_tied(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True))
    assert GgufCheckpoint(path).config.tied
    assert "lm_head.weight" not in read_all(path)


def test_rope_freqs_are_yielded_under_that_name(tmp_path: Path) -> None:
    freqs = np.linspace(1, 8, DIM // HEADS // 2, dtype=np.float32)
    tensors = {**tiny_llama(), "rope_freqs.weight": (Type.F32, freqs)}
    found = read_all(write_gguf(tmp_path / "tiny.gguf", tensors))["rope_freqs"]
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == freqs.tolist()


def test_rope_freqs_of_zero_are_refused(tmp_path: Path) -> None:
    freqs = np.zeros(DIM // HEADS // 2, dtype=np.float32)
    tensors = {**tiny_llama(), "rope_freqs.weight": (Type.F32, freqs)}
    path = write_gguf(tmp_path / "tiny.gguf", tensors)
    with pytest.raises(DamagedFileError, match=r"tiny\.gguf: rope_freqs.weight has values from 0"):
        read_all(path)


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_any_part_of_a_split_file_opens_the_whole(opened: int, tmp_path: Path) -> None:
    tensors = tiny_llama()
    whole = read_all(write_gguf(tmp_path / "whole.gguf", tensors))
    write_gguf(tmp_path / "split.gguf", tensors, split_max_tensors=9)
    parts = sorted(tmp_path.glob("split-*"))
    assert len(parts) == 3
    checkpoint = GgufCheckpoint(parts[opened])
    assert checkpoint.files == tuple(parts)
    assert checkpoint.metadata["name"] == "tiny"
    found = dict(checkpoint.tensors())
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "split.gguf", tiny_llama(), split_max_tensors=9)
    (tmp_path / "split-00002-of-00003.gguf").unlink()
    with pytest.raises(DamagedFileError, match=r"split-00002-of-00003\.gguf: no such file"):
        _ = GgufCheckpoint(tmp_path / "split-00001-of-00003.gguf").config


def test_parts_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "split.gguf", tiny_llama(), split_max_tensors=9)
    one, two, _ = sorted(tmp_path.glob("split-*"))
    two.rename(tmp_path / "kept")
    one.rename(two)
    (tmp_path / "kept").rename(one)
    with pytest.raises(
        DamagedFileError, match=r"00001-of-00003\.gguf: split.no 1 of split.count 3"
    ):
        _ = GgufCheckpoint(one).config


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    for number in (0, 1):

        def change(writer: gguf.GGUFWriter, number: int = number) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 2)

        path = tmp_path / f"twice-{number + 1:05}-of-00002.gguf"
        write_gguf(path, tiny_llama(), change=change)
    with pytest.raises(DamagedFileError, match=r"blk.0.attn_k.weight is also in another part"):
        _ = GgufCheckpoint(path).config


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "split.gguf", tiny_llama(), split_max_tensors=9)
    path = (tmp_path / "split-00001-of-00003.gguf").rename(tmp_path / "renamed.gguf")
    with pytest.raises(DamagedFileError, match=r"renamed\.gguf: split.no 0 of split.count 3"):
        _ = GgufCheckpoint(path).config


def test_form_is_the_type_that_takes_most_bytes(tmp_path: Path) -> None:
    tensors = {**tiny_llama(Type.Q4_1), "token_embd.weight": tiny_llama()["token_embd.weight"]}
    assert GgufCheckpoint(write_gguf(tmp_path / "tiny.gguf", tensors)).form == "Q4_1"


def resized(name: str, rows: int) -> Tensors:
    return {**tiny_llama(), name: (Type.F32, np.zeros((rows, DIM), np.float32))}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            resized("blk.1.attn_q.weight", 128),
            "blk.1.attn_q.weight: 128 x 256, the config says 256 x 256",
        ),
        (
            {**tiny_llama(), "blk.1.ffn_up.bias": (Type.F32, np.zeros(HIDDEN, np.float32))},
            "blk.1.ffn_up.bias: 512, the config says there is no such tensor",
        ),
        (
            {**tiny_llama(), "blk.0.attn_q.bias": (Type.F32, np.zeros(DIM, np.float32))},
            "blk.0.attn_k.bias is missing, the config says 128",
        ),
        (
            {k: v for k, v in tiny_llama().items() if k != "blk.1.ffn_up.weight"},
            "blk.1.ffn_up.weight is missing, the config says 512 x 256",
        ),
        (
            {k: v for k, v in tiny_llama().items() if k != "token_embd.weight"},
            "token_embd.weight is missing",
        ),
        (
            {
                **tiny_llama(),
                "output_norm.weight": (Type.Q8_0, random_blocks(Type.Q8_0, 1, DIM)[0]),
            },
            "output_norm.weight: a vector of type Q8_0, expected F32",
        ),
    ],
    ids=["rows", "bias", "one of three biases", "missing", "no embedding", "quantized norm"],
)
def test_tensors_that_the_config_does_not_say_are_refused(
    tensors: Tensors, message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tensors)
    with pytest.raises(DamagedFileError) as caught:
        _ = GgufCheckpoint(path).config
    assert caught.value.message.startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", 2**31, "llama.block_count is 2147483648, expected a whole number"),
        ("llama.block_count", 2**31 - 1, "blk.2.attn_norm.weight is missing"),
        ("llama.block_count", "two", "llama.block_count is 'two', expected a whole number"),
        ("llama.block_count", [2, 2], "llama.block_count is array([2, 2]"),
        ("llama.attention.head_count", True, "llama.attention.head_count is True, expected"),
        ("llama.attention.head_count", 0, "llama.attention.head_count is 0, expected"),
        ("llama.attention.head_count_kv", 3, "4 heads cannot share 3 key/value heads"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "rms_epsilon is nan, expected"),
        ("llama.rope.freq_base", float("inf"), "llama.rope.freq_base is inf, expected"),
        ("llama.rope.dimension_count", 32, "dimension_count is 32, expected head_dim 64"),
        ("llama.rope.scaling.type", "ntk", "scaling.type is 'ntk', expected none, linear"),
        ("llama.rope.scaling.type", [1, 2], "rope.scaling.type is array([1, 2]"),
        ("llama.expert_count", 8, "llama.expert_count is 8, expected none"),
        ("llama.vocab_size", 41, "token_embd.weight: 40 rows, llama.vocab_size is 41"),
        ("tokenizer.ggml.tokens", ["a"] * 41, "40 rows, tokenizer.ggml.tokens has 41"),
        ("tokenizer.ggml.tokens", 7, "tokenizer.ggml.tokens is 7, expected strings"),
    ],
)
def test_metadata_that_cannot_be_true_is_refused(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        kind = gguf.GGUFValueType.get_type(value)
        wide = gguf.GGUFValueType.INT64 if kind is gguf.GGUFValueType.INT32 else kind
        writer.add_key_value(key, value, wide)

    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), change=change)
    with pytest.raises(DamagedFileError) as caught:
        _ = GgufCheckpoint(path).config
    assert caught.value.message.startswith(f"{path}: ")
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_another_architecture_is_refused_by_its_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), architecture="gpt2")
    with pytest.raises(DamagedFileError) as caught:
        _ = GgufCheckpoint(path).config
    assert caught.value.message == (
        f"{path}: general.architecture is 'gpt2', expected 'llama' or 'chatglm'"
    )


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    checkpoint = GgufCheckpoint(path)
    _ = checkpoint.config
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DamagedFileError, match=r"tiny\.gguf: .* has shrunk to"):
        list(checkpoint.tensors())


def test_metadata_is_read_as_it_was_written(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_token_list(["a", "", "▁é", "\n"])
        writer.add_token_scores([0.5, -1.0, 2.0, 3.0])
        writer.add_uint64("u64", 2**64 - 1)
        writer.add_int8("i8", -3)
        writer.add_float64("f64", 0.1)
        writer.add_bool("yes", val=True)

    found = read_header(write_gguf(tmp_path / "v.gguf", {}, change=change)).metadata
    assert found["tokenizer.ggml.tokens"] == ["a", "", "▁é", "\n"]
    assert found["tokenizer.ggml.scores"].tolist() == [0.5, -1.0, 2.0, 3.0]
    assert [found[key] for key in ("u64", "i8", "f64", "yes")] == [2**64 - 1, -3, 0.1, True]
    assert found["general.name"] == "tiny"


def test_a_file_without_tensors_still_has_metadata_and_a_template(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "v.gguf", {}, change=lambda writer: writer.add_chat_template("{{ messages }}")
    )
    checkpoint = GgufCheckpoint(path)
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.form == "no weights"


def test_opening_does_not_import_torch(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    program = (
        "import sys; from pathlib import Path; from llamachat.checkpoints import open_checkpoint;"
        f"c = open_checkpoint(Path({str(path)!r})); c.config, c.form, c.files, c.chat_template;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_real_file_has_the_shape_that_it_is_known_for(data: Path) -> None:
    checkpoint = open_checkpoint(data / "models" / "stories260K" / "stories260K.gguf")
    config = checkpoint.config
    assert (config.n_layers, config.n_heads, config.n_kv_heads, config.vocab_size) == (5, 8, 4, 512)
    assert checkpoint.form == "F32"
    assert sum(tensor.numel() for _, tensor in checkpoint.tensors()) == config.n_params
