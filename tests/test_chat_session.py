"""The conversation, on a scripted engine: what is remembered, shown, trimmed and dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from scripted import Bytes

from llamachat.chat.events import Done, Event, Prefill, Text, Trimmed
from llamachat.chat.options import Options, Said
from llamachat.chat.session import ChatSession
from llamachat.chat.templates import Message, Segment
from llamachat.engine import events as engine_events
from llamachat.engine.decoding import Decoding
from llamachat.errors import DamagedFileError, PromptTooLongError, UsageError

USER, ASSISTANT, END, SYSTEM = 256, 257, 258, 259
ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
SPECIALS = {"<user>": USER, "<assistant>": ASSISTANT, "<end>": END, "<system>": SYSTEM}
TOKENIZER = Bytes(vocab_size=260, stop_ids=frozenset({END}), specials=SPECIALS)


Script = Sequence[int] | BaseException


class Marked:
    """A template: each message between its role's mark and an end mark."""

    name = "marked"

    def __init__(self, *stops: str) -> None:
        self.stops = stops

    def segments(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        parts: list[Segment] = []
        for message in messages:
            content: Segment = message.content if message.ids is None else message.ids
            parts += [ROLES[message.role], content, END]
        return [part for part in [*parts, ASSISTANT] if part not in ("", ())]


@dataclass
class Scripted:
    """An engine that says what it is told to, and remembers what it was asked.

    A script has ids, and exceptions, which are raised.
    """

    scripts: list[Sequence[Script]]
    ctx_size: int = 1000
    prompts: list[list[int]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def generate(
        self,
        ids: Sequence[int],
        decoding: Decoding,
        *,
        ends: Callable[[Sequence[int]], bool] | None = None,
        **asked: Any,
    ) -> Iterator[engine_events.EngineEvent]:
        if len(ids) > self.ctx_size:
            raise PromptTooLongError("too long")
        self.prompts.append(list(ids))
        self.asked.append({"decoding": decoding, **asked})
        return self._events(len(ids), ends)

    def _events(
        self, n_prompt: int, ends: Callable[[Sequence[int]], bool] | None
    ) -> Iterator[engine_events.EngineEvent]:
        said: list[int] = []
        yield engine_events.Prefill(0, n_prompt - 1, reused=1)
        yield engine_events.Prefill(n_prompt - 1, n_prompt - 1, reused=1)
        for part in self.scripts.pop(0):
            if isinstance(part, BaseException):
                raise part
            for token in part:
                said.append(token)
                yield engine_events.Token(token)
                if ends is not None and ends(said):
                    yield engine_events.Done("stop")
                    return
        yield engine_events.Done("stop")


@dataclass
class Model:
    engine: Scripted
    tokenizer: Bytes = TOKENIZER
    chat_template: str | None = None
    sampling: tuple[tuple[str, Mapping[str, float]], ...] = ()


def session_of(*scripts: bytes | Sequence[Script], **settings: Any) -> ChatSession:
    ctx_size, tokenizer = settings.pop("ctx_size", 1000), settings.pop("tokenizer", TOKENIZER)
    parts = [[script] if isinstance(script, bytes) else script for script in scripts]
    model = Model(Scripted(parts, ctx_size), tokenizer)
    return ChatSession(model, template=Marked(), **settings)


def engine_of(session: ChatSession) -> Scripted:
    engine = session.model.engine
    assert isinstance(engine, Scripted)
    return engine


def run(events: Iterator[Event]) -> tuple[list[str], Done]:
    """The pieces of text, and how it ended."""
    *before, done = events
    return [event.text for event in before if isinstance(event, Text)], done


def turn(user: str, assistant: str) -> list[int]:
    return [USER, *user.encode(), END, ASSISTANT, *assistant.encode(), END]


def contents(session: ChatSession) -> list[str]:
    return [message.content for message in session.messages]


def test_every_turn_is_remembered() -> None:
    session = session_of(b"Hi.", b"Fine.")
    run(session.send("Hello"))
    run(session.send("How are you?"))
    question = [USER, *b"How are you?", END, ASSISTANT]
    assert engine_of(session).prompts[1] == turn("Hello", "Hi.") + question
    assert session.messages[1] == Message("assistant", "Hi.", tuple(b"Hi."))
    assert session.turns == 2


def test_the_system_message_comes_first_and_can_be_changed() -> None:
    session = session_of(b"a", b"b", b"c", system="Be brief.")
    run(session.send("1"))
    session.system = "Be long."
    run(session.send("2"))
    session.system = None
    run(session.send("3"))
    first, second, third = engine_of(session).prompts
    assert first == [SYSTEM, *b"Be brief.", END, USER, *b"1", END, ASSISTANT]
    assert second[:11] == [SYSTEM, *b"Be long.", END, USER]
    assert third[: len(turn("1", "a"))] == turn("1", "a")


def test_events_come_in_order_and_add_up() -> None:
    events = list(session_of(b"Hi").send("Hello"))
    assert events[:4] == [Prefill(0, 7, 1), Prefill(7, 7, 1), Text("H"), Text("i")]
    assert isinstance(events[4], Done)
    assert len(events) == 5


def test_done_tells_what_the_reply_was() -> None:
    _, done = run(session_of(b"Hi", options=Options(Said(temperature=0.5, seed=7))).send("Hello"))
    assert (done.text, done.finish_reason, done.token_ids) == ("Hi", "stop", tuple(b"Hi"))
    assert (done.prompt_tokens, done.reused_tokens, done.seed) == (8, 1, 7)
    told = {name: done.strategy[name] for name in ("name", "temperature", "top_k", "top_p")}
    assert told == {"name": "sample", "temperature": 0.5, "top_k": 0, "top_p": 0.9}
    assert done.trimmed == Trimmed(0, 0)


def test_what_beams_are_drawn_from_is_told_without_what_is_told_of_beams() -> None:
    options = Options(Said(strategy="beam:2", temperature=0.5, repetition_penalty=1.2, seed=7))
    _, done = run(session_of(b"Hi", options=options).send("Hello"))
    assert (done.seed, done.strategy["repetition_penalty"]) == (7, 1.2)
    assert done.strategy["sampling"]["temperature"] == 0.5
    assert not {"seed", "repetition_penalty"} & set(done.strategy["sampling"])


def test_bad_words_become_ids_with_and_without_a_space() -> None:
    session = session_of(b"Hi", options=Options(Said(strategy="greedy", bad_words=("no",))))
    _, done = run(session.send("Hello"))
    assert done.strategy["bad_words"] == (tuple(b"no"), tuple(b" no"))


def test_timings_follow_one_another() -> None:
    _, done = run(session_of(b"Hi there").send("Hello"))
    times = done.timings
    assert 0 < times.prefill_s <= times.ttft_s <= times.prefill_s + times.decode_s


def test_a_character_in_several_tokens_is_shown_whole() -> None:
    pieces, done = run(session_of("a€b".encode()).send("?"))
    assert pieces == ["a", "€", "b"]
    assert done.text == "a€b"


@pytest.mark.parametrize("end", [(), (KeyboardInterrupt(),)], ids=["end", "interrupt"])
def test_half_a_character_at_the_end_is_shown_as_such_and_kept_as_it_is(
    end: tuple[BaseException, ...],
) -> None:
    session = session_of([b"a\xe2\x82", *end], b"ok")
    pieces, done = run(session.send("?"))
    assert pieces == ["a", "�"]
    assert done.text == "a�"
    run(session.send("!"))
    assert engine_of(session).prompts[1][: 3 + 4] == [USER, *b"?", END, ASSISTANT, *b"a\xe2\x82"]


def test_a_stop_string_is_neither_shown_nor_kept() -> None:
    session = session_of(b"one. STOP two", b"ok", stop=["STOP"])
    pieces, done = run(session.send("?"))
    assert "".join(pieces) == done.text == "one. "
    assert done.finish_reason == "stop"
    assert session.messages[1] == Message("assistant", "one. ", None)
    assert done.token_ids == tuple(b"one. STOP")


def test_the_stop_strings_of_a_template_end_replies_beside_the_users() -> None:
    model = Model(Scripted([[b"one. ## two"], [b"three STOP"]], 1000))
    session = ChatSession(model, template=Marked("##"), stop=["STOP"])
    assert [run(session.send("?"))[1].text for _ in range(2)] == ["one. ", "three "]


def test_the_engine_is_told_where_a_stop_string_is_complete() -> None:
    """Tokens after it are not even asked for."""
    session = session_of(["a€€".encode(), AssertionError("asked too far")], stop=["€€"])
    assert run(session.send("?"))[1].text == "a"


def test_a_stop_string_is_found_across_tokens_that_say_nothing() -> None:
    reply = [b"one. ST", [USER] * 5, b"OP", AssertionError("asked too far")]
    assert run(session_of(reply, stop=["STOP"]).send("?"))[1].text == "one. "


def test_the_space_that_a_tokenizer_adds_is_no_part_of_a_stop_string() -> None:
    spaced = replace(TOKENIZER, space_prefix=True)
    session = session_of(b" STOP, and then STOP", stop=[" STOP"], tokenizer=spaced)
    assert run(session.send("?"))[1].text == "STOP, and then"


def test_what_only_looked_like_a_stop_string_is_shown() -> None:
    pieces, done = run(session_of(b"a ST", stop=["STOP"]).send("?"))
    assert "".join(pieces) == done.text == "a ST"


@pytest.mark.parametrize("n_shown", [1, 3])
def test_an_interrupted_reply_is_kept_as_far_as_it_came(n_shown: int) -> None:
    said = b"Hello"[:n_shown]
    session = session_of([said, KeyboardInterrupt()])
    pieces, done = run(session.send("?"))
    assert done.finish_reason == "interrupted"
    assert "".join(pieces) == done.text == said.decode()
    assert session.messages[1] == Message("assistant", said.decode(), tuple(said))


def test_a_closed_reply_is_kept_as_far_as_it_came() -> None:
    session = session_of(b"Hello")
    events = session.send("?")
    while not isinstance(next(events), Text):
        pass
    events.close()
    assert contents(session) == ["?", "H"]


@pytest.mark.parametrize("ask", [lambda s: s.send("?"), ChatSession.regenerate])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), DamagedFileError("not numbers")])
def test_without_a_token_of_answer_the_conversation_stays_as_it_was(
    ask: Callable[[ChatSession], Iterator[Event]], failure: BaseException
) -> None:
    session = session_of(b"Hi", [failure])
    run(session.send("Hello"))
    with suppress(DamagedFileError):  # an interrupt is told as Done
        list(ask(session))
    assert contents(session) == ["Hello", "Hi"]


