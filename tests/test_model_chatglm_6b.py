"""ChatGLM-6B against what its published code computes, through the real loading path."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b import (
    CONFIG,
    EOP,
    GMASK,
    MASK,
    SOP,
    VOCAB,
    expected_logits,
    random_tensors,
    write_folder,
    write_shards,
)
from safetensors.torch import save_file
from torch import Tensor

import llamachat
from llamachat.architecture import config_from_hf
from llamachat.chat.builtin import template_for
from llamachat.chat.events import Done
from llamachat.chat.templates import Message, encode
from llamachat.checkpoints import open_checkpoint
from llamachat.engine.decoding import Choice, Commit, Start
from llamachat.engine.engine import Engine
from llamachat.engine.events import Prefill
from llamachat.engine.strategies import Greedy
from llamachat.errors import DamagedFileError
from llamachat.library.store import require
from llamachat.measure.quantizing import Wanted, quantize

CONTEXT = [(7 * i * i + 3 * i + 6) % 40 + 6 for i in range(9)]
PROMPT = [*CONTEXT, GMASK, SOP]
REPLY = [11, 30, 7, 7, 25]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_tensors()


@pytest.fixture(scope="module")
def folder(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("chatglm"), tensors)


@pytest.fixture(scope="module")
def shards(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), tensors)


def load(folder: Path, **settings: Any) -> llamachat.Model:
    return llamachat.load(folder, **{"dtype": "float32", "threads": 1, **settings})


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_logits_of_a_prompt_and_its_reply_are_the_published_code_s(
    folder: Path, tensors: dict[str, Tensor], backend: str
) -> None:
    ids = [*PROMPT, *REPLY]
    found = load(folder, backend=backend).logits(ids)
    assert relative_error(found, expected_logits(tensors, ids)) < 1e-5


def test_text_may_stand_between_the_gap_and_the_reply(
    folder: Path, tensors: dict[str, Tensor]
) -> None:
    """So that positions tell which of the two they follow."""
    ids = [*CONTEXT[:3], GMASK, *CONTEXT[3:], SOP, *REPLY]
    assert relative_error(load(folder).logits(ids), expected_logits(tensors, ids)) < 1e-5


def test_pickled_shards_are_the_same_model(folder: Path, shards: Path) -> None:
    assert torch.equal(load(folder).logits(PROMPT), load(shards).logits(PROMPT))


def test_without_a_head_of_its_own_the_table_is_the_head(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    tied = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    expected = expected_logits({**tied, "lm_head.weight": tied[
        "transformer.word_embeddings.weight"]}, PROMPT)  # fmt: skip
    assert relative_error(load(write_folder(tmp_path, tied)).logits(PROMPT), expected) < 1e-5


@dataclass
class Dictated:
    """A decoding that takes given ids, and keeps the logits that it was shown."""

    ids: Sequence[int]
    shown: list[Tensor] = field(default_factory=list)
    seed: int | None = None
    width: int = 1

    def seeded(self, _seed: int) -> Dictated:
        return self

    def start(self, _start: Start) -> Dictated:
        return self

    def choose(self, logits: Tensor, step: Tensor) -> Choice:
        self.shown.append(logits)
        return Choice(torch.tensor([self.ids[int(step)]]), None, None)

    def accept(self, choice: Choice) -> Commit:
        return Commit((int(choice.tokens),), done=False)

    def finish(self) -> Commit:
        return Commit(tuple(self.ids), done=True)


def run(engine: Engine, prompt: list[int], reply: list[int]) -> tuple[Tensor, list[Prefill]]:
    """Logits (n, V) before each id of the reply, and how the prompt was run."""
    dictated = Dictated(reply)
    events = list(engine.generate(prompt, dictated, max_new_tokens=len(reply)))
    return torch.cat(dictated.shown), [it for it in events if isinstance(it, Prefill)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_cached_steps_are_the_published_code_s(
    folder: Path, tensors: dict[str, Tensor], backend: str
) -> None:
    model = load(folder, backend=backend)
    found, _ = run(model.engine, PROMPT, REPLY)
    expected = expected_logits(tensors, [*PROMPT, *REPLY])[len(PROMPT) - 1 : -1]
    assert relative_error(found, expected[:, : found.shape[1]]) < 1e-5


def test_the_prefix_is_run_in_one_pass_whatever_a_pass_may_hold(folder: Path) -> None:
    decoder = load(folder).engine.decoder
    ids = [*PROMPT, *REPLY]
    found, prefills = run(Engine(decoder, ctx_size=64, chunk=2), ids, REPLY)
    assert [it.done for it in prefills] == [0, 11, 13, 15, 16]
    whole, _ = run(Engine(decoder, ctx_size=64), ids, REPLY)
    assert relative_error(found, whole) < 1e-5
    in_parts = Engine(decoder, ctx_size=64, chunk=2).logits(ids)
    assert relative_error(in_parts, Engine(decoder, ctx_size=64).logits(ids)) < 1e-5


OTHERS: Mapping[str, tuple[list[int], int]] = {
    "another prefix": ([*CONTEXT, 8, GMASK, SOP], 0),
    "a prefix without its end": (CONTEXT, 0),
    "the same prompt": (PROMPT, len(PROMPT) - 1),
    "a reply that goes on": ([*PROMPT, *REPLY[:3], 9], len(PROMPT) + 3),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_cache_is_used_again_only_where_the_prefix_is_the_same(folder: Path, other: str) -> None:
    ids, reused = OTHERS[other]
    engine = load(folder).engine
    run(engine, PROMPT, REPLY)
    found, prefills = run(engine, ids, [8])
    assert prefills[0].reused == reused
    engine.clear()
    assert relative_error(found, run(engine, ids, [8])[0]) < 1e-5


def test_ids_without_an_end_of_prefix_are_what_follows_an_empty_one(folder: Path) -> None:
    model = load(folder)
    assert relative_error(model.logits(CONTEXT)[:5], model.logits(CONTEXT[:5])) < 1e-5
    assert model.logits(CONTEXT).isfinite().all()


def test_keys_and_values_may_be_smaller(folder: Path, tensors: dict[str, Tensor]) -> None:
    expected = expected_logits(tensors, PROMPT)
    errors = [
        relative_error(load(folder, kv_cache=form).logits(PROMPT), expected)
        for form in ("f32", "bf16", "int8")
    ]
    assert errors[0] < 1e-5
    assert all(1e-5 < error < 0.1 for error in errors[1:])


@pytest.mark.parametrize(("form", "least", "most"), [("int8", 1e-4, 0.1), ("int4", 0.01, 0.7)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_quantized_weights_are_near_the_floats(
    folder: Path, tensors: dict[str, Tensor], form: str, least: float, most: float, backend: str
) -> None:
    model = load(folder, quantize=form, backend=backend, dtype="auto", kv_cache="f32")
    assert model.quantize == form
    assert least < relative_error(model.logits(PROMPT), expected_logits(tensors, PROMPT)) < most


def test_what_llamachat_quantize_writes_is_the_same_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path))
    made = tmp_path / "made"
    quantize(
        require(str(folder)), Wanted("int8"), name="tiny", folder=made, threads=1,
        notice=lambda _: None, progress=lambda *_: None,
    )  # fmt: skip
    model, source = (
        llamachat.load(path, quantize="int8", threads=1, kv_cache="f32") for path in (made, folder)
    )
    assert torch.equal(model.logits(PROMPT), source.logits(PROMPT))
    assert model.config == source.config
    assert model.tokenizer.encode("ab\n c") == source.tokenizer.encode("ab\n c")


QKV, UP = "transformer.layers.1.attention.query_key_value", "transformer.layers.0.mlp.dense_h_to_4h"


def sides_for(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, I) and B (O, r) for two modules."""
    generator = torch.Generator().manual_seed(7)
    shapes = {module: tensors[f"{module}.weight"].shape for module in (QKV, UP)}
    return {
        module: (
            torch.randn(4, n_in, generator=generator) * 0.2,
            torch.randn(n_out, 4, generator=generator) * 0.2,
        )
        for module, (n_out, n_in) in shapes.items()
    }


