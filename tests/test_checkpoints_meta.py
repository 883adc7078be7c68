"""Meta's folders: the model of the same Hugging Face folder, however many shards it lies in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import llamachat
from llamachat.checkpoints import open_checkpoint
from llamachat.checkpoints.pickled import read_pickled
from llamachat.checkpoints.quantized_writer import QuantizedWriter, weight_files
from llamachat.errors import DamagedFileError

IDS = [(7 * i * i + 31 * i + 5) % 256 for i in range(24)]
# 2 * 4 * 64 / 3 = 170, times 0.56 is 95, rounded up to a multiple of 32
PARAMS: dict[str, Any] = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 272, "multiple_of": 32,
    "ffn_dim_multiplier": 0.56, "norm_eps": 1e-5,
}  # fmt: skip
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
ROWS = ("o_proj", "down_proj")
NAMES = {
    "model.layers": "layers", "model.embed_tokens": "tok_embeddings", "model.norm": "norm",
    "lm_head": "output", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def meta_name(name: str) -> str:
    for theirs, metas in NAMES.items():
        name = name.replace(theirs, metas)
    return name


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """`permute` of llama.cpp's convert_hf_to_gguf.py, the inverse of transformers' converter."""
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def parts(name: str, tensor: Tensor, n: int, *, kv_heads: int, embedding_axis: int) -> list[Tensor]:
    if "k_proj" in name or "v_proj" in name:
        tensor = tensor.view(kv_heads, -1, tensor.shape[1])
        tensor = tensor.repeat_interleave(max(1, n // kv_heads), 0).flatten(0, 1)
    axis = 0 if any(part in name for part in COLUMNS) else 1
    if "embed_tokens" in name:
        axis = embedding_axis
    if "norm" in name:
        return [tensor] * n
    return [part.clone() for part in tensor.tensor_split(n, axis)]


def write_meta(
    source: Path, target: Path, n: int = 1, *, embedding_axis: int = 1, **params: Any
) -> Path:
    """The model of a Hugging Face folder in `n` shards."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    kv_heads = tensors["model.layers.0.self_attn.k_proj.weight"].shape[0] // 16
    shards: list[dict[str, Tensor]] = [{"rope.freqs": torch.ones(8)} for _ in range(n)]
    for name, whole in tensors.items():
        heads = 4 if "q_proj" in name else kv_heads
        tensor = interleaved(whole, heads) if "q_proj" in name or "k_proj" in name else whole
        cut = parts(name, tensor, n, kv_heads=kv_heads, embedding_axis=embedding_axis)
        for shard, part in zip(shards, cut, strict=True):
            shard[meta_name(name)] = part
    for number, shard in enumerate(shards):
        torch.save(shard, target / f"consolidated.{number:02}.pth")
    values = PARAMS | {"n_kv_heads": kv_heads} | params
    write_params(target, {key: value for key, value in values.items() if value is not ...})
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    return target


def write_params(folder: Path, params: dict[str, Any]) -> None:
    (folder / "params.json").write_text(json.dumps(params), "utf-8")


def saved(shard: Path) -> dict[str, Any]:
    """The tensors of a file that can be written over then."""
    return {name: stored.read().clone() for name, stored in read_pickled(shard).items()}


def change(shard: Path, **changes: Tensor | None) -> None:
    """Replace tensors, or leave them out; names have "__" for "."."""
    tensors: dict[str, Tensor | None] = saved(shard)
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    torch.save({name: it for name, it in tensors.items() if it is not None}, shard)


def logits(path: Path) -> Tensor:
    return llamachat.load(path, dtype="float32", threads=1).logits(IDS)


def refusal(folder: Path) -> str:
    with pytest.raises(DamagedFileError) as caught:
        list(open_checkpoint(folder).tensors())
    message = caught.value.message
    assert message.startswith(str(folder))
    assert message.isprintable()
    return message.removeprefix(str(folder))


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_shards_give_the_logits_of_the_same_safetensors(
    n: int, embedding_axis: int, folder: Path, tmp_path: Path
) -> None:
    """Four shards for two key/value heads hold each head twice."""
    meta = write_meta(folder, tmp_path / "m", n, embedding_axis=embedding_axis)
    assert torch.equal(logits(meta), logits(folder))