def test_a_question_whose_reply_nobody_reads_is_not_asked() -> None:
    session = session_of(b"Hi")
    session.send("never read")
    session.send("closed").close()
    run(session.send("Hello"))
    assert contents(session) == ["Hello", "Hi"]


def test_an_empty_answer_is_an_answer() -> None:
    session = session_of(b"", b"Hi")
    _, done = run(session.send("?"))
    assert (done.text, done.finish_reason) == ("", "stop")
    assert contents(session) == ["?", ""]
    run(session.send("!"))
    assert engine_of(session).prompts[1][:5] == [USER, *b"?", END, ASSISTANT, END]


def test_a_prompt_that_is_too_long_leaves_the_conversation_as_it_was() -> None:
    session = session_of(b"Hi", b"ok", ctx_size=60, max_new_tokens=9)
    run(session.send("Hello"))
    with pytest.raises(PromptTooLongError):
        session.send("x" * 100)
    assert contents(session) == ["Hello", "Hi"]
    run(session.send("And?"))
    assert engine_of(session).asked[1]["max_new_tokens"] == 9
    assert engine_of(session).prompts[1] == [*turn("Hello", "Hi"), USER, *b"And?", END, 257]


def test_options_that_contradict_each_other_leave_the_conversation_as_it_was() -> None:
    session = session_of(b"Hi")
    run(session.send("Hello"))
    session.options = Options(Said(strategy="greedy", top_k=5))
    for ask in (lambda: session.send("?"), session.regenerate):
        with pytest.raises(UsageError):
            ask()
    assert contents(session) == ["Hello", "Hi"]


