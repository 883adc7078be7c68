"""Every form with every damage: exit 9, and one line with the tensor, what is there, what not."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chatglm_6b
import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from test_checkpoints_meta import saved, write_meta
from test_checkpoints_pickled import as_pickles
from test_loading_same_model import quantized
from torch import Tensor

import llamachat
from llamachat.checkpoints import Checkpoint, open_checkpoint
from llamachat.checkpoints.delta import DeltaCheckpoint
from llamachat.checkpoints.lora import AdaptedCheckpoint, Adapter
from llamachat.errors import DamagedFileError, LlamachatError

Tensors = dict[str, Tensor]
WEIGHTS = "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Q = "model.layers.0.self_attn.q_proj"
SURPLUS = "model.layers.0.self_attn.surplus.weight"


def store(path: Path, tensors: Tensors) -> None:
    path.write_bytes(save({name: it.contiguous() for name, it in tensors.items()}))


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def write_shards(source: Path, target: Path) -> Path:
    copied(source, target)
    tensors = load_file(target / WEIGHTS)
    (target / WEIGHTS).unlink()
    weight_map = {name: SHARDS[name.startswith(Q)] for name in tensors}
    for shard in SHARDS:
        store(target / shard, {k: v for k, v in tensors.items() if weight_map[k] == shard})
    index = target / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    return target


def store_shard(path: Path, tensors: Tensors) -> None:
    """The index names what is there."""
    index = path.parent / f"{WEIGHTS}.index.json"
    weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
    others = {name: shard for name, shard in weight_map.items() if shard != path.name}
    weight_map = others | dict.fromkeys(tensors, path.name)
    index.write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    store(path, tensors)


def write_bitsandbytes(source: Path, target: Path) -> Path:
    """One weight of 8 bits, as transformers saves it."""
    copied(source, target)
    tensors = load_file(target / WEIGHTS)
    weight = tensors[f"{Q}.weight"]
    largest = weight.abs().amax(1)
    tensors[f"{Q}.weight"] = (weight * 127 / largest.unsqueeze(1)).round().to(torch.int8)
    tensors[f"{Q}.SCB"] = largest
    tensors[f"{Q}.weight_format"] = torch.zeros((), dtype=torch.uint8)
    store(target / WEIGHTS, tensors)
    config = json.loads((target / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    return target


def write_mllama(source: Path, target: Path) -> Path:
    """Llama 3.2 Vision, whose second layer of three looks at images."""
    copied(source, target)
    tensors = load_file(target / WEIGHTS)
    prefix = "language_model."
    renamed = {
        f"{prefix}{name.replace('layers.1.', 'layers.2.')}": it for name, it in tensors.items()
    }
    renamed[f"{prefix}model.layers.1.cross_attn.q_proj.weight"] = torch.zeros(64, 64)
    renamed["vision_model.class_embedding"] = torch.zeros(16)
    store(target / WEIGHTS, renamed)
    text = json.loads((target / "config.json").read_text("utf-8"))
    text |= {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    config = {"model_type": "mllama", "text_config": text}
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    return target


def write_chatglm_6b(_: Path, target: Path) -> Path:
    return chatglm_6b.write_folder(target, chatglm_6b.random_tensors())


def write_adapter(_: Path, target: Path) -> Path:
    target.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    (target / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    generator = torch.Generator().manual_seed(0)
    sides = {
        f"base_model.model.{Q}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for side, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    store(target / "adapter_model.safetensors", sides)
    return target


def write_quantized(source: Path, target: Path) -> Path:
    target.mkdir()
    return quantized(source, target)


def store_sealed(path: Path, tensors: Tensors) -> None:
    """As somebody would who wants to be believed: every sha256 agrees."""
    content = path.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    facts = json.loads(metadata["weights"])
    for weight in facts:
        parts = [weight, *(f"{weight}.{part}" for part in ("codes", "scales", "mins", "codebook"))]
        raw = b"".join(bytes_of(tensors[part]) for part in parts if part in tensors)
        facts[weight]["sha256"] = hashlib.sha256(raw).hexdigest()
    header: dict[str, Any] = {"__metadata__": metadata | {"weights": json.dumps(facts)}}
    values, at = b"", 0
    for name, tensor in tensors.items() - {"sha256": 0}.items():
        if name == "sha256":
            continue
        raw = bytes_of(tensor)
        kind = str(save({"x": tensor})).partition('"dtype":"')[2].partition('"')[0]
        header[name] = {
            "dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, at + len(raw)],
        }  # fmt: skip
        values, at = values + raw, at + len(raw)
    header["sha256"] = {"dtype": "U8", "shape": [32], "data_offsets": [at, at + 32]}
    text = json.dumps(header, separators=(",", ":")).encode()
    begin = len(text).to_bytes(8, "little") + text
    path.write_bytes(begin + values + hashlib.sha256(begin).digest())


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def store_gguf(path: Path, tensors: Tensors) -> None:
    """Over the file's own metadata."""
    folder = path.parent / "source"
    write_gguf(folder, path, only={name: it.numpy() for name, it in tensors.items()})


