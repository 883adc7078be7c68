"""Quantized folders: what is read is what was written, and nothing else is ever read."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from quantized import FORMS, random_qtensor
from safetensors import safe_open
from torch import Tensor

from llamachat import hardware
from llamachat.checkpoints import Checkpoint, open_checkpoint
from llamachat.checkpoints.names import iter_weights
from llamachat.checkpoints.quantized import QuantizedCheckpoint, is_quantized
from llamachat.checkpoints.quantized_layout import PARTS
from llamachat.checkpoints.quantized_writer import JOURNAL, QuantizedWriter, partial_of
from llamachat.errors import DamagedFileError, LlamachatError, UsageError
from llamachat.quant.tensor import QTensor

Weights = dict[str, "Tensor | QTensor"]
RECIPE = {"name": "int4", "group_size": 32, "nested": False, "key": "int4-g32-v1"}
SOURCE = {"name": "tiny", "path": "/models/tiny", "form": "F32", "size_bytes": 1000}
JOB = {"recipe": "int4-g32-v1", "source": SOURCE}


@pytest.fixture(scope="module")
def source(tiny_llama: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(tiny_llama(num_hidden_layers=1, vocab_size=259, rms_norm_eps=3e-6))


@pytest.fixture(scope="module")
def weights(source: Checkpoint) -> Weights:
    """Every form takes its turn, floats of every type among them."""
    kinds: list[str | torch.dtype] = [*FORMS, torch.float32, torch.float16, torch.bfloat16]
    weights: Weights = {}
    for i, weight in enumerate(iter_weights(source.config)):
        kind = kinds[i % len(kinds)] if len(weight.shape) == 2 else torch.bfloat16
        if isinstance(kind, str):
            out, columns = weight.shape
            scales = torch.float16 if i % 2 else torch.float32
            made = random_qtensor(kind, (out, columns), 32, seed=i, dtype=scales)
            book = None if made.codebook is None else made.codebook.float()
            weights[weight.hf] = replace(made, codebook=book)
        else:
            weights[weight.hf] = torch.randn(weight.shape).to(kind)
    return weights


@pytest.fixture(scope="module")
def written(source: Checkpoint, weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder; not to be changed."""
    return write(tmp_path_factory.mktemp("written") / "tiny-int4", source, weights)


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    """A whole folder, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "tiny-int4"))


def write(folder: Path, source: Checkpoint, weights: Weights) -> Path:
    with QuantizedWriter(folder, source, JOB) as writer:
        append(writer, weights)
        writer.finish(RECIPE, SOURCE)
    return folder


def append(writer: QuantizedWriter, weights: Weights) -> None:
    for name, weight in weights.items():
        if name not in writer.done:
            writer.append(name, weight, 0.07 if isinstance(weight, QTensor) else None)


def same(one: Tensor | QTensor, other: Tensor | QTensor) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        floats = isinstance(one, Tensor) and isinstance(other, Tensor)
        return floats and one.dtype == other.dtype and torch.equal(one, other)
    parts = [(getattr(one, it), getattr(other, it)) for it in PARTS[1:]]
    optional = all(a is b if a is None or b is None else same(a, b) for a, b in parts)
    sizes = (one.bits, one.group_size) == (other.bits, other.group_size)
    return optional and sizes and same(one.codes, other.codes)


def read(folder: Path) -> Weights:
    return dict(open_checkpoint(folder).tensors())


@pytest.mark.parametrize("cores", [1, 64])
def test_weights_come_back_bit_by_bit_in_order(
    written: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(hardware, "usable_cores", lambda: cores)
    found = read(written)
    assert list(found) == list(weights)
    assert all(same(found[name], weight) for name, weight in weights.items())


def test_the_library_reads_the_file_as_any_other(written: Path, weights: Weights) -> None:
    with safe_open(written / "model.safetensors", framework="pt") as file:
        for name, weight in weights.items():
            if isinstance(weight, Tensor):
                assert torch.equal(file.get_tensor(name), weight)
            else:
                assert torch.equal(file.get_tensor(f"{name}.codes"), weight.codes)
        assert json.loads(file.metadata()["recipe"]) == RECIPE


def test_it_is_the_same_model_as_its_source(written: Path, source: Checkpoint) -> None:
    found = open_checkpoint(written)
    assert found.config == source.config
    assert found.chat_template == source.chat_template
    assert found.generation == source.generation
    text = "<|im_start|>héllo"
    assert found.tokenizer().encode(text) == source.tokenizer().encode(text)
    assert found.tokenizer().stop_ids == source.tokenizer().stop_ids


def test_it_needs_nothing_but_its_folder(written: Path, source: Checkpoint, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(written, moved)
    assert open_checkpoint(moved).config == source.config
    assert all(file.is_relative_to(moved) for file in open_checkpoint(moved).files)


def test_it_says_what_it_is(written: Path, weights: Weights) -> None:
    found = QuantizedCheckpoint(written)
    assert (found.form, found.facts.recipe["key"]) == ("INT4", "int4-g32-v1")
    assert found.metadata["source"] == "tiny"
    quantized = [name for name, weight in weights.items() if isinstance(weight, QTensor)]
    assert found.facts.errors == dict.fromkeys(quantized, 0.07)
    assert found.size_bytes == sum(
        file.stat().st_size for file in written.iterdir() if file.name != "report.svg"
    )
    for stored in found.weights:
        weight = weights[stored.name]
        if isinstance(weight, QTensor):
            parts = (weight.codes, weight.scales, weight.mins, weight.codebook, weight.shifts)
            assert stored.n_bytes == sum(it.nbytes for it in parts if it is not None)
            assert (stored.bits, stored.group_size) == (weight.bits, weight.group_size)


def test_the_same_weights_make_the_same_bytes(
    written: Path, source: Checkpoint, weights: Weights, tmp_path: Path
) -> None:
    again = write(tmp_path / "again", source, weights)
    for file in written.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()
    assert {file.name for file in again.iterdir()} == {file.name for file in written.iterdir()}


def test_a_tied_model_has_no_head(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = open_checkpoint(tiny_llama(tie_word_embeddings=True, num_hidden_layers=1))
    folder = write(tmp_path / "tied", source, dict(source.tensors()))
    assert open_checkpoint(folder).config.tied
    assert "lm_head.weight" not in read(folder)


def test_opening_one_does_not_import_torch(written: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from llamachat.checkpoints import open_checkpoint\n"
        "it = open_checkpoint(Path(sys.argv[1]))\n"
        "it.config, it.form, it.files, it.weights, it.chat_template, it.tokenizer(), it.verify()\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(written)]).returncode == 0


# --- GGUF sources


@pytest.fixture
def gguf_source(tmp_path: Path) -> Checkpoint:
    """A tiny GGUF file with a vocabulary, a template and divisors of frequencies."""
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(letters)
    writer.add_token_scores([0.0] * len(letters))
    writer.add_token_types([2, 3, 3, *[6] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    shapes = {
        "token_embd": (259, 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
        "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,), "blk.0.ffn_gate": (48, 32),
        "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))
    writer.add_tensor("rope_freqs.weight", np.full(8, 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(tmp_path / "tiny.gguf")


def test_of_a_gguf_file_all_but_the_tensors_goes_along(
    gguf_source: Checkpoint, tmp_path: Path
) -> None:
    folder = write(tmp_path / "made", gguf_source, dict(gguf_source.tensors()))
    found = open_checkpoint(folder)
    assert found.config == gguf_source.config
    assert found.chat_template == gguf_source.chat_template
    assert found.tokenizer().encode("hé") == gguf_source.tokenizer().encode("hé")
    assert found.tokenizer().bos_id == gguf_source.tokenizer().bos_id
    header = gguf.GGUFReader(folder / "header.gguf")
    assert header.tensors == []
    assert header.fields.keys() == gguf.GGUFReader(gguf_source.path).fields.keys()


def test_divisors_of_frequencies_are_kept(gguf_source: Checkpoint, tmp_path: Path) -> None:
    folder = write(tmp_path / "made", gguf_source, dict(gguf_source.tensors()))
    divisors = read(folder)["rope_freqs"]
    assert isinstance(divisors, Tensor)
    assert divisors.tolist() == [2] * 8


# --- damage


def places(folder: Path) -> Iterator[tuple[str, int]]:
    """Bytes all over a folder: more of the beginning of each file."""
    for file in sorted(folder.iterdir()):
        n_bytes = file.stat().st_size
        step = max(1, n_bytes // 40)
        chosen = {*range(0, 200, 7), *range(200, n_bytes, step), n_bytes - 1}
        yield from ((file.name, at) for at in sorted(chosen) if at < n_bytes)


def refusal(folder: Path) -> LlamachatError | None:
    try:
        read(folder)
    except LlamachatError as error:
        return error
    return None


def test_no_byte_can_change_unnoticed(copied: Path) -> None:
    unnoticed = []
    for name, at in places(copied):
        file = copied / name
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)
        if refusal(copied) is None:
            unnoticed.append((name, at))
        content[at] ^= 1
        file.write_bytes(content)
    assert unnoticed == []
    read(copied)


@pytest.mark.parametrize("left", [0, 7, 100, 0.5, 0.999])
def test_a_file_that_was_cut_is_refused(copied: Path, left: float) -> None:
    file = copied / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content)) if left < 1 else int(left)])
    with pytest.raises(DamagedFileError, match=r"model\.safetensors"):
        read(copied)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_file_that_is_gone_is_missed(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(DamagedFileError, match=name):
        read(copied)


def test_a_file_that_was_added_is_not_read(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text("{{ 'ignore' }}")
    with pytest.raises(DamagedFileError, match=r"chat_template\.jinja"):
        read(copied)


def test_the_hint_says_how_to_be_rid_of_the_damage(copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(DamagedFileError) as caught:
        read(copied)
    assert "--force" in str(caught.value.hint)


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (f"{EMBEDDING}.codes", {"shape": [32, 259]}, "codes"),
        (f"{EMBEDDING}.codes", {"dtype": "I8"}, "codes"),
        (f"{EMBEDDING}.scales", {"shape": [2, 259]}, "scales"),
        (f"{EMBEDDING}.scales", {"shape": [259 * 2]}, "scales"),
        ("model.norm.weight", {"shape": [8, 8]}, "model.norm.weight"),
        ("model.norm.weight", {"dtype": "I16"}, "model.norm.weight"),
        ("sha256", {"shape": [4, 8]}, "sha256"),
    ],
)
def test_a_tensor_that_is_not_what_the_config_asks_for_is_refused_unread(
    copied: Path, key: str, change: dict[str, Any], message: str
) -> None:
    rewrite(copied, lambda header: header[key].update(change))
    with pytest.raises(DamagedFileError, match=message):
        assert open_checkpoint(copied).config


@pytest.mark.parametrize("key", [f"{EMBEDDING}.codes", "model.norm.weight"])
def test_a_tensor_under_another_name_is_missed(copied: Path, key: str) -> None:
    rewrite(copied, lambda header: header.update({"other": header.pop(key)}))
    with pytest.raises(DamagedFileError, match=key.removesuffix(".codes")):
        assert open_checkpoint(copied).config


def test_a_tensor_that_the_config_does_not_ask_for_is_refused(copied: Path) -> None:
    def add_bias(header: dict[str, Any]) -> None:
        _, end = header["sha256"]["data_offsets"]
        header["q_proj.bias"] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}

    rewrite(copied, add_bias)
    with pytest.raises(DamagedFileError, match=r"q_proj\.bias"):
        assert open_checkpoint(copied).config


@pytest.mark.parametrize("key", ["recipe", "source", "weights", "files", "version"])
@pytest.mark.parametrize("value", ["", "[]", "{}", "2", '{"name": {}}', "[" * 5000, '"\\ud800"'])
def test_metadata_that_make_no_sense_are_refused(copied: Path, key: str, value: str) -> None:
    rewrite(copied, lambda header: header["__metadata__"].update({key: value}))
    with pytest.raises(DamagedFileError, match=str(copied.name)):
        read(copied)


def test_a_weight_with_another_sha256_is_refused_however_the_rest_agrees(copied: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        weights = json.loads(header["__metadata__"]["weights"])
        weights["model.norm.weight"]["sha256"] = "0" * 64
        header["__metadata__"]["weights"] = json.dumps(weights)

    rewrite(copied, change)
    with pytest.raises(DamagedFileError, match=r"model\.norm\.weight"):
        read(copied)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header as somebody would who wants to be believed: its own sha256 agrees."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(end - 8)
    front = len(text).to_bytes(8, "little") + text
    file.write_bytes(front + content[end:-32] + hashlib.sha256(front).digest())


# --- interrupted


def half(weights: Weights) -> Weights:
    return dict(list(weights.items())[: len(weights) // 2])


@pytest.fixture
def interrupted(source: Checkpoint, weights: Weights, tmp_path: Path) -> Path:
    """What a folder will be of which half the weights are written."""
    with QuantizedWriter(tmp_path / "made", source, JOB) as writer:
        append(writer, half(weights))
    return tmp_path / "made"


def test_an_unfinished_folder_is_no_model(interrupted: Path) -> None:
    assert not interrupted.exists()
    assert not is_quantized(partial_of(interrupted))


def test_what_was_written_is_not_written_again(
    interrupted: Path, source: Checkpoint, weights: Weights, written: Path
) -> None:
    with QuantizedWriter(interrupted, source, JOB) as writer:
        assert writer.done == half(weights).keys()
        append(writer, weights)
        writer.finish(RECIPE, SOURCE)
    assert not partial_of(interrupted).exists()
    name = "model.safetensors"
    assert (interrupted / name).read_bytes() == (written / name).read_bytes()


@pytest.mark.parametrize("file", [JOURNAL, "model.safetensors"])
def test_what_follows_the_last_whole_weight_is_dropped(
    interrupted: Path, source: Checkpoint, weights: Weights, written: Path, file: str
) -> None:
    with (partial_of(interrupted) / file).open("ab") as stream:
        stream.write(b'["model.norm.weight", [[' + bytes(99))
    write(interrupted, source, weights)
    name = "model.safetensors"
    assert (interrupted / name).read_bytes() == (written / name).read_bytes()


def test_weights_from_a_damaged_one_on_are_written_again(
    interrupted: Path, source: Checkpoint, weights: Weights, written: Path
) -> None:
    data = partial_of(interrupted) / "model.safetensors"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    with QuantizedWriter(interrupted, source, JOB) as writer:
        assert writer.done == set(list(half(weights))[:-1])
        append(writer, weights)
        writer.finish(RECIPE, SOURCE)
    assert all(same(weight, weights[name]) for name, weight in read(interrupted).items())


def test_another_job_keeps_nothing(interrupted: Path, source: Checkpoint) -> None:
    with QuantizedWriter(interrupted, source, {**JOB, "recipe": "int8-g32-v1"}) as writer:
        assert not writer.done


def test_no_file_of_another_job_goes_along(
    interrupted: Path, source: Checkpoint, weights: Weights
) -> None:
    (partial_of(interrupted) / "generation_config.json").write_text('{"temperature": 9}')
    with QuantizedWriter(interrupted, source, {**JOB, "recipe": "int8-g32-v1"}) as writer:
        append(writer, weights)
        writer.finish(RECIPE, SOURCE)
    assert open_checkpoint(interrupted).generation == source.generation


def test_what_is_replaced_is_gone_and_nothing_else(
    source: Checkpoint, weights: Weights, tmp_path: Path
) -> None:
    beside = [tmp_path / name for name in ("made.old", "made.bak", "replaced")]
    for folder in beside:
        folder.mkdir()
        (folder / "mine").touch()
    write(tmp_path / "made", source, weights)
    write(tmp_path / "made", source, dict(source.tensors()))
    assert all(isinstance(it, Tensor) for it in read(tmp_path / "made").values())
    assert all((folder / "mine").exists() for folder in beside)
    assert sorted(tmp_path.iterdir()) == sorted([*beside, tmp_path / "made"])
    assert not any(path.is_dir() for path in (tmp_path / "made").iterdir())


def test_a_strangers_folder_is_left_alone(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"diary\.txt"):
        QuantizedWriter(tmp_path / "made", source, JOB)
    assert (tmp_path / "made.partial" / "diary.txt").read_text() == "mine"
