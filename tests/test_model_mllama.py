"""Llama 3.2 Vision without images, against transformers: both spellings of names, and Meta's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_chatglm_6b import write_adapter
from torch import Tensor
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaTextConfig,
    MllamaVisionConfig,
    set_seed,
)

import llamachat
from llamachat.checkpoints import open_checkpoint
from llamachat.errors import DamagedFileError, UsageError
from llamachat.library.store import require
from llamachat.loading.merging import merge
from llamachat.measure.quantizing import Wanted, quantize

IDS = [(7 * i * i + 31 * i + 5) % 256 for i in range(40)]
CROSSING = [1, 4]
ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
IMAGES_ARE_NOT_READ = "images are not read: the vision part of the model is left out"


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def theirs() -> MllamaForConditionalGeneration:
    """Two of five layers look at images, with gates open and 8 rows for ids of images."""
    text = MllamaTextConfig(
        vocab_size=272, hidden_size=64, intermediate_size=96, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        initializer_range=0.2, rope_parameters=ROPE, cross_attention_layers=CROSSING,
        bos_token_id=258, eos_token_id=257, pad_token_id=0,
    )  # fmt: skip
    vision = MllamaVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_global_layers=1,
        attention_heads=2, vision_output_dim=32, image_size=28, intermediate_layers_indices=[0],
    )  # fmt: skip
    set_seed(1)
    model = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=272)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(0.5)
    return model.eval()


@pytest.fixture(scope="module")
def expected(theirs: MllamaForConditionalGeneration) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = theirs(torch.tensor([IDS])).logits[0]
    return logits


@pytest.fixture(scope="module")
def folder(
    theirs: MllamaForConditionalGeneration,
    tiny_llama: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """As `save_pretrained` writes it, with the tokenizer of other small folders."""
    folder = tmp_path_factory.mktemp("mllama")
    theirs.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama() / name, folder)
    return folder


def newer(name: str) -> str:
    """The name since transformers 4.52, of one before."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return f"model.language_model.{name.removeprefix('language_model.model.')}"
    return f"model.{name}"


