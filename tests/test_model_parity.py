"""The decoder against transformers' LlamaForCausalLM, on small random folders that it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import llamachat
from llamachat.engine.engine import Engine

IDS = [(7 * i * i + 31 * i + 5) % 256 for i in range(48)]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32,
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "heads wider than dim": {"head_dim": 24},
    "odd sizes": {"hidden_size": 60, "head_dim": 10, "intermediate_size": 77, "vocab_size": 261},
    "biases": {"attention_bias": True},
    "theta 1e6": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "yarn and biases": {"rope_parameters": YARN, "attention_bias": True},
    "sharded": {"shard_size": "60KB", "rms_norm_eps": 1e-6},
}


@dataclass(frozen=True)
class Pair:
    folder: Path
    ours: llamachat.Model
    theirs: LlamaForCausalLM

    def expected(self, ids: list[int]) -> Tensor:
        with torch.inference_mode():
            return self.theirs(torch.tensor([ids])).logits[0]


@pytest.fixture(scope="module")
def pair_of(tiny_llama: Callable[..., Path]) -> Callable[..., Pair]:
    made: dict[str, Pair] = {}

    def pair(form: str) -> Pair:
        if form not in made:
            folder = tiny_llama(**FORMS[form])
            theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            made[form] = Pair(folder, llamachat.load(folder, dtype="float32", threads=1), theirs)
        return made[form]

    return pair


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("form", FORMS)
def test_logits_equal_those_of_transformers(pair_of: Callable[..., Pair], form: str) -> None:
    pair = pair_of(form)
    assert relative_error(pair.ours.logits(IDS), pair.expected(IDS)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_greedy_ids_equal_those_of_transformers(pair_of: Callable[..., Pair], form: str) -> None:
    pair = pair_of(form)
    expected = pair.theirs.generate(
        torch.tensor([IDS[:9]]), max_new_tokens=32, do_sample=False, eos_token_id=None,
        pad_token_id=0, bad_words_ids=[[i] for i in range(259, pair.ours.config.vocab_size)],
    )  # fmt: skip
    found = pair.ours.generate(IDS[:9], llamachat.Greedy(), 32, stop_ids=())
    assert list(found) == expected[0, 9:].tolist()


@pytest.mark.parametrize("form", ["gqa", "biases"])
def test_the_reference_s_logits_equal_those_of_transformers(
    pair_of: Callable[..., Pair], form: str
) -> None:
    pair = pair_of(form)
    ours = llamachat.load(pair.folder, dtype="float32", threads=1, backend="reference")
    assert relative_error(ours.logits(IDS), pair.expected(IDS)) < 1e-5


def test_quantized_weights_keep_their_biases(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of("biases")
    ours = llamachat.load(pair.folder, quantize="int8", threads=1, kv_cache="f32")
    assert relative_error(ours.logits(IDS), pair.expected(IDS)) < 0.1


def test_the_sharded_folder_has_several_shards(pair_of: Callable[..., Pair]) -> None:
    assert len(list(pair_of("sharded").folder.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("form", ["linear", "llama3", "yarn"])
def test_rope_scaling_changes_what_comes_out(
    pair_of: Callable[..., Pair], form: str, tmp_path: Path
) -> None:
    """Else the agreement with transformers would say nothing about scaling."""
    pair = pair_of(form)
    for file in pair.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["rope_parameters"] |= {"rope_type": "default"}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    unscaled = llamachat.load(tmp_path, dtype="float32", threads=1)
    assert relative_error(unscaled.logits(IDS), pair.expected(IDS)) > 1e-2


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_logits_do_not_depend_on_how_a_prompt_is_cut(
    pair_of: Callable[..., Pair], chunk: int
) -> None:
    """Chunks of one token take all but themselves from the cache."""
    model = pair_of("gqa").ours
    cut = Engine(model.engine.decoder, ctx_size=64, chunk=chunk, kv_cache="f32")
    assert relative_error(cut.logits(IDS), model.logits(IDS)) < 1e-5


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_a_reply_does_not_depend_on_how_its_prompt_is_cut(
    pair_of: Callable[..., Pair], chunk: int
) -> None:
    model = pair_of("gqa").ours
    cut = Engine(model.engine.decoder, ctx_size=128, chunk=chunk, n_ids=259, kv_cache="f32")
    found = cut.generate(IDS, llamachat.Greedy(), max_new_tokens=16)
    expected = model.engine.generate(IDS, llamachat.Greedy(), max_new_tokens=16, stop_ids=())
    is_token = [event for event in found if hasattr(event, "id")]
    assert is_token == [event for event in expected if hasattr(event, "id")]


def test_logits_stay_the_same_while_a_reply_is_generated(pair_of: Callable[..., Pair]) -> None:
    """Each id that greedy decoding chose over the cache is the best of an uncached pass."""
    model = pair_of("gqa").ours
    reply = list(model.generate(IDS, llamachat.Greedy(), 32, stop_ids=()))
    best = model.logits(IDS + reply)[:, : model.tokenizer.vocab_size].argmax(-1)
    assert reply == best[len(IDS) - 1 : -1].tolist()


def test_asking_for_logits_leaves_the_cache_as_it_was(pair_of: Callable[..., Pair]) -> None:
    model = pair_of("gqa").ours
    first = list(model.generate(IDS, llamachat.Greedy(), 12, stop_ids=()))
    held = model.engine.held
    model.logits(IDS[::-1])
    assert model.engine.held == held
    events = list(model.engine.generate(IDS, llamachat.Greedy(), max_new_tokens=12, stop_ids=()))
    assert events[0].reused == len(IDS) - 1
    assert [event.id for event in events if hasattr(event, "id")] == first


def test_bfloat16_is_no_further_from_float32_than_that_of_transformers(
    pair_of: Callable[..., Pair],
) -> None:
    pair = pair_of("gqa")
    exact = pair.expected(IDS)
    theirs = LlamaForCausalLM.from_pretrained(pair.folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        rounded = theirs(torch.tensor([IDS])).logits[0].float()
    ours = llamachat.load(pair.folder, dtype="bfloat16", threads=1).logits(IDS)
    error, allowed = ((x - exact).square().mean().sqrt() / exact.std() for x in (ours, rounded))
    assert 0 < error <= 1.2 * allowed < 0.1
