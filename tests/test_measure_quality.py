"""How far native kernels are from the reference on the default model, and how that is reckoned."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import llamachat
from llamachat.chat.templates import Message, encode, template_of
from llamachat.errors import DamagedFileError, UsageError
from llamachat.kernels.backends import choose
from llamachat.loading import Model
from llamachat.measure.evaluate import Divergence, divergence

# 40 windows, and with them all 80 questions, are the figures to report.
N_WINDOWS = int(os.environ.get("LLAMACHAT_TEST_WINDOWS", "2"))
N_QUESTIONS = 4 * N_WINDOWS
REPLY_TOKENS = 32


@dataclass
class Says:
    """A model of three words that looks at the last one only: rows of `chances` by word."""

    chances: Sequence[Sequence[float]]

    @property
    def tokenizer(self) -> Any:
        return SimpleNamespace(add_bos=False, bos_id=None)

    def logits(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(self.chances).log()[list(ids)] + 5.0


HALF, QUARTER, FLAT = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25), (0.25, 0.25, 0.5)
EVEN = Says([HALF, HALF, HALF])
# After word 0 as EVEN says; after the others half and a quarter change places.
ODD = Says([HALF, QUARTER, FLAT])
SWAPPED = 0.25 * math.log(2)  # (1/2 - 1/4) log (1/2 : 1/4)


def test_divergence_is_that_of_the_scored_halves() -> None:
    """Of 8 tokens the words 5 to 7 are scored, as what follows the words 4 to 6."""
    windows = [2, 2, 2, 2, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]
    found = divergence(ODD, EVEN, [*windows[0], *windows[1]], window=8)
    assert found.top1_agreement == pytest.approx(5 / 6)
    assert found.kl.mean == pytest.approx(SWAPPED / 6)
    assert (found.kl.median, found.kl.max) == pytest.approx((0, SWAPPED), abs=1e-6)


def test_divergence_is_from_the_reference_s_point_of_view() -> None:
    sure, torn = Says([(0.98, 0.01, 0.01)]), Says([(0.5, 0.25, 0.25)])
    found = divergence(sure, torn, [0] * 8, window=8)
    assert found.kl.mean == pytest.approx(0.5 * math.log(0.5 / 0.98) + 0.5 * math.log(25))


def test_divergence_tells_both_perplexities() -> None:
    found = divergence(ODD, EVEN, [2, 2, 2, 2, 2, 1, 0, 2], window=8)
    assert found.perplexity.perplexity == pytest.approx(4)
    assert found.reference.perplexity == pytest.approx(2 ** (5 / 3))
    assert found.perplexity.tokens == found.reference.tokens == 3


def test_the_99th_percentile_lies_between_the_two_figures_around_it() -> None:
    """Only the last of 51 is not 0, and 99 % of the way from the first is between the last two."""
    text = [0] * 53 + [1] + [0] * 50
    found = divergence(ODD, EVEN, text, window=104)
    assert found.perplexity.tokens == 51
    assert found.kl.p99 == pytest.approx(SWAPPED / 2)


def test_models_of_different_vocabularies_are_not_compared() -> None:
    with pytest.raises(UsageError, match="model knows 3 ids, the reference 2"):
        divergence(EVEN, Says([(0.5, 0.5)]), [0] * 8, window=8)


@pytest.mark.parametrize("damaged", ["model", "reference"])
def test_a_damaged_model_is_not_compared(damaged: str) -> None:
    models = {"model": EVEN, "reference": EVEN} | {damaged: Says([(math.nan,) * 3])}
    with pytest.raises(DamagedFileError, match="not numbers"):
        divergence(text_ids=[0] * 8, window=8, **models)


def default_model(**settings: str) -> Model:
    return llamachat.load("smollm2-135m", ctx_size=1024, **settings)


@pytest.fixture(scope="module", params=["auto", "int8"])
def packed(request: pytest.FixtureRequest) -> Model:
    """The default model as people run it, with one of its forms of the cache."""
    if choose().missing:
        pytest.skip(f"no native kernels: {choose().missing}")
    return default_model(backend="native", kv_cache=request.param)


@pytest.fixture(scope="module")
def reference() -> Model:
    return default_model(backend="reference", dtype="float32")


@pytest.fixture(scope="module")
def on_wikitext(packed: Model, reference: Model, data: Path) -> Divergence:
    text = reference.tokenizer.encode((data / "text" / "wiki.test.raw").read_text("utf-8"))
    return divergence(packed, reference, text, windows=N_WINDOWS)


@pytest.mark.network
@pytest.mark.slow
def test_native_kernels_keep_the_default_model_s_perplexity(on_wikitext: Divergence) -> None:
    kept = on_wikitext.reference.perplexity
    assert on_wikitext.perplexity.perplexity == pytest.approx(kept, rel=0.01)


@pytest.mark.network
@pytest.mark.slow
def test_native_kernels_keep_the_default_model_s_predictions(on_wikitext: Divergence) -> None:
    assert on_wikitext.kl.mean < 0.01


@pytest.mark.network
@pytest.mark.slow
def test_native_kernels_choose_what_the_reference_chooses(
    packed: Model, reference: Model, data: Path
) -> None:
    """Teacher forcing: both read MT-bench's first questions, each with one and the same answer.

    It is the beginning of the native model's own: that costs a sixth of the reference's, and the
    two are asked for their next token at every position of it, whatever came before.
    """
    n_agreed = n_tokens = 0
    for prompt in questions(packed, data):
        reply = list(packed.generate(prompt, max_new_tokens=REPLY_TOKENS, stop_ids=()))
        found, expected = (m.logits(prompt + reply).argmax(-1) for m in (packed, reference))
        n_agreed += int((found == expected).sum())
        n_tokens += len(found)
    assert n_agreed / n_tokens >= 0.97


def questions(model: Model, data: Path) -> Iterator[list[int]]:
    """First turns as prompts of a new conversation."""
    template = template_of(model.chat_template, model.tokenizer)
    lines = (data / "prompts" / "mt_bench_question.jsonl").read_text("utf-8").splitlines()
    for line in lines[:N_QUESTIONS]:
        message = Message("user", json.loads(line)["turns"][0])
        yield encode(template.segments([message]), model.tokenizer)
