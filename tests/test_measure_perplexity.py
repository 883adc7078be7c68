"""Perplexity, on models small enough to reckon by hand, and the default model's own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from scripted import Bytes
from torch import Tensor

import llamachat
from llamachat.checkpoints import open_checkpoint
from llamachat.errors import DamagedFileError, UsageError
from llamachat.measure.evaluate import Figures, evaluate, windows

# A window takes each side a second or more; 20 are the figure to compare with.
N_WINDOWS = int(os.environ.get("LLAMACHAT_TEST_WINDOWS", "2"))


@dataclass(frozen=True)
class Counting:
    """Says of every next token how likely it is by the token itself: 2^-(1 + id)."""

    def iter_logits(self, ids: Sequence[int], first: int = 0) -> Iterator[Tensor]:
        halves = -math.log(2) * torch.arange(1, 41, dtype=torch.float32)
        yield halves.repeat(len(ids) - first, 1)


def scored(*windows: Sequence[int]) -> Figures:
    *_, figures = evaluate(Counting(), windows)
    return figures


def test_only_the_second_half_of_each_window_is_scored() -> None:
    """Of 8 tokens the last 3: the logits of tokens 4 to 6 say what 5 to 7 are."""
    found = scored([9, 9, 9, 9, 9, 1, 2, 3], [9, 9, 9, 9, 9, 0, 0, 4])
    bits = np.array([2, 3, 4, 1, 1, 5])
    assert found.tokens == 6
    assert found.perplexity.value == pytest.approx(2 ** bits.mean(), rel=1e-6)


def test_figures_after_each_window_are_those_of_all_so_far() -> None:
    text = [[9, 9, 9, 9, token, 3] for token in (1, 2, 3)]
    assert list(evaluate(Counting(), text)) == [scored(*text[:n]) for n in (1, 2, 3)]


def test_the_standard_error_is_that_of_llama_cpp() -> None:
    """tools/perplexity/perplexity.cpp: sqrt((E[l^2] - E[l]^2) / (n - 1)) times the perplexity."""
    found = scored([9, 9, 9, 9, 9, 1, 2, 3])
    losses = math.log(2) * np.array([2, 3, 4])
    error = math.sqrt((np.mean(losses**2) - np.mean(losses) ** 2) / 2) * math.exp(losses.mean())
    assert found.perplexity.stderr == pytest.approx(error, rel=1e-6)


def test_a_single_token_has_no_standard_error() -> None:
    found = scored([9, 9, 2])
    assert (found.perplexity.value, found.tokens) == (pytest.approx(8), 1)
    assert math.isnan(found.perplexity.stderr)


def test_damaged_weights_are_told() -> None:
    class Damaged(Counting):
        def iter_logits(self, ids: Sequence[int], first: int = 0) -> Iterator[Tensor]:
            return (logits * math.nan for logits in super().iter_logits(ids, first))

    with pytest.raises(DamagedFileError, match="not numbers"):
        next(evaluate(Damaged(), [[1] * 8]))


def test_windows_follow_one_another_and_a_rest_is_left_out() -> None:
    assert windows(Bytes(), "abcdefghijk", size=4) == [list(b"abcd"), list(b"efgh")]


def test_a_text_of_whole_windows_is_used_to_its_end() -> None:
    assert windows(Bytes(), "abcdefgh", size=4) == [list(b"abcd"), list(b"efgh")]


def test_bos_begins_the_text_and_takes_the_place_of_each_window_s_first_token() -> None:
    """As in llama.cpp: the text's first token is kept, that of the next window is not."""
    found = windows(Bytes(bos_id=0, add_bos=True), "abcdefghi", size=4)
    assert found == [[0, *b"abc"], [0, *b"efg"]]


def test_no_more_windows_are_cut_than_were_asked_for() -> None:
    assert len(windows(Bytes(), 40 * "a", size=4, at_most=3)) == 3
    assert len(windows(Bytes(), 40 * "a", size=4, at_most=99)) == 10


@pytest.mark.parametrize(
    ("n_tokens", "settings", "named"),
    [
        (7, {"size": 8}, "7 tokens, expected a window of 8"),
        (9, {"size": 2}, "window of 2 .* expected 3"),
        (9, {"size": 4, "at_most": 0}, "0 windows"),
    ],
)
def test_nothing_to_score_is_refused(n_tokens: int, settings: dict[str, int], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        windows(Bytes(), "a" * n_tokens, **settings)


def reference_losses(logits: Callable[[list[int]], Tensor], text: list[int], n: int) -> np.ndarray:
    """Second halves of n windows of 512, by numpy in float64."""
    losses = []
    for start in range(0, 512 * n, 512):
        ids = text[start : start + 512]
        scores = logits(ids).double().numpy()[256:511]
        norms = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
        losses.append(norms - scores[np.arange(255), ids[257:]])
    return np.concatenate(losses)


@pytest.mark.network
@pytest.mark.slow
def test_the_default_models_perplexity_is_that_of_transformers(data: Path) -> None:
    """On the same dequantized weights, on WikiText-2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = llamachat.load("smollm2-135m", backend="reference", dtype="float32", ctx_size=512)
    config = model.config
    shape = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, head_dim=config.head_dim,
        intermediate_size=config.hidden_dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tied,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )  # fmt: skip
    theirs = LlamaForCausalLM(shape)
    weights = {
        name: tensor if isinstance(tensor, Tensor) else tensor.dequantize()
        for name, tensor in open_checkpoint(model.located.path).tensors()
    }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied

    def their_logits(ids: list[int]) -> Tensor:
        with torch.inference_mode():
            return theirs(torch.tensor([ids])).logits[0]

    text = (data / "text" / "wiki.test.raw").read_text("utf-8")
    assert not model.tokenizer.add_bos
    *_, found = evaluate(model, windows(model.tokenizer, text, at_most=N_WINDOWS))
    losses = reference_losses(their_logits, model.tokenizer.encode(text), N_WINDOWS)
    assert found.tokens == 255 * N_WINDOWS
    assert found.perplexity.value == pytest.approx(math.exp(losses.mean()), rel=1e-5)