def older(name: str) -> str:
    """The name before transformers 4.52, of one since."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("model.language_model."):
        return f"language_model.model.{name.removeprefix('model.language_model.')}"
    return name.removeprefix("model.")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """By the older names, whichever they are saved by."""
    tensors = load_file(folder / "model.safetensors")
    is_old = any(name.startswith("vision_model.") for name in tensors)
    return {name if is_old else older(name): tensor for name, tensor in tensors.items()}


def copied(folder: Path, to: Path, tensors: dict[str, Tensor], **text: Any) -> Path:
    """The folder with these tensors, and changes of its text config."""
    shutil.copytree(folder, to)
    save_file(tensors, to / "model.safetensors")
    config = json.loads((to / "config.json").read_text("utf-8"))
    config["text_config"] |= text
    (to / "config.json").write_text(json.dumps(config), "utf-8")
    return to


def loaded(folder: Path, **options: Any) -> llamachat.Model:
    return llamachat.load(folder, threads=1, **({"dtype": "float32"} | options))


@pytest.mark.parametrize("spelled", [str, newer], ids=["older names", "newer names"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_logits_equal_those_of_transformers_without_an_image(
    folder: Path,
    expected: Tensor,
    tmp_path: Path,
    spelled: Callable[[str], str],
    backend: str,
) -> None:
    tensors = {spelled(name): tensor for name, tensor in tensors_of(folder).items()}
    model = loaded(copied(folder, tmp_path / "m", tensors), backend=backend)
    assert relative_error(model.logits(IDS), expected) < 1e-5


def test_what_transformers_saves_is_read(folder: Path, expected: Tensor) -> None:
    assert relative_error(loaded(folder).logits(IDS), expected) < 1e-5


def test_that_images_are_not_read_is_said_once(folder: Path) -> None:
    said: list[str] = []
    loaded(folder, notice=said.append)
    assert said == [f"{folder}: {IMAGES_ARE_NOT_READ}"]


def test_of_other_models_nothing_is_said(tiny_llama: Callable[..., Path]) -> None:
    assert open_checkpoint(tiny_llama()).left_out is None


def test_a_quantized_folder_is_the_same_model(
    folder: Path, expected: Tensor, tmp_path: Path
) -> None:
    made = quantize(
        require(str(folder)),
        Wanted("int8"),
        name="m",
        folder=tmp_path / "q",
        threads=1,
        notice=lambda _: None,
        progress=lambda *_: None,
    )
    assert relative_error(loaded(made, quantize="none").logits(IDS), expected) < 0.1
    assert open_checkpoint(made).left_out == IMAGES_ARE_NOT_READ


def test_ids_of_images_are_no_ids_of_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path / "m", tensors_of(folder))
    tokenizer = json.loads((copy / "tokenizer.json").read_text("utf-8"))
    special = tokenizer["added_tokens"][0]
    texts = {**{i: f"<|reserved_{i}|>" for i in range(259, 272)}, 272: "<|image|>"}
    tokenizer["added_tokens"] += [special | {"id": i, "content": it} for i, it in texts.items()]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    found = open_checkpoint(copy).tokenizer()
    assert found.vocab_size == 272
    assert "<|image|>" not in found.specials
    assert found.decode(found.encode("<|image|>")) == "<|image|>"


def test_ids_that_stop_are_those_of_the_text_config(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path / "m", tensors_of(folder), eos_token_id=[65, 66])
    assert open_checkpoint(copy).tokenizer().stop_ids >= {65, 66}


def test_a_text_config_that_says_little_means_llama_3_2_vision(
    folder: Path, tmp_path: Path
) -> None:
    copy = copied(folder, tmp_path / "m", tensors_of(folder))
    sizes = {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 40, "num_attention_heads": 32,
    }  # fmt: skip
    config = {"model_type": "mllama", "text_config": sizes}
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(DamagedFileError, match=r"the config says 128256 x 4096"):
        open_checkpoint(copy).config  # noqa: B018
    theirs = MllamaTextConfig()
    from llamachat.architecture import config_from_hf

    ours = config_from_hf(config)
    assert ours.n_layers == theirs.num_hidden_layers - len(theirs.cross_attention_layers) == 32
    assert ours.n_kv_heads == theirs.num_key_value_heads
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.default_theta
    assert ours.max_seq_len == theirs.max_position_embeddings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"cross_attention_layers": "all"}, "cross_attention_layers is 'all', expected numbers"),
        ({"cross_attention_layers": [1, "4"]}, "expected numbers"),
        ({"cross_attention_layers": [1, 5]}, "has 5, num_hidden_layers is 5"),
        ({"cross_attention_layers": [-1]}, "has -1, num_hidden_layers is 5"),
        ({"cross_attention_layers": [0, 1, 2, 3, 4]}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 2_000_000_000}, "num_hidden_layers is 2000000000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"cross_attention_layers": [1]}, "model.layers.3.self_attn.q_proj.weight is missing"),
        ({"vocab_size": 271}, "model.embed_tokens.weight: 280 x 64, the config says 271 x 64"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_tensors_is_refused(
    folder: Path, tmp_path: Path, text: dict[str, Any], message: str
) -> None:
    copy = copied(folder, tmp_path / "m", tensors_of(folder), **text)
    with pytest.raises(DamagedFileError) as caught:
        open_checkpoint(copy).config  # noqa: B018
    assert message in caught.value.message
    assert str(copy) in caught.value.message


@pytest.mark.parametrize("text", [None, 3, [], "x"])
def test_a_config_without_a_part_for_text_is_refused(
    folder: Path, tmp_path: Path, text: object
) -> None:
    copy = copied(folder, tmp_path / "m", tensors_of(folder))
    config = {"model_type": "mllama", "text_config": text}
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(DamagedFileError, match=r"text_config is .*, expected an object"):
        open_checkpoint(copy).config  # noqa: B018


def test_a_tensor_under_both_names_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = tensors_of(folder)
    norm = "language_model.model.norm.weight"
    copy = copied(folder, tmp_path / "m", tensors | {newer(norm): tensors[norm].clone()})
    with pytest.raises(DamagedFileError, match="is there twice, under two names"):
        open_checkpoint(copy).config  # noqa: B018


def test_a_tensor_that_is_of_no_part_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path / "m", tensors_of(folder) | {"audio.weight": torch.ones(2)})
    with pytest.raises(DamagedFileError, match=r"audio\.weight: 2, the config says there is no"):
        open_checkpoint(copy).config  # noqa: B018


META = {
    "language_model.model.layers.": "text_model.layers.",
    "language_model.model.norm.": "text_model.norm.",
    "language_model.lm_head.": "text_model.output.",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
PARAMS = {
    "dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 272, "multiple_of": 32,
    "ffn_dim_multiplier": 0.56, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
    "vision_chunk_size": 28, "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 2,
}  # fmt: skip


def meta_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Meta's code names them: layers of text and of images are numbered each for themselves."""
    found = {"text_model.rope.freqs": torch.ones(8), "vision_model.vision_encoder.x": torch.ones(3)}
    embedding = tensors["language_model.model.embed_tokens.weight"]
    found["text_model.tok_embeddings.weight"] = embedding[:272].clone()
    found["text_model.learnable_embedding.weight"] = embedding[272:].clone()
    layers = [layer for layer in range(5) if layer not in CROSSING]
    for name, tensor in tensors.items():
        if not name.startswith("language_model.") or "embed_tokens" in name:
            continue
        parts = name.split(".")
        if parts[2] == "layers":
            layer = int(parts[3])
            if layer in CROSSING:
                at = CROSSING.index(layer)
                found[f"text_model.cross_attention_layers.{at}.{'.'.join(parts[4:])}"] = tensor
                continue
            parts[3] = str(layers.index(layer))
        if parts[-2] in ("q_proj", "k_proj"):  # `permute` of llama.cpp's convert_hf_to_gguf.py
            heads = len(tensor) // 16
            tensor = tensor.view(heads, 2, 8, 64).transpose(1, 2).reshape(tensor.shape)
        metas = ".".join(parts)
        for ours, theirs in META.items():
            metas = metas.replace(ours, theirs)
        found[metas] = tensor
    return found


