"""From a folder to a model: what is read, what is refused, and the Python API."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import llamachat
from llamachat import hardware
from llamachat.errors import DamagedFileError, UsageError, WillNotFitError

PROMPT = list(b"Hello, world")
GIB = 2**30


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    path = tiny_llama()
    generation = {"temperature": 0.5, "top_k": 12, "max_length": 99, "top_p": "high"}
    (path / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> llamachat.Model:
    return llamachat.load(folder, dtype="float32", threads=1)


def test_a_model_says_what_it_is(model: llamachat.Model, folder: Path) -> None:
    assert (model.name, model.located.path, model.located.source) == (str(folder), folder, "local")
    assert (model.config.dim, model.config.n_kv_heads, model.config.vocab_size) == (64, 2, 272)
    assert (model.dtype, model.threads, model.engine.ctx_size) == ("float32", 1, 1024)
    assert model.tokenizer.decode(model.tokenizer.encode("héllo")) == "héllo"


def test_sampling_defaults_are_the_numbers_of_the_generation_config(model: llamachat.Model) -> None:
    assert dict(model.sampling)["generation_config.json"] == {"temperature": 0.5, "top_k": 12}


def test_a_model_that_would_rather_not_sample_is_greedy(
    tiny_llama: Callable[..., Path],
) -> None:
    path = tiny_llama()
    suggested = '{"do_sample": false, "top_k": 9, "repetition_penalty": 1.1}'
    (path / "generation_config.json").write_text(suggested, "utf-8")
    sampling = llamachat.load(path, threads=1).sampling
    assert dict(sampling)["generation_config.json"] == {
        "temperature": 0.0, "repetition_penalty": 1.1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "expected"),
    [("[[5], [6, 7]]", ((5,), (6, 7))), ("[[]]", None), ("[[-1]]", None), ("5", None)],
)
def test_bad_words_of_a_generation_config_are_taken_if_they_are_ids(
    tiny_llama: Callable[..., Path], words: str, expected: object
) -> None:
    path = tiny_llama()
    (path / "generation_config.json").write_text(f'{{"bad_words_ids": {words}}}', "utf-8")
    sampling = llamachat.load(path, threads=1).sampling
    assert dict(sampling)["generation_config.json"].get("bad_words") == expected


def test_the_api_is_the_same_however_often_it_is_named() -> None:
    program = (
        "import llamachat, llamachat.loading; llamachat.Model; llamachat.load; "
        "llamachat.ChatSession; assert callable(llamachat.load) and callable(llamachat.load)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_generate_yields_greedy_ids_by_default(model: llamachat.Model) -> None:
    ids = list(model.generate(PROMPT, max_new_tokens=5, stop_ids=()))
    expected = []
    for _ in range(5):
        best = model.logits(PROMPT + expected)[-1, : model.tokenizer.vocab_size].argmax()
        expected.append(int(best))
    assert ids == expected


def test_generate_stops_at_the_models_own_stop_ids(model: llamachat.Model) -> None:
    options = llamachat.Sample(temperature=50, top_p=1, seed=1)
    free = list(model.generate(PROMPT, options, 800, stop_ids=()))
    (stop,) = model.tokenizer.stop_ids
    assert stop in free
    assert list(model.generate(PROMPT, options, 800)) == free[: free.index(stop)]


def test_a_conversation_can_be_held_with_it(model: llamachat.Model) -> None:
    chat = llamachat.ChatSession(model, system="Be brief.", max_new_tokens=4)
    *_, done = chat.send("Hello")
    assert len(done.token_ids) <= 4
    assert chat.prompt_text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_the_context_can_be_made_smaller_but_not_larger(folder: Path) -> None:
    assert llamachat.load(folder, ctx_size=100, threads=1).engine.ctx_size == 100
    for wrong in (0, 1025):
        with pytest.raises(UsageError, match=f"{wrong}, the model takes 1 to 1024"):
            llamachat.load(folder, ctx_size=wrong)


def test_dynamic_rope_is_fixed_for_the_context_that_was_asked_for(
    tiny_llama: Callable[..., Path],
) -> None:
    """transformers looks at the length of a text, which is the whole context here."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    path = tiny_llama(max_position_embeddings=24, rope_parameters=rope)
    ids = [(7 * i * i + 31 * i + 5) % 256 for i in range(48)]
    theirs = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
    ours = llamachat.load(path, dtype="float32", threads=1, ctx_size=48).logits(ids)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(UsageError, match="97, the model takes 1 to 96"):
        llamachat.load(path, ctx_size=97)


