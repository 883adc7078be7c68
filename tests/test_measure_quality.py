"""How far native kernels are from the reference on the default model, and how that is reckoned."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llamachat
from llamachat import hardware
from llamachat.chat.builtin import template_for
from llamachat.chat.templates import Message, encode
from llamachat.errors import DamagedFileError, UsageError
from llamachat.kernels.backends import choose
from llamachat.loading import Model
from llamachat.measure.evaluate import Divergence, Figures, Scores, evaluate, windows

# 40 windows, and with them all 80 questions, are the figures to report.
N_WINDOWS = int(os.environ.get("LLAMACHAT_TEST_WINDOWS", "2"))
N_QUESTIONS = 4 * N_WINDOWS


@dataclass
class Says:
    """A model of three words that looks at the last one only: rows of `chances` by word."""

    chances: Sequence[Sequence[float]]

    def iter_logits(self, ids: Sequence[int], first: int = 0) -> Iterator[Tensor]:
        logits = torch.tensor(self.chances).log()[list(ids)] + 5.0
        yield from logits[first:].split(2)  # as passes end somewhere, too


HALF, QUARTER, FLAT = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25), (0.25, 0.25, 0.5)
EVEN = Says([HALF, HALF, HALF])
# After word 0 as EVEN says; after the others half and a quarter change places.
ODD = Says([HALF, QUARTER, FLAT])
SWAPPED = 0.25 * math.log(2)  # (1/2 - 1/4) log (1/2 : 1/4)


def compared(model: Scores, reference: Scores, *windows: list[int]) -> Divergence:
    *_, figures = evaluate(model, windows, reference=reference)
    assert figures.divergence is not None
    return figures.divergence


def test_divergence_is_that_of_the_scored_halves() -> None:
    """Of 8 tokens the words 5 to 7 are scored, as what follows the words 4 to 6."""
    found = compared(ODD, EVEN, [2, 2, 2, 2, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0])
    assert found.top1_agreement == pytest.approx(5 / 6)
    assert found.kl.mean == pytest.approx(SWAPPED / 6)
    assert (found.kl.median, found.kl.max) == pytest.approx((0, SWAPPED), abs=1e-6)


def test_divergence_is_from_the_reference_s_point_of_view() -> None:
    sure, torn = Says([(0.98, 0.01, 0.01)]), Says([(0.5, 0.25, 0.25)])
    found = compared(sure, torn, [0] * 8)
    assert found.kl.mean == pytest.approx(0.5 * math.log(0.5 / 0.98) + 0.5 * math.log(25))


def test_the_mean_divergence_has_a_standard_error() -> None:
    """Of one figure that is not zero among six: its share of the mean varies by sqrt(1/6)."""
    found = compared(ODD, EVEN, [2, 2, 2, 2, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0])
    figures = np.array([0, 0, SWAPPED, 0, 0, 0])
    assert found.kl.stderr == pytest.approx(figures.std(ddof=1) / math.sqrt(6), rel=1e-5)


def test_divergence_tells_both_perplexities() -> None:
    *_, found = evaluate(ODD, [[2, 2, 2, 2, 2, 1, 0, 0]], reference=EVEN)
    assert found.divergence is not None
    assert found.perplexity.value == pytest.approx(2 ** (5 / 3))
    assert found.divergence.reference.value == pytest.approx(2 ** (4 / 3))
    assert found.divergence.ratio.value == pytest.approx(2 ** (1 / 3))


def test_the_ratio_is_surer_than_either_perplexity() -> None:
    """Where a model is always half as sure as the reference, the ratio is 2 without an error."""
    text = [0, 0, 0, 0, 0, 1, 0, 1]
    reference = Says([(0.5, 0.25, 0.25)] * 3)
    model = Says([(0.25, 0.125, 0.625)] * 3)
    found = compared(model, reference, text)
    assert found.reference.stderr > 0.1
    assert (found.ratio.value, found.ratio.stderr) == pytest.approx((2, 0), abs=1e-6)


def test_changes_of_the_right_token_s_probability_are_told_in_percent() -> None:
    """By a quarter up, by a quarter down, and not at all: as llama-perplexity's "RMS Δp"."""
    found = compared(ODD, EVEN, [2, 2, 2, 2, 1, 1, 0, 0])  # after 1 comes 1, after 1 0, after 0 0
    assert found.rms_dp_percent == pytest.approx(100 * 0.25 * math.sqrt(2 / 3))


def test_the_99th_percentile_lies_between_the_two_figures_around_it() -> None:
    """Only the last of 51 is not 0, and 99 % of the way from the first is between the last two."""
    found = compared(ODD, EVEN, [0] * 53 + [0] * 49 + [1, 0])
    assert found.kl.p99 == pytest.approx(SWAPPED / 2)