def write_file(source: Path, target: Path) -> Path:
    target.mkdir()
    copied(source, target / "source")
    return write_gguf(source, target / "model.gguf")


def load_gguf(path: Path) -> Tensors:
    import gguf

    return {
        str(it.name): torch.from_numpy(np.array(it.data)) for it in gguf.GGUFReader(path).tensors
    }


@dataclass(frozen=True)
class Form:
    """How a sound model is written and its file of tensors replaced, and what is damaged in it.

    Attributes:
        write: from a sound folder, to a folder that it makes: the model that was made.
        file: the file of tensors in the model's folder; "" if the model is one file.
        target: the tensor that is damaged.
        surplus: one that nobody asks for.
    """

    write: Callable[[Path, Path], Path]
    file: str = WEIGHTS
    target: str = f"{Q}.weight"
    surplus: str = SURPLUS
    store: Callable[[Path, Tensors], None] = store
    load: Callable[[Path], Tensors] = load_file

    @property
    def weight(self) -> str:
        """What messages call the weight that the target is, or is a part of."""
        name = self.target.removesuffix(".lora_B.weight").removesuffix(".scales")
        return name.rpartition("model.model.")[2]


FORMS = {
    "safetensors": Form(copied),
    "shards": Form(write_shards, SHARDS[1], store=store_shard),
    "bin": Form(
        as_pickles, "pytorch_model.bin",
        store=lambda path, it: torch.save(it, path), load=saved,
    ),
    "meta": Form(
        write_meta, "consolidated.00.pth", "layers.0.attention.wq.weight",
        "layers.0.surplus.weight",
        store=lambda path, it: torch.save(it, path), load=saved,
    ),
    "gguf": Form(
        write_file, "", "blk.0.attn_q.weight", "blk.0.surplus.weight", store_gguf, load_gguf
    ),
    "bitsandbytes": Form(write_bitsandbytes, target=f"{Q}.SCB"),
    "quantized, a vector": Form(
        write_quantized, target="model.layers.0.input_layernorm.weight", store=store_sealed
    ),
    "quantized, a scale": Form(write_quantized, target=f"{Q}.weight.scales", store=store_sealed),
    "mllama": Form(
        write_mllama, target=f"language_model.{Q}.weight", surplus=f"language_model.{SURPLUS}"
    ),
    "chatglm-6b": Form(
        write_chatglm_6b,
        target="transformer.layers.0.attention.dense.weight",
        surplus="transformer.layers.0.attention.surplus.weight",
    ),
    "adapter": Form(
        write_adapter, "adapter_model.safetensors", f"base_model.model.{Q}.lora_B.weight",
        f"base_model.model.{SURPLUS}",
    ),
    "delta": Form(copied),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture
def made(form: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path / "cache"))
    return FORMS[form].write(sound, tmp_path / "made")


def opened(form: str, made: Path, sound: Path) -> Checkpoint:
    if form == "adapter":
        return AdaptedCheckpoint(open_checkpoint(sound), Adapter(made))
    return (
        DeltaCheckpoint(open_checkpoint(sound), made) if form == "delta" else open_checkpoint(made)
    )


def read(form: str, made: Path, sound: Path) -> None:
    checkpoint = opened(form, made, sound)
    _ = checkpoint.config, checkpoint.files, checkpoint.form, checkpoint.chat_template
    checkpoint.tokenizer()
    assert sum(1 for _ in checkpoint.tensors())


def refusal(form: str, made: Path, sound: Path) -> str:
    with pytest.raises(DamagedFileError) as caught:
        read(form, made, sound)
    assert caught.value.exit_code == 9
    assert caught.value.message.startswith(str(made))
    assert caught.value.message.isprintable()
    return caught.value.message.removeprefix(str(made))


def damage(form: str, made: Path, change: Callable[[Tensors, str], None]) -> None:
    it = FORMS[form]
    file = made / it.file if it.file else made
    tensors = it.load(file)
    change(tensors, it.target)
    it.store(file, tensors)


EVERY_FORM = pytest.mark.parametrize("form", FORMS)


@EVERY_FORM
def test_a_form_is_read_as_it_was_written_again(form: str, made: Path, sound: Path) -> None:
    """Else what follows would say nothing."""
    damage(form, made, lambda *_: None)
    read(form, made, sound)