def test_vocabularies_are_cut_unevenly(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_llama(vocab_size=273)
    meta = write_meta(folder, tmp_path / "m", 2, vocab_size=-1)
    assert torch.equal(logits(meta), logits(folder))


def test_llama3_scaling_gives_the_logits_of_the_same_safetensors(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    scaling = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    folder = tiny_llama(rope_parameters=scaling)
    meta = write_meta(folder, tmp_path / "m", rope_theta=500000.0, use_scaled_rope=True)
    assert torch.equal(logits(meta), logits(folder))


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_head_that_is_the_embedding_is_not_read_twice(
    is_stored: bool, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_llama(tie_word_embeddings=True)
    meta = write_meta(folder, tmp_path / "m")
    if is_stored:
        tensors = saved(meta / "consolidated.00.pth")
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
        torch.save(tensors, meta / "consolidated.00.pth")
    assert open_checkpoint(meta).config.tied
    assert torch.equal(logits(meta), logits(folder))


def test_the_quirks_of_params_give_one_config(folder: Path, tmp_path: Path) -> None:
    plain = write_meta(folder, tmp_path / "plain")
    quirks = write_meta(folder, tmp_path / "quirks", vocab_size=-1, max_batch_size=4)
    params = json.loads((quirks / "params.json").read_text("utf-8"))
    write_params(quirks, {"model": params})
    assert open_checkpoint(quirks).config == open_checkpoint(plain).config


def test_the_tokenizer_may_be_one_level_above(folder: Path, data: Path, tmp_path: Path) -> None:
    meta = write_meta(folder, tmp_path / "7B")
    (meta / "tokenizer.json").unlink()
    model = data / "tokenizers/llama2/tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    checkpoint = open_checkpoint(meta)
    assert checkpoint.tokenizer().encode("Hello world") == [15043, 3186]
    assert tmp_path / "tokenizer.model" in checkpoint.files


def test_a_folder_with_ranks_gives_the_ids_and_logits_of_hugging_faces(
    data: Path, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Llama 3.1 as Meta keeps it and as Hugging Face does, in small: tokenizer and weights."""
    scaling = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    shape = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    }
    folder = tiny_llama(**shape, rope_parameters=scaling, bos_token_id=128000, eos_token_id=128009)
    params = {"n_layers": 1, "vocab_size": 128256, "rope_theta": 5e5, "use_scaled_rope": True}
    meta = write_meta(folder, tmp_path / "m", 2, embedding_axis=0, **params)
    llama3 = data / "tokenizers/llama3"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((llama3 / name).read_bytes())
    (meta / "tokenizer.json").unlink()
    (meta / "tokenizer.model").write_bytes((llama3 / "tokenizer.model").read_bytes())
    ours, theirs = (llamachat.load(it, dtype="float32", threads=1) for it in (meta, folder))
    text = "Grüße, 12345 Llamas!\n\n\tdef f(x): return x**2  # 你好 🦙"
    ids = [ours.tokenizer.bos_id or 0, *ours.tokenizer.encode(text)]
    assert ids == [theirs.tokenizer.bos_id, *theirs.tokenizer.encode(text)]
    assert ours.tokenizer.vocab_size == theirs.tokenizer.vocab_size == 128256
    assert ours.tokenizer.specials["<|eot_id|>"] in ours.tokenizer.stop_ids
    assert torch.equal(ours.logits(ids), theirs.logits(ids))


def test_what_is_made_of_a_folder_is_the_same_model_without_shards(
    folder: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(write_meta(folder, tmp_path / "m", 2))
    made_from = {"name": "m", "path": "m", "form": "F32", "size_bytes": 1}
    recipe = {"name": "int4", "group_size": 32, "nested": False, "key": "int4-g32-v1"}
    with QuantizedWriter(tmp_path / "made", source, {"recipe": "int4-g32-v1"}) as writer:
        for name, weight in source.tensors():
            writer.append(name, weight, None)
        writer.finish(recipe, made_from)
    made = open_checkpoint(tmp_path / "made")
    assert made.config == source.config
    names = {file.name for file in (tmp_path / "made").iterdir()}
    assert names == {"model.safetensors", "params.json", "tokenizer.json"}


def test_shards_are_what_takes_the_room(folder: Path, tmp_path: Path) -> None:
    meta = write_meta(folder, tmp_path / "m", 2)
    names = [file.name for file in weight_files(open_checkpoint(meta))]
    assert names == ["consolidated.00.pth", "consolidated.01.pth"]


def test_a_folder_with_both_configs_is_read_as_hugging_faces(folder: Path, tmp_path: Path) -> None:
    meta = write_meta(folder, tmp_path / "m")
    for name in ("config.json", "model.safetensors"):
        (meta / name).write_bytes((folder / name).read_bytes())
    assert open_checkpoint(meta).config.max_seq_len == 1024


def test_a_shard_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    meta = write_meta(folder, tmp_path / "m", 4)
    (meta / "consolidated.01.pth").unlink()
    assert refusal(meta).endswith("consolidated.01.pth: no such file, expected weights")


def test_too_few_shards_are_refused_with_both_shapes(folder: Path, tmp_path: Path) -> None:
    meta = write_meta(folder, tmp_path / "m", 2)
    (meta / "consolidated.01.pth").unlink()
    assert "the config says" in refusal(meta)


def test_heads_that_should_be_copies_but_differ_are_refused(folder: Path, tmp_path: Path) -> None:
    meta = write_meta(folder, tmp_path / "m", 4)
    change(meta / "consolidated.03.pth", layers__1__attention__wv__weight=torch.zeros(16, 64))
    message = "layers.1.attention.wv.weight is no copy of its neighbour's"
    assert message in refusal(meta)
    assert "consolidated.03.pth" in refusal(meta)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, "norm.weight is not in all shards"),
        (torch.zeros(63), "norm.weight: (63,) in consolidated.01.pth, (64,) in the first"),
        (torch.zeros(64, dtype=torch.int8), "norm.weight: type I8, expected F32, F16, BF16"),
    ],
)
def test_shards_that_do_not_fit_each_other_are_refused(
    tensor: Tensor | None, message: str, folder: Path, tmp_path: Path
) -> None:
    meta = write_meta(folder, tmp_path / "m", 2)
    change(meta / "consolidated.01.pth", norm__weight=tensor)
    assert message in refusal(meta)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dim": ...}, "dim is missing, expected a whole number"),
        ({"moe_args": {"experts": 8}}, "'moe_args' is {'experts': 8}, expected none"),
        ({"multiple_of": 0}, "multiple_of is 0, expected a whole number"),
        ({"model": 3}, "model is 3, expected an object"),
    ],
)
def test_params_that_cannot_be_run_are_refused(
    params: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    meta = write_meta(folder, tmp_path / "m", **params)
    assert Path(refusal(meta)).name.startswith(f"params.json: {message}")