def test_regenerating_asks_the_same_question_for_another_draw() -> None:
    session = session_of(b"a", b"b", b"c", b"d")
    run(session.send("?"))
    run(session.regenerate())
    run(session.regenerate())
    run(session.send("!"))
    engine = engine_of(session)
    assert engine.prompts[0] == engine.prompts[1] == engine.prompts[2]
    assert [(asked["turn"], asked["attempt"]) for asked in engine.asked] == [
        (0, 0), (0, 1), (0, 2), (1, 0),
    ]  # fmt: skip
    assert len({asked["decoding"].seed for asked in engine.asked}) == 1
    assert contents(session) == ["?", "c", "!", "d"]


def test_regenerating_with_a_seed_draws_that_one() -> None:
    session = session_of(b"a", b"b", b"c")
    run(session.send("?"))
    run(session.regenerate())
    _, done = run(session.regenerate(seed=42))
    assert done.seed == 42
    assert engine_of(session).asked[2]["attempt"] == 0


def test_regenerating_answers_the_last_of_two_equal_questions() -> None:
    session = session_of(b"a", b"b", b"c")
    run(session.send("again"))
    run(session.send("again"))
    run(session.regenerate())
    assert contents(session) == ["again", "a", "again", "c"]


def test_without_a_question_there_is_nothing_to_regenerate() -> None:
    with pytest.raises(UsageError, match="no question"):
        session_of(system="Be brief.").regenerate()


