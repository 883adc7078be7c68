"""What `eval` is asked to measure, and what is required of a result."""

from __future__ import annotations

from typing import Any

import pytest

from llamachat.errors import CheckFailedError, UsageError
from llamachat.measure.request import Request, requirement

RESULT: dict[str, Any] = {
    "perplexity": 24.0, "stderr": 0.5, "size_bytes": 1000, "bits_per_weight": 4.5,
    "perplexity_ratio": {"value": 1.02, "stderr": 0.001},
    "kl": {"mean": 0.02, "stderr": None, "median": 0.01, "p99": 0.1, "max": 0.4},
    "rms_dp_percent": 3.0, "top1_agreement": 0.9,
}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "perplexity<24.5", "perplexity<=24", "perplexity>=24", "stderr < 1", "kl>1e-2",
        "kl.mean<.03", "kl.median<0.02", "kl.p99<0.2", "kl.max<5e-1", "rms_dp_percent<4",
        "top1>0.85", "perplexity_ratio<1.05", "size_bytes<=1000", "bits_per_weight<4.9",
    ],
)  # fmt: skip
def test_a_requirement_that_holds_is_silent(text: str) -> None:
    Request("m", against="none", required=(requirement(text),)).check(RESULT)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("perplexity<24", "perplexity is 24, required < 24"),
        ("perplexity>24", "perplexity is 24, required > 24"),
        ("kl<0.01", "kl is 0.02, required < 0.01"),
        ("top1>=0.95", "top1 is 0.9, required >= 0.95"),
        ("kl.stderr<1", "kl.stderr is unknown, required < 1"),
    ],
)
def test_a_requirement_that_is_missed_tells_both_numbers(text: str, said: str) -> None:
    with pytest.raises(CheckFailedError) as failure:
        Request("m", against="none", required=(requirement(text),)).check(RESULT)
    assert failure.value.message == said


def test_all_that_are_missed_are_told_at_once() -> None:
    required = tuple(map(requirement, ("kl<0.01", "top1>0.8", "stderr<0.1")))
    with pytest.raises(CheckFailedError, match=r"^kl is 0.02, .*; stderr is 0.5, required < 0.1$"):
        Request("m", against="none", required=required).check(RESULT)


@pytest.mark.parametrize("text", ["", "kl", "kl<", "kl=0.1", "<1", "kl<1.2.3", "kl<0.1; kl>0"])
def test_what_is_no_requirement_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected such as"):
        requirement(text)


def test_an_unknown_figure_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"'kl\.p98'") as failure:
        requirement("kl.p98<1")
    assert failure.value.hint is not None
    assert {"kl.p99,", "perplexity,", "top1,"} <= set(failure.value.hint.split())


def test_a_figure_of_a_comparison_needs_a_reference() -> None:
    with pytest.raises(UsageError, match=r"kl\.max needs --against"):
        Request("m", required=(requirement("kl.max<1"),))


def test_without_a_name_the_reference_is_the_model_itself() -> None:
    assert Request("m", against="none").reference == "m"
    assert Request("m", against="other").reference == "other"
    assert Request("m").reference is None
