"""LoRA adapters: merged as PEFT would, or refused with what was found and what was expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf_files import write_gguf
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

import llamachat
from llamachat.checkpoints import open_checkpoint
from llamachat.checkpoints.lora import AdaptedCheckpoint, Adapter, adapter_named
from llamachat.errors import DamagedFileError, LlamachatError, ModelNotFoundError, UsageError
from llamachat.kernels.backends import choose
from llamachat.library.store import Located
from llamachat.loading.adapters import check_base
from llamachat.quant.tensor import QTensor

Array = npt.NDArray[np.float32]
IDS = [(7 * i * i + 31 * i + 5) % 256 for i in range(24)]
RANK, ALPHA = 4, 8
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"
K1 = "model.layers.1.self_attn.k_proj"
DOWN = "model.layers.1.mlp.down_proj"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
SHAPES = {Q0: (64, 64), K1: (32, 64), DOWN: (64, 96), HEAD: (272, 64)}


def config_of(**changes: Any) -> dict[str, Any]:
    """What PEFT 0.15 writes, but for the keys that are null."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "lora_dropout": 0.05, "init_lora_weights": True, "inference_mode": True,
        "target_modules": ["q_proj", "k_proj", "down_proj"], "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {}, "megatron_core": "megatron.core",
        "base_model_name_or_path": "someone/base", "loftq_config": {}, "lora_bias": False,
    } | changes  # fmt: skip


def random(*shape: int, seed: int = 0) -> Array:
    values: Array = np.random.default_rng([seed, *shape]).normal(0, 0.2, shape).astype(np.float32)
    return values


def products(*modules: str, seed: int = 0) -> dict[str, Array]:
    return {
        f"{PREFIX}{module}.lora_{side}.weight": random(*shape, seed=seed + len(module))
        for module in modules
        for side, shape in (("A", (RANK, SHAPES[module][1])), ("B", (SHAPES[module][0], RANK)))
    }


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes adapters as PEFT saves them."""

    def write(tensors: dict[str, Array], name: str = "adapter", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config_of(**changes)), "utf-8")
        return folder

    return write


@pytest.fixture(scope="module")
def base(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


def weights_of(folder: Path) -> dict[str, Array]:
    weights: dict[str, Array] = load_file(folder / "model.safetensors")
    return weights


def merged(weights: dict[str, Array], tensors: dict[str, Array], scale: float) -> dict[str, Array]:
    """What PEFT's documentation defines: W + scale * B A."""
    result = dict(weights)
    for name in tensors:
        if ".lora_A." in name:
            a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
            weight = f"{name.removeprefix(PREFIX).partition('.lora_A')[0]}.weight"
            result[weight] = result[weight] + np.float32(scale) * (b @ a)
    return result