@pytest.mark.parametrize(
    "wrong", [{"quantize": "int3"}, {"device": "tpu"}, {"dtype": "float16"}], ids=str
)
def test_what_is_not_offered_is_refused_with_what_is(folder: Path, wrong: dict[str, str]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(UsageError, match=f"{name} is '{value}', expected one of auto, "):
        llamachat.load(folder, **wrong)


def test_damage_is_told_with_the_name_of_the_file(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match=r"model\.safetensors"):
        llamachat.load(tmp_path)


def use_memory(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(hardware, "memory_bytes", lambda: (64 * GIB, available))


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_memory(monkeypatch, 100_000)
    with pytest.raises(WillNotFitError, match="GiB"):
        llamachat.load(folder)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def room_for_700(
    request: pytest.FixtureRequest,
    tiny_llama: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A model, and memory for its weights and 700 tokens of context, all in float32.

    A token takes 512 bytes (2 layers of 2 x 2 x 16 values). 0.8 of what is available is used.
    The reference keeps two tables, of 272 rows and 64 columns, even if the file has one.
    """
    layer = 2 * 64 * (64 + 32) + 3 * 64 * 96 + 2 * 64
    weights = 2 * layer + 64 + 2 * 272 * 64
    folder = tiny_llama(tie_word_embeddings=request.param)
    use_memory(monkeypatch, (4 * weights + 700 * 512) * 5 // 4 + 1)
    return folder


def test_the_context_shrinks_to_what_memory_allows_and_that_is_said(room_for_700: Path) -> None:
    notices: list[str] = []
    model = llamachat.load(
        room_for_700, backend="reference", dtype="float32", threads=1, notice=notices.append
    )
    assert model.engine.ctx_size == 700
    assert notices == ["context: 700 of 1024 tokens, for memory; --ctx-size changes it"]


def test_a_context_that_was_asked_for_is_not_made_smaller(room_for_700: Path) -> None:
    with pytest.raises(WillNotFitError) as caught:
        llamachat.load(room_for_700, backend="reference", dtype="float32", ctx_size=1000)
    assert caught.value.hint == "--ctx-size 700 would fit"


@pytest.mark.parametrize(("form", "n_tokens"), [("f32", 700), ("bf16", 1400), ("int8", 2240)])
def test_a_smaller_cache_form_makes_room_for_more_context(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, form: str, n_tokens: int
) -> None:
    """700 tokens of 512 bytes fit in float32; at 8 bits 16 elements share a scale of 4 bytes."""
    folder = tiny_llama(max_position_embeddings=4096)
    layer = 2 * 64 * (64 + 32) + 3 * 64 * 96 + 2 * 64
    weights = 2 * layer + 64 + 2 * 272 * 64
    use_memory(monkeypatch, (4 * weights + 700 * 512) * 5 // 4 + 1)
    model = llamachat.load(folder, backend="reference", dtype="float32", kv_cache=form, threads=1)
    assert model.engine.ctx_size == n_tokens


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_threads_are_those_that_were_asked_for(folder: Path, backend: str) -> None:
    before = torch.get_num_threads()
    try:
        model = llamachat.load(folder, threads=2, backend=backend)
        assert model.threads == 2
        assert torch.get_num_threads() == (2 if model.backend == "reference" else 1)
    finally:
        torch.set_num_threads(before)


def test_a_cgroup_limits_memory_but_its_file_cache_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\ninactive_file 600000\nactive_file 1\n")
    monkeypatch.setattr(
        hardware, "Path", lambda path: tmp_path if path == "/sys/fs/cgroup" else Path(path)
    )
    assert hardware.memory_bytes() == (1_000_000, 700_000)