def test_a_vocabulary_that_is_worked_on_in_pieces_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = [2, 2, 2, 2, 2, 2, 2, 2, 2, 0, 1, 0, 1, 2, 1, 0, 2]
    whole = compared(ODD, EVEN, text)
    monkeypatch.setattr("llamachat.measure.evaluate.BLOCK", 1)  # a row at a time
    assert compared(ODD, EVEN, text) == whole


def test_models_of_different_vocabularies_are_not_compared() -> None:
    with pytest.raises(UsageError, match="model knows 3 ids, the reference 2"):
        compared(EVEN, Says([(0.5, 0.5)]), [0] * 8)


@pytest.mark.parametrize("damaged", ["model", "reference"])
def test_a_damaged_model_is_not_compared(damaged: str) -> None:
    models = {"model": EVEN, "reference": EVEN} | {damaged: Says([(math.nan,) * 3])}
    with pytest.raises(DamagedFileError, match="not numbers"):
        compared(models["model"], models["reference"], [0] * 8)


# Which share of next tokens is the reference's. Near ties are many in so small a model: 8-bit keys
# and values alone make the reference itself choose 2.7 % otherwise, and bfloat16 weights 3.5 %.
LEAST_AGREEMENT = {"auto": 0.97, "int8": 0.97 - 0.027}


@pytest.fixture(scope="module")
def packed() -> Callable[[str], Model]:
    """Gives the default model as people run it, with a form of the cache."""
    if missing := choose().missing:
        pytest.skip(f"no native kernels: {missing}")

    def load(form: str) -> Model:
        model = default_model(backend="native", kv_cache=form)
        torch.set_num_threads(hardware.usable_cores())  # for the reference, which takes turns
        return model

    return cache(load)


@pytest.fixture(scope="module")
def reference() -> Model:
    return default_model(backend="reference", dtype="float32")


def default_model(**settings: Any) -> Model:
    return llamachat.load("smollm2-135m", ctx_size=1024, **settings)


@pytest.fixture(scope="module", params=["auto", "int8"])
def on_wikitext(
    request: pytest.FixtureRequest, packed: Callable[[str], Model], reference: Model, data: Path
) -> Figures:
    text = (data / "text" / "wiki.test.raw").read_text("utf-8")
    chunks = windows(reference.tokenizer, text, at_most=N_WINDOWS)
    *_, figures = evaluate(packed(request.param), chunks, reference=reference)
    return figures


@pytest.mark.network
@pytest.mark.slow
def test_native_kernels_keep_the_default_model_s_perplexity(on_wikitext: Figures) -> None:
    """Within 1 %, and three standard errors: a token's losses differ by about sqrt(2 KL)."""
    assert on_wikitext.divergence is not None
    error = math.sqrt(2 * on_wikitext.divergence.kl.mean / on_wikitext.tokens)
    assert on_wikitext.divergence.ratio.value == pytest.approx(1, abs=0.01 + 3 * error)


@pytest.mark.network
@pytest.mark.slow
def test_native_kernels_keep_the_default_model_s_predictions(on_wikitext: Figures) -> None:
    assert on_wikitext.divergence is not None
    assert on_wikitext.divergence.kl.mean < 0.01


@pytest.fixture(scope="module")
def answers(
    packed: Callable[[str], Model], reference: Model, data: Path
) -> list[tuple[list[int], Tensor]]:
    """MT-bench's first questions, each with the beginning of an answer, and what follows.

    What follows: at each position (T,) the reference's best next id. The answer is the native
    model's: it is quicker, and all read the same text, whoever wrote it.
    """
    model = packed("auto")
    template = template_for(model.chat_template, model.tokenizer)
    texts = []
    for line in (data / "prompts" / "mt_bench_question.jsonl").read_text("utf-8").splitlines():
        question = Message("user", json.loads(line)["turns"][0])
        prompt = encode(template.segments([question]), model.tokenizer)
        texts.append([*prompt, *model.generate(prompt, max_new_tokens=32, stop_ids=())])
        if len(texts) == N_QUESTIONS:
            break
    return [(text, reference.logits(text).argmax(-1)) for text in texts]


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("form", LEAST_AGREEMENT)
def test_native_kernels_choose_what_the_reference_chooses(
    packed: Callable[[str], Model], answers: list[tuple[list[int], Tensor]], form: str
) -> None:
    """Teacher forcing, on chats; three standard errors are allowed for so few of them."""
    agrees = [packed(form).logits(text).argmax(-1) == following for text, following in answers]
    share, n_tokens = torch.cat(agrees).double().mean().item(), sum(map(len, agrees))
    least = LEAST_AGREEMENT[form]
    assert share > least - 3 * math.sqrt(least * (1 - least) / n_tokens)
