"""Hugging Face folders: the same model from one file or shards, and what is refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llamachat.architecture import RopeScaling
from llamachat.checkpoints import open_checkpoint
from llamachat.checkpoints.safetensors import FolderCheckpoint
from llamachat.errors import DamagedFileError

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 24,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LAYER_SHAPES = {
    "input_layernorm": (32,),
    "self_attn.q_proj": (64, 32),
    "self_attn.k_proj": (32, 32),
    "self_attn.v_proj": (32, 32),
    "self_attn.o_proj": (32, 64),
    "post_attention_layernorm": (32,),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (24, 32)}
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{k}.weight": v for k, v in LAYER_SHAPES.items()}
    shapes |= {"model.norm.weight": (32,), "lm_head.weight": (24, 32)}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_folder(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", {**CONFIG, **config})
    save_file(weights() if tensors is None else tensors, folder / SINGLE)
    return folder


def write_shards(folder: Path) -> Path:
    """Alternate tensors in two shards, beside a third file that the index does not name."""
    folder.mkdir()
    write_json(folder / "config.json", CONFIG)
    tensors = weights()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {name: names[index % 2] for index, name in enumerate(tensors)}
    for shard in names:
        save_file({k: v for k, v in tensors.items() if weight_map[k] == shard}, folder / shard)
    save_file({"stray": torch.zeros(1)}, folder / "model-00003-of-00003.safetensors")
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(DamagedFileError) as caught:
        list(FolderCheckpoint(folder).tensors())
    message = caught.value.message
    assert message.startswith(str(folder))
    assert message.isprintable()
    return message


@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")]
)
def test_tensors_are_yielded_as_they_are_stored(
    dtype: torch.dtype, form: str, tmp_path: Path
) -> None:
    expected = weights(dtype)
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", expected))
    assert checkpoint.form == form
    found = dict(checkpoint.tensors())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert isinstance(tensor, torch.Tensor)
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name


def test_shards_give_what_one_file_gives(tmp_path: Path) -> None:
    checkpoint = FolderCheckpoint(write_shards(tmp_path / "shards"))
    expected = weights()
    found = dict(checkpoint.tensors())
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [path.name for path in checkpoint.files] == [
        "config.json",
        INDEX,
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_without_a_head_the_embedding_is_it(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["lm_head.weight"]
    checkpoint = FolderCheckpoint(write_folder(tmp_path / "m", tensors))
    assert checkpoint.config.tied


def test_the_head_of_a_tied_model_is_not_read(tmp_path: Path) -> None:
    checkpoint = FolderCheckpoint(write_folder(tmp_path / "m", tie_word_embeddings=True))
    assert checkpoint.config.tied
    assert "lm_head.weight" not in dict(checkpoint.tensors())


def test_old_tables_of_inverse_frequencies_are_ignored(tmp_path: Path) -> None:
    tensors = weights() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    checkpoint = FolderCheckpoint(write_folder(tmp_path / "m", tensors))
    assert dict(checkpoint.tensors()).keys() == weights().keys()


def test_rope_parameters_are_read_in_both_spellings(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    older = write_folder(tmp_path / "a", rope_theta=5e5, rope_scaling=scaling)
    newer = write_folder(tmp_path / "b", rope_parameters={"rope_theta": 5e5, **scaling})
    config = FolderCheckpoint(older).config
    assert config == FolderCheckpoint(newer).config
    assert (config.rope_theta, config.rope_scaling) == (5e5, RopeScaling("linear", 4.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', expected 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"hidden_size": None}, "hidden_size is missing, expected a whole number"),
        ({"hidden_size": 32.5}, "hidden_size is 32.5, expected a whole number"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is 1000000000"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a positive number"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ({"mlp_bias": True}, "mlp_bias is True, expected none"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        (
            {"rope_scaling": {"type": "longrope"}},
            "rope scaling is 'longrope', expected none, linear",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing, expected a positive"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, expected none"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "m", **change)
    assert refusal(folder).startswith(f"{folder / 'config.json'}: {message}")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm.weight", torch.zeros(31), "model.norm.weight: 31, the config says 32"),
        (
            "lm_head.weight",
            torch.zeros(23, 32),
            "lm_head.weight: 23 x 32, the config says 24 x 32",
        ),
        (
            "model.layers.1.self_attn.q_proj.bias",
            torch.zeros(64),
            "model.layers.1.self_attn.q_proj.bias: 64, the config says there is no such tensor",
        ),
        (
            "model.norm.weight",
            torch.zeros(32, dtype=torch.int8),
            "model.norm.weight: type I8, expected F32, F16, BF16",
        ),
    ],
)
def test_tensors_that_the_config_does_not_say_are_refused(
    name: str, tensor: torch.Tensor, message: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "m", {**weights(), name: tensor})
    assert refusal(folder) == f"{folder}: {message}"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    folder = write_folder(tmp_path / "m", tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    assert refusal(folder) == f"{folder}: {name} is missing, the config says 48 x 32"


@pytest.mark.parametrize("length", [0, 5, 8, 100, 2000, -1])
def test_a_truncated_file_is_refused_by_its_name(length: int, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "m") / SINGLE
    path.write_bytes(path.read_bytes()[:length])
    assert refusal(path.parent).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 4) + b"\xff\xfe{}",
        struct.pack("<Q", 10_000) + b"[" * 10_000,
        struct.pack("<Q", 62) + b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_off',
    ],
)
def test_a_damaged_header_is_refused_by_its_name(content: bytes, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "m") / SINGLE
    path.write_bytes(content)
    assert refusal(path.parent).startswith(f"{path}: ")


def test_a_folder_without_weights_says_what_it_wants(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "m") / SINGLE
    path.unlink()
    assert refusal(path.parent) == f"{path}: no such file, expected weights"


def test_a_folder_without_a_config_says_what_it_wants(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "m") / "config.json"
    path.unlink()
    assert refusal(path.parent).startswith(f"{path}: no such file, expected")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "m") / "model-00002-of-00002.safetensors"
    shard.unlink()
    assert refusal(shard.parent).startswith(f"{shard}: no such file")


def test_a_shard_without_the_tensor_that_the_index_promises_is_named(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "m") / "model-00002-of-00002.safetensors"
    save_file({"other": torch.zeros(1)}, shard)
    assert refusal(shard.parent).startswith(f"{shard}: no tensor ")


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "..",
        "",
        "a/b.safetensors",
        "a\\b.safetensors",
        "C:x.safetensors",
        "a\0b",
        "x" * 300,
        7,
        None,
    ],
)
def test_a_shard_outside_the_folder_is_refused(shard: object, tmp_path: Path) -> None:
    path = write_shards(tmp_path / "m") / INDEX
    write_json(path, {"weight_map": {"model.norm.weight": shard}})
    assert refusal(path.parent).startswith(f"{path}: model.norm.weight is in ")


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff", b"[" * 100_000, b"9" * 10_000])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_malformed_json_is_refused_by_the_name_of_the_file(
    name: str, content: bytes, tmp_path: Path
) -> None:
    path = write_shards(tmp_path / "m") / name
    path.write_bytes(content)
    message = refusal(path.parent)
    assert message.startswith(f"{path}: ")
    assert message.count(str(path)) == 1


def test_a_huge_json_file_is_refused_unread(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "m") / "config.json"
    with path.open("r+b") as file:
        file.truncate(65 * 2**20)
    assert refusal(path.parent) == f"{path}: {65 * 2**20} bytes, expected at most {64 * 2**20}"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"chat_template.jinja": "A"}, "A"),
        ({"tokenizer_config.json": '{"chat_template": "B"}'}, "B"),
        ({"chat_template.jinja": "A", "tokenizer_config.json": '{"chat_template": "B"}'}, "A"),
        (
            {
                "tokenizer_config.json": '{"chat_template": ['
                '{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}'
            },
            "D",
        ),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "x", "template": "T"}]}'}, None),
    ],
)
def test_the_chat_template_is_found_where_it_is_kept(
    files: dict[str, str], expected: str | None, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert FolderCheckpoint(tmp_path).chat_template == expected


@pytest.mark.parametrize("template", [7, ["A"], [{"name": "default", "template": 7}]])
def test_a_chat_template_of_another_kind_is_refused(template: object, tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
    with pytest.raises(DamagedFileError, match=r"tokenizer_config\.json: chat_template is "):
        _ = FolderCheckpoint(tmp_path).chat_template


def test_generation_defaults_are_passed_on(tmp_path: Path) -> None:
    assert FolderCheckpoint(tmp_path).generation == {}
    write_json(tmp_path / "generation_config.json", {"temperature": 0.6})
    assert FolderCheckpoint(tmp_path).generation == {"temperature": 0.6}


def test_opening_does_not_import_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from llamachat.checkpoints import open_checkpoint;"
        f"c = open_checkpoint(Path({str(write_shards(tmp_path / 'm'))!r}));"
        "c.config, c.form, c.files, c.chat_template, c.generation;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
