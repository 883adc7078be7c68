"""In which form weights are run: what is asked for, and what is decided where nothing is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llamachat
from llamachat import hardware
from llamachat.errors import UsageError, WillNotFitError
from llamachat.kernels.backends import choose
from llamachat.library.store import require
from llamachat.measure.quantizing import Wanted, quantize

GIB = 2**30
PROMPT = list(b"Hello, world")


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMACHAT_CACHE_DIR", str(tmp_path))


def load(folder: Path, **settings: Any) -> llamachat.Model:
    return llamachat.load(folder, threads=1, **settings)


needs_native = pytest.mark.skipif(choose().name != "native", reason="no native kernels")


@needs_native
def test_a_float_checkpoint_becomes_int8(folder: Path) -> None:
    model = load(folder)
    assert (model.quantize, model.form, model.engine.kv_cache) == ("int8", "int8", "bf16")


@needs_native
def test_where_int8_does_not_fit_it_becomes_int4(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96,000 weights take 100 KB at 8 bits, and 512 tokens of context 130 KB more."""
    monkeypatch.setattr(hardware, "memory_bytes", lambda: (64 * GIB, 265_000))
    assert load(folder).quantize == "int4"


@needs_native
def test_what_does_not_fit_says_which_form_would(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "memory_bytes", lambda: (64 * GIB, 265_000))
    with pytest.raises(WillNotFitError) as caught:
        load(folder, quantize="int8")
    assert caught.value.hint == "--quantize int4 would fit"


@needs_native
@pytest.mark.parametrize("settings", [{"quantize": "none"}, {"dtype": "float32"}], ids=str)
def test_floats_stay_floats_if_that_or_their_type_is_asked_for(
    folder: Path, settings: dict[str, str]
) -> None:
    assert load(folder, **settings).quantize == "none"


def test_the_reference_runs_floats_as_they_are(folder: Path) -> None:
    assert load(folder, backend="reference").quantize == "none"


def test_more_bits_give_logits_nearer_to_the_floats(folder: Path) -> None:
    """By about 13: 0.0057 and 0.075 of the weights themselves."""
    exact = load(folder, backend="reference", dtype="float32").logits(PROMPT)

    def error(form: str) -> float:
        found = load(folder, backend="reference", dtype="float32", quantize=form).logits(PROMPT)
        return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))

    assert 0 < 5 * error("int8") < error("int4") < 1


def quantized(folder: Path, form: str, to: Path | None = None) -> Path:
    return quantize(
        require(str(folder)),
        Wanted(form),
        name="tiny",
        folder=to,
        threads=1,
        notice=lambda _: None,
        progress=lambda *_: None,
    )


@needs_native
def test_a_quantized_file_that_becomes_another_form_is_said_to_lose(
    folder: Path, tmp_path: Path
) -> None:
    notices: list[str] = []
    made = quantized(folder, "int8", tmp_path / "eight")
    model = load(made, quantize="int4", notice=notices.append)
    assert model.quantize == "int4"
    assert notices == ["the weights are INT8 already: int4 adds its own error to theirs"]


@needs_native
def test_what_was_quantized_before_is_taken_and_answers_alike(folder: Path) -> None:
    fresh = load(folder, quantize="int4").logits(PROMPT)
    kept = quantized(folder, "int4")
    model = load(folder, quantize="int4")
    assert model.path == kept
    assert torch.equal(model.logits(PROMPT), fresh)


@needs_native
def test_a_quantized_folder_runs_in_its_own_form(folder: Path, tmp_path: Path) -> None:
    assert load(quantized(folder, "int4", tmp_path / "four")).quantize == "int4"


def test_bitsandbytes_runs_its_own_forms_only(folder: Path) -> None:
    with pytest.raises(UsageError, match="does not run int4"):
        load(folder, backend="bitsandbytes", quantize="int4")


def test_what_yarn_multiplies_queries_with_reaches_quantized_ones(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """As codes and scales, or unpacked before: the same model."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}
    folder = tiny_llama(rope_parameters=rope | {"original_max_position_embeddings": 128})
    small = quantized(folder, "int8", tmp_path / "small")
    how = {"backend": "reference", "dtype": "float32", "kv_cache": "f32"}
    coded, unpacked = (
        load(small, quantize=form, **how).logits(PROMPT) for form in ("int8", "none")
    )
    assert (coded - unpacked).abs().max() < 1e-5 * unpacked.abs().max()