def test_metas_form_gives_the_same_logits(folder: Path, tmp_path: Path) -> None:
    """Its rope's original context is 8192, which params.json does not say."""
    rope = ROPE | {"original_max_position_embeddings": 8192}
    same = copied(folder, tmp_path / "hf", tensors_of(folder), rope_parameters=rope)
    meta = tmp_path / "meta"
    meta.mkdir()
    torch.save(meta_tensors(tensors_of(folder)), meta / "consolidated.00.pth")
    (meta / "params.json").write_text(json.dumps(PARAMS), "utf-8")
    shutil.copy(folder / "tokenizer.json", meta)
    said: list[str] = []
    found = loaded(meta, notice=said.append).logits(IDS)
    assert torch.equal(found, loaded(same).logits(IDS))
    assert said == [f"{meta}: {IMAGES_ARE_NOT_READ}"]


def test_an_adapter_is_refused_by_the_name_that_it_has_for_a_layer(
    folder: Path, tmp_path: Path
) -> None:
    module = "language_model.model.layers.2.self_attn.q_proj"
    sides = {module: (torch.ones(4, 64), torch.ones(64, 4))}
    with pytest.raises(DamagedFileError, match=f"{module}.weight: 64 x 64, .* no such tensor"):
        loaded(folder, lora=[write_adapter(tmp_path / "lora", sides)])


def test_a_merge_that_would_write_other_names_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is 'mllama', merge writes the folders of 'llama'"):
        merge(require(str(folder)), ["x"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
