"""One model, written in every form that there is, gives one answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf_files import Array, write_gguf
from safetensors.torch import load_file, save_file
from test_checkpoints_meta import write_meta
from test_checkpoints_pickled import as_pickles
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import llamachat
from llamachat.kernels.backends import choose
from llamachat.library.store import require
from llamachat.measure.quantizing import Wanted, quantize

IDS = [(7 * i * i + 31 * i + 5) % 256 for i in range(40)]
FORMS = ("shards", "bin", "bin shards", "meta 1", "meta 2", "meta 4", "gguf")
TYPES = {"float16": Type.F16, "bfloat16": Type.BF16}


@pytest.fixture(scope="module")
def folder_of(
    tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    made: dict[tuple[bool, str], Path] = {}

    def folder(*, tied: bool = False, dtype: str = "float32") -> Path:
        """Four query heads share two of keys and values; matrices are rounded to `dtype`."""
        if (tied, dtype) not in made:
            if dtype == "float32":
                made[tied, dtype] = tiny_llama(tie_word_embeddings=tied)
            else:
                rounded = tmp_path_factory.mktemp(dtype)
                made[tied, dtype] = copied(folder(tied=tied), rounded, dtype)
        return made[tied, dtype]

    return folder


def copied(source: Path, target: Path, dtype: str, shards: int = 1) -> Path:
    """The folder's files, its tensors as `dtype` in so many shards."""
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    tensors = {
        name: it.to(getattr(torch, dtype))
        for name, it in load_file(source / "model.safetensors").items()
    }
    if shards == 1:
        save_file(tensors, target / "model.safetensors")
        return target
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    for shard in names:
        save_file({k: v for k, v in tensors.items() if weight_map[k] == shard}, target / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return target


def written(form: str, source: Path, tmp_path: Path, dtype: str = "float32") -> Path:
    kind, _, number = form.partition(" ")
    if kind == "shards":
        return copied(source, tmp_path, dtype, shards=3)
    if kind == "bin":
        return as_pickles(source, tmp_path / "pickled", shards=3 if number else 1)
    if kind == "meta":
        return write_meta(source, tmp_path / "meta", int(number))
    return write_gguf(source, tmp_path / "model.gguf", TYPES.get(dtype, Type.F32))


def logits(path: Path, **settings: Any) -> Tensor:
    return llamachat.load(path, threads=1, **({"dtype": "float32"} | settings)).logits(IDS)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_changes_no_bit_of_the_answer(
    form: str, tied: bool, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    source = folder_of(tied=tied)
    assert torch.equal(logits(written(form, source, tmp_path)), logits(source))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("form", ["shards", "bin", "meta 2", "gguf"])
def test_nor_do_the_forms_of_16_bits(
    form: str, dtype: str, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    source = folder_of(dtype=dtype)
    answer = logits(source)
    assert torch.equal(logits(written(form, source, tmp_path, dtype)), answer)
    assert 0 < relative_error(answer, logits(folder_of())) < 0.1


@pytest.mark.skipif(choose().name != "native", reason="no native kernels")
@pytest.mark.parametrize("form", ["bin", "meta 2", "gguf"])
def test_what_is_quantized_from_a_form_answers_alike(
    form: str, folder_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path / "cache"))
    expected = logits(folder_of(), quantize="int8", dtype="auto")
    source = written(form, folder_of(), tmp_path)
    assert torch.equal(logits(quantized(source, tmp_path), dtype="auto"), expected)


def quantized(source: Path, tmp_path: Path) -> Path:
    return quantize(
        require(str(source)), Wanted("int8"), name="tiny", folder=tmp_path / "int8", threads=1,
        notice=lambda _: None, progress=lambda *_: None,
    )  # fmt: skip


# What GGUF says in words of its own.


def test_biases_of_a_gguf_are_turned_as_their_weights(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_llama(attention_bias=True)
    assert torch.equal(logits(write_gguf(source, tmp_path / "b.gguf")), logits(source))


def test_a_gguf_with_biases_of_queries_keys_and_values_alone_has_none_for_outputs(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_llama(attention_bias=True)
    tensors = load_file(source / "model.safetensors")
    zeroed = {n: it.zero_() if n.endswith("o_proj.bias") else it for n, it in tensors.items()}
    save_file(zeroed, source / "model.safetensors")
    expected = logits(source)
    save_file(
        {n: it for n, it in zeroed.items() if not n.endswith("o_proj.bias")},
        source / "model.safetensors",
    )
    assert torch.equal(logits(write_gguf(source, tmp_path / "b.gguf")), expected)


@pytest.mark.skipif(choose().name != "native", reason="no native kernels")
def test_what_is_quantized_from_a_gguf_keeps_its_biases(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path / "cache"))
    source = tiny_llama(attention_bias=True)
    made = quantized(write_gguf(source, tmp_path / "b.gguf"), tmp_path)
    expected = logits(source, quantize="int8", dtype="auto")
    assert torch.equal(logits(made, dtype="auto"), expected)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


def add_linear(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)
    writer.add_bool("llama.rope.scaling.finetuned", val=True)


def add_linear_as_in_2023(writer: GGUFWriter) -> None:
    writer.add_float32("llama.rope.scale_linear", 4.0)


def add_yarn(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(8.0)
    writer.add_rope_scaling_orig_ctx_len(32)


def add_yarn_with_all_keys(writer: GGUFWriter) -> None:
    add_yarn(writer)
    writer.add_rope_scaling_attn_factors(0.75)
    writer.add_float32("llama.rope.scaling.yarn_beta_fast", 20.0)
    writer.add_float32("llama.rope.scaling.yarn_beta_slow", 3.0)


SCALINGS: dict[str, tuple[dict[str, Any], Callable[[GGUFWriter], None]]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, add_linear),
    "linear as in 2023": ({"rope_type": "linear", "factor": 4.0}, add_linear_as_in_2023),
    "yarn": (
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        add_yarn,
    ),
    "yarn with all keys": (
        {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32,
            "attention_factor": 0.75 * 1.2079441541679836, "beta_fast": 20.0, "beta_slow": 3.0,
        },
        add_yarn_with_all_keys,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_keys_of_rope_scaling_say_what_a_config_says(
    name: str, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    rope, change = SCALINGS[name]
    source = tiny_llama(rope_parameters=rope | {"rope_theta": 1e4})
    file = write_gguf(source, tmp_path / "scaled.gguf", change=change)
    plain = write_gguf(source, tmp_path / "plain.gguf")
    expected = logits(source)
    assert relative_error(logits(file), expected) < 1e-6
    assert relative_error(logits(plain), expected) > 1e-2


def test_divisors_of_frequencies_say_what_a_config_of_llama3_says(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """`Llama3` of convert_hf_to_gguf.py writes what frequencies are divided by, in float32."""
    source = tiny_llama(rope_parameters=LLAMA3)
    config = LlamaConfig.from_pretrained(source)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    plain = 5e5 ** -(torch.arange(0, 16, 2).double() / 16)
    divisors: Array = (plain / scaled.double()).float().numpy()
    assert divisors.min() == pytest.approx(1)
    assert divisors.max() == pytest.approx(8)
    more = {"rope_freqs.weight": np.ascontiguousarray(divisors)}
    file = write_gguf(source, tmp_path / "llama3.gguf", more=more)
    assert relative_error(logits(file), logits(source)) < 1e-6


def test_dynamic_scaling_is_that_of_the_context_which_a_model_is_loaded_with(
    tiny_llama: Callable[..., Path],
) -> None:
    """From the first token on: theta is 1e4 (2 * 2048 / 1024 - 1)^(16 / 14)."""
    dynamic = tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    theta = 1e4 * 3 ** (16 / 14)
    raised = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": theta})
    assert torch.equal(logits(dynamic, ctx_size=2048), logits(raised))
    assert torch.equal(logits(dynamic, ctx_size=1024), logits(tiny_llama()))
