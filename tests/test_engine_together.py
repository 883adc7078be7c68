"""Ways to decode, together: beams, penalties, drafts, probabilities, loops, replies that go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import llamachat
from llamachat.engine.beam import Beam
from llamachat.engine.decoding import Decoding
from llamachat.engine.engine import Engine
from llamachat.engine.events import Done, EngineEvent, Tails, Token
from llamachat.engine.strategies import Greedy, Sample
from llamachat.errors import UsageError
from llamachat.model.decoder import Decoder

PROMPT = [5, 9, 17, 3, 33, 60, 2, 41] * 2
N_NEW = 16
STOPS = frozenset({7, 84, 135, 200, 241})
PENALTIES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.6},
    "n-grams": {"no_repeat_ngram_size": 2},
    "both": {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
}
SAMPLED = Sample(temperature=0.2, top_p=1, seed=2, repetition_penalty=1.05, presence_penalty=0.1)
COUNTED = Greedy(frequency_penalty=0.4, presence_penalty=0.3)


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    settings = {"quantize": "none", "dtype": "float32", "backend": "reference", "threads": 1}
    return llamachat.load(folder, **settings).engine.decoder  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def events(
    decoder: Decoder, decoding: Decoding, ids: Sequence[int] = PROMPT, **changes: Any
) -> list[EngineEvent]:
    usual: dict[str, Any] = {"max_new_tokens": N_NEW, "stop_ids": frozenset()}
    return list(Engine(decoder, ctx_size=256).generate(ids, decoding, **(usual | changes)))


def reply(*arguments: Any, **changes: Any) -> list[int]:
    return [event.id for event in events(*arguments, **changes) if isinstance(event, Token)]


def expected(oracle: Any, ids: Sequence[int] = PROMPT, **flags: Any) -> list[int]:
    """Ids that transformers finds, without what ends them; `STOPS` end them unless told."""
    prompt = torch.tensor([ids])
    found = oracle.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
        pad_token_id=0, **({"eos_token_id": list(STOPS), "max_new_tokens": N_NEW} | flags),
    )  # fmt: skip
    new: list[int] = found[0, len(ids) :].tolist()
    return new[:-1] if new[-1] in (flags.get("eos_token_id", STOPS) or ()) else new


@pytest.mark.parametrize("width", [2, 5])
@pytest.mark.parametrize("penalties", PENALTIES.values(), ids=PENALTIES)
def test_penalties_look_at_the_ids_of_each_beam(
    decoder: Decoder, oracle: Any, width: int, penalties: dict[str, Any]
) -> None:
    def found(**given: Any) -> list[int]:
        return reply(decoder, Beam(width, **given), max_new_tokens=60)

    assert found(**penalties) != found()
    wanted = expected(oracle, num_beams=width, max_new_tokens=60, eos_token_id=None, **penalties)
    assert found(**penalties) == wanted


def test_banned_words_and_biases_are_those_of_transformers(decoder: Decoder, oracle: Any) -> None:
    first, second, *_ = reply(decoder, Beam(3))
    words, bias = ((second,), (first, 7)), ((first, 2.5), (11, 4.0))
    found = reply(decoder, Beam(3, bad_words=words, logit_bias=bias), stop_ids=STOPS)
    assert found == expected(
        oracle,
        num_beams=3,
        bad_words_ids=[list(word) for word in words],
        sequence_bias=[[[token], value] for token, value in bias],
    )


def test_drawn_beams_draw_from_what_the_penalties_leave(decoder: Decoder) -> None:
    plain = Beam(4, sampling=Sample(temperature=0.5, top_k=2, top_p=1, seed=3))
    banned = tuple((token,) for token in set(reply(decoder, plain)))
    free = reply(decoder, Beam(4, sampling=plain.sampling, bad_words=banned))
    assert len(free) == N_NEW
    assert not set(free) & {token for (token,) in banned}


def test_one_beam_has_the_penalties_of_greedy(decoder: Decoder) -> None:
    penalties = PENALTIES["both"]
    assert reply(decoder, Beam(1, **penalties)) == reply(decoder, Greedy(**penalties))


@pytest.mark.parametrize("sampling", [Sample(temperature=0), Sample(repetition_penalty=2)])
def test_sampling_that_beams_would_ignore_is_refused(sampling: Sample) -> None:
    with pytest.raises(UsageError, match="sampling of beams"):
        Beam(4, sampling=sampling)


@pytest.mark.parametrize("cut", [1, 9])
@pytest.mark.parametrize("length_penalty", [-1.0, 2.0])
def test_beams_go_on_with_a_reply_as_with_any_text(
    decoder: Decoder, cut: int, length_penalty: float
) -> None:
    beams = Beam(4, length_penalty, "never")
    text = [*PROMPT, *reply(decoder, beams)[:cut]]
    found = events(decoder, beams, text, continued=cut, stop_ids=STOPS)
    assert found == events(decoder, beams, text, stop_ids=STOPS)  # with the scores of open beams
    assert any(isinstance(event, Tails) for event in found)


@pytest.mark.parametrize("decoding", [COUNTED, SAMPLED, Beam(1, frequency_penalty=0.4)])
@pytest.mark.parametrize("cut", [1, 11])
def test_penalties_count_what_a_reply_began_with(
    decoder: Decoder, decoding: Decoding, cut: int
) -> None:
    whole = reply(decoder, decoding)
    rest = reply(
        decoder, decoding, [*PROMPT, *whole[:cut]], continued=cut, max_new_tokens=N_NEW - cut
    )
    assert rest == whole[cut:]


def test_beams_that_go_on_count_what_the_reply_began_with(decoder: Decoder) -> None:
    begun = reply(decoder, Beam(3))[:5]
    banned = Beam(3, frequency_penalty=1e4)
    found = reply(decoder, banned, [*PROMPT, *begun], continued=len(begun))
    assert not set(found) & set(begun)


@pytest.mark.parametrize(
    "decoding",
    [Greedy(repetition_penalty=1.02), Sample(temperature=0.1, presence_penalty=0.01, seed=2)],
)
def test_drafts_change_neither_ids_nor_probabilities(
    exact_decoder: Decoder, decoding: Decoding
) -> None:
    settings: dict[str, Any] = {"logprobs": 3, "max_new_tokens": 40}
    *plain, _ = events(exact_decoder, decoding, **settings)
    *drafted, done = events(exact_decoder, decoding, draft=8, **settings)
    assert drafted == plain
    assert isinstance(done, Done)
    assert done.speculation is not None
    assert done.speculation.accepted > 0


def test_beams_that_agree_on_a_loop_are_ended(random_decoder: Callable[..., Decoder]) -> None:
    whole = reply(random_decoder(), Beam(2), max_new_tokens=200)
    *tokens, done = events(random_decoder(), Beam(2), max_new_tokens=200, stop_loops=2)
    ids = [event.id for event in tokens if isinstance(event, Token)]
    assert done == Done("loop")
    assert ids == whole[: len(ids)]
    assert len(ids) < len(whole)


@pytest.mark.parametrize(("name", "flag"), [("draft", "--speculate"), ("logprobs", "--logprobs")])
def test_what_only_one_row_can_have_is_refused_for_beams(
    decoder: Decoder, name: str, flag: str
) -> None:
    with pytest.raises(UsageError, match=f"{flag}.*--num-beams"):
        events(decoder, Beam(2), **{name: 3})
    assert len(reply(decoder, Beam(1), **{name: 3})) == N_NEW