def test_sessions_draw_seeds_of_their_own() -> None:
    seeds = {run(session_of(b"a").send("?"))[1].seed for _ in range(3)}
    assert len(seeds) == 3


def test_undo_takes_back_whole_turns() -> None:
    session = session_of(b"a", b"b", b"c", b"d", system="Be brief.")
    for question in "123":
        run(session.send(question))
    assert session.undo(2) == 2
    assert contents(session) == ["Be brief.", "1", "a"]
    assert session.undo(5) == 1
    assert session.undo() == 0
    assert contents(session) == ["Be brief."]


def test_clear_keeps_the_system_message() -> None:
    session = session_of(b"a", b"b", system="Be brief.")
    run(session.send("1"))
    session.clear()
    assert session.turns == 0
    run(session.send("2"))
    assert engine_of(session).prompts[1] == [SYSTEM, *b"Be brief.", END, USER, *b"2", END, 257]


def long_session(n_turns: int = 0, *scripts: Sequence[Script]) -> ChatSession:
    session = session_of(
        *[b"answer...."] * n_turns, *(scripts or [[b"answer...."]] * 12), ctx_size=120
    )
    for i in range(n_turns):
        run(session.send(f"question {i}"))
    return session


def test_the_oldest_turns_go_when_the_context_fills() -> None:
    """A turn has 24 tokens, a question 13; a prompt may have 90, and is then cut to 67."""
    session = long_session()
    trimmed, sizes = [], []
    for i in range(12):
        done = run(session.send(f"question{i:2}"))[1]
        trimmed.append(done.trimmed.turns)
        sizes.append(done.prompt_tokens)
    assert trimmed == [0, 0, 0, 0, 2, 0, 2, 0, 2, 0, 2, 0]
    assert max(sizes) <= 90
    assert session.turns == 12


def test_what_was_trimmed_is_said_before_the_reply() -> None:
    first, *_, done = long_session(4).send("question 4")
    assert first == done.trimmed == Trimmed(turns=2, tokens=48)


def test_a_reply_that_is_not_kept_trims_nothing() -> None:
    session = long_session(4, [KeyboardInterrupt()], [b"answer...."])
    for _ in range(2):
        assert run(session.send("question 4"))[1].trimmed.turns == 2


def test_forgotten_turns_that_are_undone_do_not_make_later_ones_forgotten() -> None:
    session = long_session(6)
    session.clear()
    assert run(session.send("question 6"))[1].trimmed == Trimmed(0, 0)
    run(session.send("question 7"))
    assert len(engine_of(session).prompts[-1]) == 24 + 13


def test_the_prompt_can_be_looked_at() -> None:
    session = session_of(b"Hi")
    run(session.send("Hello"))
    assert session.prompt_ids == [*turn("Hello", "Hi"), ASSISTANT]
    assert session.prompt_text == "<user>Hello<end><assistant>Hi<end><assistant>"


def test_the_prompt_that_is_shown_has_no_forgotten_turns() -> None:
    session = long_session(5)
    assert len(session.prompt_ids) == 3 * 24 + 1