def logits_with(base: Path, weights: dict[str, Array]) -> Tensor:
    """Of transformers, with these weights in the base's architecture."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model.resize_token_embeddings(len(weights["model.embed_tokens.weight"]))
    model.load_state_dict({name: torch.from_numpy(it) for name, it in weights.items()}, strict=True)
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([IDS])).logits[0]
    return logits


def loaded(base: Path, *lora: str | Path, **options: Any) -> llamachat.Model:
    return llamachat.load(base, lora=lora, threads=1, **({"dtype": "float32"} | options))


def is_near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / RANK**0.5),
        ({"lora_alpha": 1}, 1 / RANK),
    ],
    ids=str,
)
def test_logits_are_those_of_weights_with_the_product_added(
    base: Path, adapter: Callable[..., Path], changes: dict[str, Any], scale: float
) -> None:
    tensors = products(Q0, K1, DOWN, HEAD)
    expected = logits_with(base, merged(weights_of(base), tensors, scale))
    assert is_near(loaded(base, adapter(tensors, **changes)).logits(IDS), expected)


def test_an_adapter_can_be_weakened_or_turned_around(
    base: Path, adapter: Callable[..., Path]
) -> None:
    tensors = products(Q0, DOWN)
    folder = adapter(tensors)
    expected = logits_with(base, merged(weights_of(base), tensors, -0.5 * ALPHA / RANK))
    assert is_near(loaded(base, f"{folder}:-0.5").logits(IDS), expected)


def test_several_adapters_are_merged_in_order(base: Path, adapter: Callable[..., Path]) -> None:
    """The second replaces the table that the first replaced, and adds to what the first added."""
    first = products(Q0) | {f"{PREFIX}{EMBEDDING}.weight": random(272, 64, seed=1)}
    second = products(Q0, seed=9) | {f"{PREFIX}{EMBEDDING}.weight": random(272, 64, seed=2)}
    weights = merged(merged(weights_of(base), first, 2), second, 2)
    weights["model.embed_tokens.weight"] = second[f"{PREFIX}{EMBEDDING}.weight"]
    found = loaded(base, adapter(first, "first"), adapter(second, "second")).logits(IDS)
    assert is_near(found, logits_with(base, weights))


def test_products_stored_transposed_are_turned(base: Path, adapter: Callable[..., Path]) -> None:
    """The product is then (I, O): A (r, O) and B (I, r)."""
    a, b = random(RANK, 64), random(96, RANK)
    module = "model.layers.1.mlp.down_proj"
    turned = {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    weights = weights_of(base)
    weights[f"{module}.weight"] = weights[f"{module}.weight"] + 2 * (b @ a).T
    found = loaded(base, adapter(turned, fan_in_fan_out=True))
    assert is_near(found.logits(IDS), logits_with(base, weights))


SAVED = {
    "plain": "{}.weight",
    "as a module to save": "{}.modules_to_save.default.weight",
    "beside a product": "{}.base_layer.weight",
}


@pytest.mark.parametrize("spelling", SAVED.values(), ids=SAVED.keys())
def test_saved_tables_replace_those_of_the_base_and_may_be_longer(
    base: Path, adapter: Callable[..., Path], spelling: str
) -> None:
    table, head = random(280, 64, seed=1), random(280, 64, seed=2)
    tensors = {PREFIX + spelling.format(EMBEDDING): table, PREFIX + spelling.format(HEAD): head}
    model = loaded(base, adapter(tensors))
    weights = weights_of(base)
    weights |= {"model.embed_tokens.weight": table, "lm_head.weight": head}
    assert model.config.vocab_size == 280
    assert is_near(model.logits(IDS), logits_with(base, weights))


def test_a_saved_head_is_not_that_of_a_tied_base_any_more(
    tiny_llama: Callable[..., Path], adapter: Callable[..., Path]
) -> None:
    tied, head = tiny_llama(tie_word_embeddings=True), random(272, 64)
    model = loaded(tied, adapter({f"{PREFIX}{HEAD}.weight": head}))
    plain = loaded(tied)
    untied = tiny_llama()
    weights = weights_of(tied) | {"lm_head.weight": head}
    assert is_near(model.logits(IDS), logits_with(untied, weights))
    assert not is_near(model.logits(IDS), plain.logits(IDS))


def test_the_tokenizer_of_an_adapter_goes_before_the_base_s(
    base: Path, adapter: Callable[..., Path]
) -> None:
    folder = adapter(products(Q0))
    text = (base / "tokenizer.json").read_text("utf-8").replace('"<s>"', '"<begin>"')
    (folder / "tokenizer.json").write_text(text, "utf-8")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<begin>"}', "utf-8")
    checkpoint = AdaptedCheckpoint(open_checkpoint(base), Adapter(folder))
    assert checkpoint.tokenizer().piece(258) == "<begin>"
    assert open_checkpoint(base).tokenizer().piece(258) == "<s>"


def test_a_gguf_s_query_and_key_rows_meet_those_of_the_adapter(
    base: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """The file has pairs side by side, the adapter has them half a head apart."""
    folder = adapter(products(Q0, K1))
    file = write_gguf(base, tmp_path / "tiny.gguf")
    found, expected = (
        dict(AdaptedCheckpoint(open_checkpoint(path), Adapter(folder)).tensors())
        for path in (file, base)
    )
    assert torch.equal(found[f"{Q0}.weight"], expected[f"{Q0}.weight"])
    assert torch.equal(found[f"{K1}.weight"], expected[f"{K1}.weight"])


@pytest.mark.skipif(choose().name != "native", reason="no native kernels")
def test_a_quantized_base_is_unpacked_where_it_changes_only(
    base: Path, adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path / "cache"))
    tensors = products(Q0, DOWN)
    said: list[str] = []
    small = quantized(base, tmp_path / "small")
    model = loaded(small, adapter(tensors), dtype="auto", notice=said.append)
    assert model.quantize == "int8"
    assert any("2 weights, INT8 in their file, are unpacked, merged" in line for line in said)
    exact = {
        name: (it.dequantize() if isinstance(it, QTensor) else it.float()).numpy()
        for name, it in open_checkpoint(small).tensors()
    }
    expected = logits_with(base, merged(exact, tensors, 2))
    error = (model.logits(IDS) - expected).norm() / expected.norm()
    assert error < 0.05


def quantized(base: Path, folder: Path) -> Path:
    from llamachat.library.store import require
    from llamachat.measure.quantizing import Wanted, quantize

    return quantize(
        require(str(base)), Wanted("int8"), name="base", folder=folder, threads=1,
        notice=lambda _: None, progress=lambda *_: None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"use_dora": True}, "use_dora is True, expected none"),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}, expected none"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices is \[1\]"),
        ({"brand_new": {"on": True}}, "brand_new is"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"r": 0}, "r is 0, expected a positive number"),
        ({"r": 8}, "rank 4, r of adapter_config.json is 8"),
        ({"lora_alpha": None}, "lora_alpha is None"),
    ],
    ids=str,
)
def test_what_a_merge_cannot_follow_is_refused_by_name(
    adapter: Callable[..., Path], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(DamagedFileError, match=named):
        Adapter(adapter(products(Q0), **changes))


ALONE = {f"{PREFIX}{Q0}.lora_A.weight": random(RANK, 64)}
TWICE = products(Q0) | {f"{PREFIX}{Q0}.lora_A.default.weight": random(RANK, 64)}


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (ALONE, "lora_A.weight.* is alone"),
        (ALONE | {f"{PREFIX}{Q0}.lora_B.weight": random(64, 3)}, r"\[4, 64\], lora_B \[64, 3\]"),
        (TWICE, "is there twice"),
        ({f"{PREFIX}{Q0}.lora_magnitude_vector.weight": random(64)}, "lora_magnitude_vector"),
        ({f"{PREFIX}{EMBEDDING}.lora_embedding_A": random(RANK, 272)}, "lora_embedding_A"),
        ({f"{PREFIX}{Q0}.bias": random(64)}, "bias: expected lora_A"),
        ({f"{PREFIX}{Q0}.weight": random(4, 4).astype(np.int64)}, "type I64, expected F32"),
    ],
    ids=["alone", "ranks", "twice", "dora", "embedding", "bias", "type"],
)
def test_tensors_that_make_no_sense_are_refused_by_name(
    adapter: Callable[..., Path], tensors: dict[str, Array], named: str
) -> None:
    with pytest.raises(DamagedFileError, match=named):
        Adapter(adapter(tensors))


WIDE = {
    f"{PREFIX}{Q0}.lora_A.weight": random(RANK, 128),
    f"{PREFIX}{Q0}.lora_B.weight": random(128, RANK),
}
LAYER_9 = {name.replace("layers.0", "layers.9"): it for name, it in products(Q0).items()}


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (WIDE, "q_proj.weight: 128 x 128, the config says 64 x 64"),
        (LAYER_9, "layers.9.*the config says there is no such tensor"),
        ({f"{PREFIX}{EMBEDDING}.weight": random(270, 64)}, "270 rows, .* has 272"),
        ({f"{PREFIX}{EMBEDDING}.weight": random(280, 64)}, "280 rows, the head of .* 272"),
        ({f"{PREFIX}{EMBEDDING}.weight": random(272, 32)}, "272 x 32, the config says 272 x 64"),
    ],
    ids=["shape", "layer", "fewer rows", "no head", "dim"],
)
def test_a_base_that_an_adapter_was_not_made_for_is_refused_with_both_values(
    base: Path, adapter: Callable[..., Path], tensors: dict[str, Array], named: str
) -> None:
    with pytest.raises(DamagedFileError, match=named):
        _ = AdaptedCheckpoint(open_checkpoint(base), Adapter(adapter(tensors))).config


def test_a_tokenizer_with_more_ids_than_the_table_has_rows_is_refused(
    tiny_llama: Callable[..., Path], base: Path, adapter: Callable[..., Path]
) -> None:
    folder = adapter(products(Q0))
    (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    small = open_checkpoint(tiny_llama(vocab_size=258, bos_token_id=1))
    with pytest.raises(DamagedFileError, match=r"has 259 ids, .* has 258 rows"):
        AdaptedCheckpoint(small, Adapter(folder)).tokenizer()


def test_values_that_are_not_finite_are_refused(base: Path, adapter: Callable[..., Path]) -> None:
    tensors = products(Q0)
    tensors[f"{PREFIX}{Q0}.lora_B.weight"][3, 1] = np.nan
    with pytest.raises(DamagedFileError, match=r"q_proj\.weight: what it adds is not finite"):
        loaded(base, adapter(tensors))


@pytest.mark.parametrize(
    ("ending", "error", "named"),
    [
        (":inf", UsageError, "the scale is inf"),
        (":much", ModelNotFoundError, "adapter:much: no such folder"),
        ("s", ModelNotFoundError, "adapters: no such folder"),
    ],
)
def test_what_names_no_adapter_is_refused(
    adapter: Callable[..., Path], ending: str, error: type[LlamachatError], named: str
) -> None:
    with pytest.raises(error, match=named):
        adapter_named(f"{adapter(products(Q0))}{ending}")


def test_a_folder_without_weights_is_refused(adapter: Callable[..., Path]) -> None:
    folder = adapter(products(Q0))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(DamagedFileError, match=r"adapter_model\.safetensors: no such file"):
        Adapter(folder)


def pickled(folder: Path) -> Path:
    """The adapter as PEFT saved it before it knew safetensors."""
    tensors = {name: torch.from_numpy(it) for name, it in load_file(weights_in(folder)).items()}
    torch.save(tensors, folder / "adapter_model.bin")
    weights_in(folder).unlink()
    return folder


def weights_in(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def test_a_pickled_adapter_is_the_same(base: Path, adapter: Callable[..., Path]) -> None:
    tensors = products(Q0, K1, DOWN) | {f"{PREFIX}{HEAD}.weight": random(272, 64)}
    expected = loaded(base, adapter(tensors, "new")).logits(IDS)
    assert torch.equal(loaded(base, pickled(adapter(tensors, "old"))).logits(IDS), expected)


def test_safetensors_go_before_a_pickle(base: Path, adapter: Callable[..., Path]) -> None:
    folder = adapter(products(Q0))
    (folder / "adapter_model.bin").write_bytes(b"no archive")
    assert Adapter(folder).products.keys() == {f"{Q0}.weight"}


def test_a_pickle_that_would_run_code_is_refused(adapter: Callable[..., Path]) -> None:
    folder = adapter(products(Q0))
    weights_in(folder).unlink()
    torch.save({f"{PREFIX}{Q0}.lora_A.weight": Path("/")}, folder / "adapter_model.bin")
    with pytest.raises(DamagedFileError, match=r"adapter_model\.bin: it names .*pathlib"):
        Adapter(folder)


def test_a_pickled_adapter_of_whole_numbers_is_refused(adapter: Callable[..., Path]) -> None:
    folder = adapter(products(Q0))
    weights_in(folder).unlink()
    values = {f"{PREFIX}{Q0}.lora_{side}.weight": torch.ones(4, 4, dtype=int) for side in "AB"}
    torch.save(values, folder / "adapter_model.bin")
    with pytest.raises(DamagedFileError, match="type I64, expected F32"):
        Adapter(folder)


def located(**changes: Any) -> Located:
    nothing = {"path": Path("x"), "alias": None, "repo": None, "revision": None, "source": "local"}
    return Located(**(nothing | changes))


LLAMA2 = {"repo": "meta-llama/Llama-2-7b-hf", "alias": "llama-2-7b"}


@pytest.mark.parametrize(
    ("made_for", "model"),
    [
        (None, {}),
        ("", {}),
        ("meta-llama/Llama-2-7b-hf", LLAMA2),
        ("NousResearch/Llama-2-7b-hf", LLAMA2),
        ("/home/me/llama-2-7b", LLAMA2),
        ("C:\\models\\Llama-2-7B", LLAMA2),
        ("someone/base", {"path": Path("base")}),
        ("someone/base", {"path": Path("base-q4_k_m.gguf")}),
    ],
    ids=str,
)
def test_of_a_base_by_its_name_nothing_is_said(
    base: Path, adapter: Callable[..., Path], made_for: str | None, model: dict[str, Any]
) -> None:
    made = Adapter(adapter(products(Q0), base_model_name_or_path=made_for))
    assert check_base(made, open_checkpoint(base), located(**model)) is None


@pytest.mark.parametrize(
    ("made_for", "model", "found"),
    [
        ("someone/base", LLAMA2, "meta-llama/Llama-2-7b-hf"),
        ("lmsys/vicuna-7b-v1.5", LLAMA2, "meta-llama/Llama-2-7b-hf"),
        ("meta-llama/Llama-2-7b-chat-hf", LLAMA2, "meta-llama/Llama-2-7b-hf"),
        ("huggyllama/llama-7b", {"path": Path("mine")}, "mine"),
        ("someone/base", {"path": Path("base-q4_k_m")}, "base-q4_k_m"),
    ],
)
def test_a_base_of_another_name_is_said(
    base: Path, adapter: Callable[..., Path], made_for: str, model: dict[str, Any], found: str
) -> None:
    made = Adapter(adapter(products(Q0), base_model_name_or_path=made_for))
    said = check_base(made, open_checkpoint(base), located(**model))
    assert said == f"{made.path}: it was made for {made_for}, the model is {found}"


def test_a_base_that_is_known_to_be_another_is_refused(
    base: Path, adapter: Callable[..., Path]
) -> None:
    """LLaMA-1 7B and Llama 2 7B have the same shapes and the same ids."""
    made = Adapter(adapter(products(Q0), base_model_name_or_path="huggyllama/llama-7b"))
    message = "it was made for huggyllama/llama-7b, the model is meta-llama/Llama-2-7b-hf"
    with pytest.raises(DamagedFileError, match=message):
        check_base(made, open_checkpoint(base), located(**LLAMA2))


def test_another_name_is_said_once_on_loading(base: Path, adapter: Callable[..., Path]) -> None:
    """What the second was made for is the base with the first."""
    said: list[str] = []
    folders = [adapter(products(Q0), name) for name in ("one", "two")]
    loaded(base, *folders, notice=said.append)
    assert said == [f"{folders[0]}: it was made for someone/base, the model is {base.name}"]


def test_a_base_whose_name_is_none_is_refused(adapter: Callable[..., Path]) -> None:
    folder = adapter(products(Q0), base_model_name_or_path=["x"])
    with pytest.raises(DamagedFileError, match=r"base_model_name_or_path is .*, expected a name"):
        Adapter(folder)


def test_an_adapter_named_as_a_model_is_refused(adapter: Callable[..., Path]) -> None:
    folder = adapter(products(Q0))
    with pytest.raises(UsageError, match="adapter is no whole model: it is a LoRA"):
        loaded(folder)


def test_opening_an_adapter_needs_no_torch(base: Path, adapter: Callable[..., Path]) -> None:
    import subprocess
    import sys

    program = (
        "import sys; from pathlib import Path; from llamachat.checkpoints import open_checkpoint; "
        "from llamachat.checkpoints.lora import AdaptedCheckpoint, Adapter; "
        "AdaptedCheckpoint(open_checkpoint(Path(sys.argv[1])), Adapter(Path(sys.argv[2]))).config; "
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(base), str(adapter(products(Q0)))]
    assert subprocess.run(command, check=False).returncode == 0