@EVERY_FORM
def test_a_missing_tensor_is_named(form: str, made: Path, sound: Path) -> None:
    damage(form, made, lambda tensors, target: tensors.pop(target))
    message = refusal(form, made, sound)
    if form == "adapter":
        assert f"{Q}.lora_A.weight is alone, expected lora_A and lora_B" in message
    else:
        assert f"{FORMS[form].weight} is missing" in message


@EVERY_FORM
def test_a_tensor_that_nobody_asks_for_is_named(form: str, made: Path, sound: Path) -> None:
    surplus = FORMS[form].surplus
    damage(form, made, lambda tensors, _: tensors.update({surplus: torch.zeros(64, 64)}))
    message = refusal(form, made, sound)
    assert surplus in message or "surplus" in message


@EVERY_FORM
def test_a_tensor_of_another_shape_is_named_with_both(form: str, made: Path, sound: Path) -> None:
    def change(tensors: Tensors, target: str) -> None:
        tensors[target] = tensors[target][:-1]

    damage(form, made, change)
    message = refusal(form, made, sound)
    assert FORMS[form].weight in message
    assert "63" in message
    assert "64" in message


@EVERY_FORM
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named(
    value: float, form: str, made: Path, sound: Path
) -> None:
    def change(tensors: Tensors, target: str) -> None:
        tensors[target].view(-1)[-3] = value

    damage(form, made, change)
    message = refusal(form, made, sound)
    assert Q in message or FORMS[form].weight in message
    assert f"{value:g}" in message or form == "adapter"
    assert "finite" in message


@EVERY_FORM
def test_a_tensor_of_another_type_is_named_with_both(form: str, made: Path, sound: Path) -> None:
    def change(tensors: Tensors, target: str) -> None:
        tensors[target] = tensors[target].to(torch.int32)

    damage(form, made, change)
    message = refusal(form, made, sound)
    assert FORMS[form].weight in message
    assert "I32" in message or "type 26" in message
    assert "expected" in message


@EVERY_FORM
def test_a_file_that_was_cut_is_named(form: str, made: Path, sound: Path) -> None:
    file = made / FORMS[form].file if FORMS[form].file else made
    content = file.read_bytes()
    for length in (0, 1, 9, len(content) // 3, len(content) - 1):
        file.write_bytes(content[:length])
        assert refusal(form, made, sound).startswith((f"/{file.name}: ", ": "))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4))
@EVERY_FORM
def test_flipped_bits_are_refused_or_harmless(
    flips: list[tuple[float, int]], form: str, made: Path, sound: Path
) -> None:
    """Half of them among the first 2,000 bytes, where headers are."""
    file = made / FORMS[form].file if FORMS[form].file else made
    content = file.read_bytes()
    flipped = bytearray(content)
    for place, bits in flips:
        span = min(2000, len(content)) if bits % 2 else len(content)
        flipped[int(place * (span - 1))] ^= bits
    file.write_bytes(flipped)
    message = str(made)
    try:
        read(form, made, sound)
    except LlamachatError as error:
        message = error.message
    finally:
        file.write_bytes(content)
    assert message.isprintable()
    assert str(made) in message


@pytest.mark.parametrize("form", ["safetensors", "shards", "mllama", "adapter", "delta"])
def test_of_two_tensors_with_one_name_neither_is_taken(form: str, made: Path, sound: Path) -> None:
    """The library takes the last one, if both lie at the same place."""
    file = made / FORMS[form].file
    content = file.read_bytes()
    n_bytes = int.from_bytes(content[:8], "little")
    header, target = content[8 : 8 + n_bytes].strip(), FORMS[form].target
    twin = json.dumps({target: json.loads(header)[target]}).encode()
    header = header[:-1] + b"," + twin[1:]
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + n_bytes :])
    assert f"{target} is there twice, expected once" in refusal(form, made, sound)


@pytest.mark.parametrize("form", ["shards"])
def test_an_index_that_names_a_tensor_twice_is_refused(form: str, made: Path, sound: Path) -> None:
    index = made / f"{WEIGHTS}.index.json"
    text = index.read_text("utf-8")
    index.write_text(
        text.replace("{", f'{{"{Q}.weight": "", ', 2).replace(f'"{Q}.weight": "", ', "", 1)
    )
    assert f"{index.name}: {Q}.weight is there twice" in refusal(form, made, sound)


def test_a_damaged_model_is_refused_where_it_is_loaded(sound: Path, tmp_path: Path) -> None:
    made = copied(sound, tmp_path / "made")
    damage("safetensors", made, lambda tensors, target: tensors[target].fill_(math.nan))
    for quantize in ("auto", "none"):
        with pytest.raises(
            DamagedFileError, match=r"q_proj\.weight: values from nan to nan, expec"
        ):
            llamachat.load(made, threads=1, quantize=quantize)