def write_adapter(folder: Path, sides: Mapping[str, tuple[Tensor, Tensor]]) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    saved = {
        f"base_model.model.{module}.lora_{side}.weight": tensor
        for module, both in sides.items()
        for side, tensor in zip("AB", both, strict=True)
    }
    save_file(saved, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_adds_to_the_rows_of_every_head(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    sides = sides_for(tensors)
    added = {f"{m}.weight": tensors[f"{m}.weight"] + 2 * (b @ a) for m, (a, b) in sides.items()}
    found = load(folder, lora=[write_adapter(tmp_path / "lora", sides)]).logits([*PROMPT, *REPLY])
    assert relative_error(found, expected_logits(tensors | added, [*PROMPT, *REPLY])) < 1e-5


def test_an_adapter_of_chatglm2_is_refused_by_name(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    other = "transformer.encoder.layers.1.self_attention.query_key_value"
    adapter = write_adapter(tmp_path / "lora", {other: sides_for(tensors)[QKV]})
    with pytest.raises(DamagedFileError, match=f"{other}.weight: 192 x 64, .* no such tensor"):
        load(folder, lora=[adapter])


def test_a_conversation_of_two_turns_is_what_its_prompts_give(folder: Path) -> None:
    model = load(folder)
    chat = llamachat.ChatSession(model, options=None, max_new_tokens=6)
    chat.options = chat.options.saying(temperature=0.0)
    asked = []
    for question in ("ab", "你好"):
        asked.append(Message("user", question))
        *_, done = chat.send(question)
        assert isinstance(done, Done)
        prompt = encode(template_for(None, model.tokenizer).segments(asked), model.tokenizer)
        assert prompt[-2:] == [GMASK, SOP]
        fresh = load(folder).generate(prompt, Greedy(), max_new_tokens=6)
        assert list(done.token_ids) == list(fresh)
        assert done.reused_tokens == 0
        asked.append(Message("assistant", done.text))


def test_a_reply_is_read_again_as_text(folder: Path) -> None:
    """Its ids begin with the space of a beginning, which does not stand behind a colon."""
    tokenizer = open_checkpoint(folder).tokenizer()
    first, second = Message("user", "a"), Message("user", "b")
    ids = tuple(tokenizer.encode("你好"))
    talk = [first, Message("assistant", "你好", ids), second]
    found = encode(template_for(None, tokenizer).segments(talk), tokenizer)
    expected = tokenizer.encode("[Round 0]\n问：a\n答：你好\n[Round 1]\n问：b\n答：")
    assert found == [*expected, GMASK, SOP]


def test_the_whole_config_is_read() -> None:
    real = {
        "hidden_size": 4096, "inner_hidden_size": 16384, "num_layers": 28,
        "num_attention_heads": 32, "max_sequence_length": 2048, "vocab_size": 130528,
    }  # fmt: skip
    config = config_from_hf(CONFIG | real)
    assert replace(config, tied=True).n_params == 6_173_286_400
    assert (config.n_kv_heads, config.head_dim, config.max_seq_len) == (32, 128, 2048)
    assert config.prefix is not None
    assert (config.prefix.end, config.prefix.gaps) == (SOP, (GMASK, MASK))


@pytest.mark.parametrize(("vocab_size", "first"), [(130528, 130000), (150528, 150000)])
def test_ids_that_a_config_leaves_out_are_those_of_its_revision(
    vocab_size: int, first: int
) -> None:
    named = {"bos_token_id", "mask_token_id", "gmask_token_id"}
    config = {key: value for key, value in CONFIG.items() if key not in named}
    prefix = config_from_hf(config | {"vocab_size": vocab_size}).prefix
    assert prefix is not None
    assert (prefix.end, prefix.gaps) == (first + 4, (first + 1, first))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_encoding_2d": False}, "position_encoding_2d is False, expected true"),
        ({"quantization_bit": 4}, "quantization_bit is 4, expected none"),
        ({"pre_seq_len": 128}, "pre_seq_len is 128, expected none"),
        ({"num_attention_heads": 32}, "head_dim is 2, expected a multiple of 4"),
        ({"num_layers": None}, "num_layers is missing"),
        ({"bos_token_id": -1}, "bos_token_id is -1, expected a whole number"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_followed_is_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DamagedFileError, match=message):
        config_from_hf(CONFIG | changes)


def test_a_tensor_that_is_missing_is_named_as_the_file_would(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    name = "transformer.layers.1.mlp.dense_h_to_4h.bias"
    left = {it: tensor for it, tensor in tensors.items() if it != name}
    with pytest.raises(DamagedFileError, match=f"{name} is missing, the config says 128"):
        _ = open_checkpoint(write_folder(tmp_path, left)).config


def test_a_reply_ends_with_eop_and_no_id_is_chosen_that_means_nothing(folder: Path) -> None:
    tokenizer = open_checkpoint(folder).tokenizer()
    assert tokenizer.stop_ids == {EOP}
    assert tokenizer.vocab_size < VOCAB
