"""A long conversation on a real engine: each prompt is a cold rendering's, and only news is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import llamachat
from llamachat.chat.builtin import template_for
from llamachat.chat.events import Done, Event, Prefill
from llamachat.chat.options import Options, Said
from llamachat.chat.session import ChatSession
from llamachat.chat.templates import JinjaTemplate, Message
from llamachat.engine.engine import Engine

START, END = 256, 257  # of the tiny models, whose other ids are bytes
OTHER = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
OPTIONS = Options(Said(temperature=1.0, top_p=0.95, seed=5))


Encode = Callable[[str], list[int]]


def said(message: Message, encode: Encode) -> list[int]:
    return encode(message.content) if message.ids is None else list(message.ids)


def chatml(messages: Sequence[Message], encode: Encode) -> list[int]:
    """What a reply to these is generated after."""
    ids: list[int] = []
    for message in messages:
        ids += [START, *encode(f"{message.role}\n"), *said(message, encode), END, *encode("\n")]
    return [*ids, START, *encode("assistant\n")]


def bracketed(messages: Sequence[Message], encode: Encode) -> list[int]:
    ids: list[int] = []
    for message in messages:
        ids += [*encode(f"[{message.role}] "), *said(message, encode), END]
    return [*ids, *encode("[assistant] ")]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    return same.index(False) if False in same else len(same)


@dataclass
class Checked:
    """Runs replies, and holds each prompt against a cold rendering."""

    chat: ChatSession
    cold: Callable[[Sequence[Message]], list[int]]

    def run(self, ask: Callable[[], Iterator[Event]], begun: int = 0) -> int:
        """Returns how many tokens were prefilled; `begun`: ids of the reply that were there."""
        engine = self.chat.model.engine
        assert isinstance(engine, Engine)
        before = engine.held
        events = list(ask())
        done = events[-1]
        assert isinstance(done, Done)
        prompt = engine.held[: done.prompt_tokens]
        ids = self.chat.messages[-1].ids
        assert ids is not None
        assert list(prompt) == [*self.cold(self.chat.messages[:-1]), *ids[:begun]]
        prefilled = max(event.done for event in events if isinstance(event, Prefill))
        assert prefilled == len(prompt) - min(common(before, prompt), len(prompt) - 1)
        return prefilled


@pytest.fixture(scope="module")
def models(tiny_llama: Callable[..., Path]) -> list[llamachat.Model]:
    return [
        llamachat.load(
            tiny_llama(max_position_embeddings=4096, num_hidden_layers=layers),
            dtype="float32",
            threads=1,
        )
        for layers in (2, 1)
    ]


def converse(talk: Checked, switch: Callable[[], None]) -> None:
    """Thirty turns with undo, other draws, edits, a switch of the model and a system message."""
    chat = talk.chat
    question = "Who, Wörld?"
    for turn in range(30):
        prefilled = talk.run(lambda turn=turn: chat.send(f"{question} {turn}"))
        assert turn in (0, 21, 25) or prefilled < 60
        if turn in (4, 11):
            assert talk.run(chat.regenerate) == 1
        elif turn == 7:
            kept = chat.messages
            talk.run(lambda: chat.send("and then?"))
            assert chat.undo() == 1
            assert chat.messages == kept
        elif turn == 13:
            assert talk.run(lambda: chat.edit("Who, really?")) < 40
        elif turn == 16:
            chat.edit_reply("I said so.")
        elif turn == 18:
            before = chat.messages[-1].ids
            assert before is not None
            chat.max_new_tokens = 20
            assert talk.run(chat.continue_, begun=len(before)) == 1
            chat.max_new_tokens = 12
        elif turn == 20:
            switch()
            assert all(message.ids is None for message in chat.messages)
        elif turn == 24:
            chat.system = "Be long."
    assert chat.turns == 30
    assert chat.undo(99) > 30
    assert chat.messages == (Message("system", "Be brief."),)


def test_thirty_turns_with_changes_run_only_what_is_new(models: list[llamachat.Model]) -> None:
    first, second = models
    chat = ChatSession(first, system="Be brief.", options=OPTIONS, max_new_tokens=12)
    encode = first.tokenizer.encode
    talk = Checked(chat, lambda messages: chatml(messages, encode))

    def switch() -> None:
        chat.use(second, JinjaTemplate(OTHER, second.tokenizer), OPTIONS)
        talk.cold = lambda messages: bracketed(messages, encode)

    converse(talk, switch)


@pytest.mark.network
@pytest.mark.slow
def test_thirty_turns_of_the_default_model_run_only_what_is_new() -> None:
    model = llamachat.load(ctx_size=4096)
    chat = ChatSession(model, system="Be brief.", options=OPTIONS, max_new_tokens=12)

    def cold(messages: Sequence[Message]) -> list[int]:
        return ChatSession(model, template=chat.template, messages=messages).prompt_ids

    def switch() -> None:
        chat.use(model, template_for(None, model.tokenizer, asked="zephyr"), OPTIONS)

    converse(Checked(chat, cold), switch)


def test_a_prefill_that_is_interrupted_is_not_run_again(
    models: list[llamachat.Model],
) -> None:
    chat = ChatSession(models[0], options=OPTIONS, max_new_tokens=4)
    question = "word " * 160  # four passes
    events = chat.send(question)
    run = next(event for event in events if isinstance(event, Prefill) and event.done == 512)
    *_, ended = [events.throw(KeyboardInterrupt()), *events]
    assert isinstance(ended, Done)
    assert chat.messages == ()
    again = [event for event in chat.send(question) if isinstance(event, Prefill)]
    assert again[0].reused == run.reused + 512


@pytest.mark.parametrize("how", ["regen", "continue", "branch"])
def test_undo_brings_back_what_a_reply_was_and_runs_nothing(
    models: list[llamachat.Model], how: str
) -> None:
    chat = ChatSession(models[0], options=OPTIONS, max_new_tokens=8, logprobs=2)
    list(chat.send("Why?"))
    before, spoken = chat.messages, chat.spoken
    assert spoken is not None
    known = spoken.tokens[2].probabilities
    assert known is not None
    other = next(one.id for one in known.top if one.id not in (spoken.ids[2], END))
    asks: dict[str, Callable[[], Iterator[Event]]] = {
        "regen": chat.regenerate,
        "continue": chat.continue_,
        "branch": lambda: chat.branch(2, other),
    }
    list(asks[how]())
    assert chat.messages != before
    held = models[0].engine.held
    assert chat.undo() == 1
    assert (chat.messages, chat.spoken) == (before, spoken)
    assert models[0].engine.held == held


def test_a_reply_that_is_back_after_undo_goes_on_as_the_draw_that_it_was(
    models: list[llamachat.Model],
) -> None:
    def chat() -> ChatSession:
        chat = ChatSession(models[0], options=OPTIONS, max_new_tokens=6)
        list(chat.send("Why?"))
        return chat

    straight, back = chat(), chat()
    list(back.regenerate())
    back.undo()
    for one in (straight, back):
        list(one.continue_())
    assert back.messages == straight.messages


def test_a_sentencepiece_model_runs_only_what_is_new_over_a_change_of_template(data: Path) -> None:
    model = llamachat.load(data / "models" / "stories260K" / "stories260K.gguf", threads=1)
    vicuna, alpaca = (
        template_for(None, model.tokenizer, asked=name) for name in ("vicuna", "alpaca")
    )
    greedy = Options(Said(strategy="greedy"))
    chat = ChatSession(model, template=vicuna, options=greedy, max_new_tokens=6)

    def asked(question: str) -> tuple[int, int]:
        """How many tokens were run, and how many the prompt has."""
        *events, done = chat.send(question)
        assert isinstance(done, Done)
        fresh = ChatSession(model, template=chat.template, messages=chat.messages[:-1])
        assert model.engine.held[: done.prompt_tokens] == tuple(fresh.prompt_ids)
        return max(e.done for e in events if isinstance(e, Prefill)), done.prompt_tokens

    asked("Where is Tom?")
    assert all(asked("And Lily?")[0] < 40 for _ in range(3))
    chat.use(model, alpaca, greedy)
    assert all(message.ids is None for message in chat.messages)
    run, prompt = asked("And the dog?")
    assert run > prompt - 3
    assert asked("And the cat?")[0] < 40
