"""What a typed line means, on a scripted model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import scripted

from llamachat.chat.commands import COMMANDS, Answer, Conversation, Leave, Say, Walk, interpret
from llamachat.chat.events import Done, Text
from llamachat.chat.session import ChatSession
from llamachat.errors import UsageError

Type = Callable[[str], str]


@pytest.fixture
def conversation() -> Conversation:
    speaker = scripted.model()
    return Conversation(ChatSession(speaker, template=scripted.template()), "a scripted model")


@pytest.fixture
def type_(conversation: Conversation) -> Type:
    """Type a line; returns what is said to it, by the program or by the model."""

    def type_(line: str) -> str:
        effect = interpret(line, conversation)
        if isinstance(effect, Say):
            return effect.text
        assert isinstance(effect, Answer)
        events = list(effect.events)
        conversation.last = next(event for event in events if isinstance(event, Done))
        return "".join(event.text for event in events if isinstance(event, Text))

    return type_


@pytest.mark.parametrize(
    ("line", "question"),
    [
        ("hello", "hello"),
        (" /help", " /help"),
        ("//help", "/help"),
        ("///", "//"),
        ('"""\none\ntwo\n"""', "one\ntwo"),
        ('"""/exit"""', "/exit"),
        ('say """this"""', 'say """this"""'),
        ("a/b", "a/b"),
    ],
)
def test_what_is_no_command_is_asked(type_: Type, line: str, question: str) -> None:
    assert type_(line) == question


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("/hlep", "/hlep: no such command", "did you mean /help?"),
        ("/exti now", "/exti", "/exit"),
        ("/zzzz", "/zzzz", "/help lists them"),
        ("/", "no such command", "/help"),
        ("/ help", "no such command", "/help"),
        ("/usr/bin\nis a folder", "/usr/bin: no such", ""),
        ("/help nothing", "/help nothing", ""),
        ('""""""', "nothing to ask", ""),
    ],
)
def test_a_wrong_command_is_refused_and_not_sent(
    conversation: Conversation, line: str, message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as refused:
        interpret(line, conversation)
    assert message in refused.value.message
    assert hint in (refused.value.hint or "")
    assert conversation.session.turns == 0


def test_exit_leaves(conversation: Conversation) -> None:
    assert isinstance(interpret("/exit", conversation), Leave)


def test_help_lists_every_command_and_one_alone(type_: Type) -> None:
    assert [line.split()[0][1:] for line in type_("/help").splitlines()] == list(COMMANDS)
    assert type_("/help undo").startswith("/undo [N]")
    assert type_("/help /undo") == type_("/help undo")


def test_clear_forgets_the_turns_and_keeps_the_system_message(type_: Type) -> None:
    type_("/system Be brief.")
    type_("one")
    type_("/clear")
    assert type_("recall") == "recall"
    assert type_("system") == "Be brief."


def test_undo_takes_back_turns(type_: Type) -> None:
    for question in ("one", "two", "three"):
        type_(question)
    assert type_("/undo 2") == "Took back turn 3, turn 2; 1 turn left."
    assert type_("recall") == "one | recall"
    type_("/undo 99")
    assert type_("/undo") == "Nothing to take back."


@pytest.mark.parametrize("line", ["/undo 0", "/undo -1", "/undo all", "/regen 7", "/regen"])
def test_arguments_that_make_no_sense_are_refused(conversation: Conversation, line: str) -> None:
    with pytest.raises(UsageError):
        interpret(line, conversation)


def test_regen_answers_the_same_question_anew(type_: Type) -> None:
    type_("same")
    type_("same")
    assert type_("/regen") == "same (attempt 1)"
    assert type_("/regen") == "same (attempt 2)"
    assert type_("/regen seed 7") == "same"
    assert type_("recall") == "same | same | recall"


def test_the_system_message_is_set_shown_and_read_from_a_file(type_: Type, tmp_path: Path) -> None:
    assert type_("/system") == "(no system message)"
    type_("/system Be brief.\nBe kind.")
    assert type_("/system") == type_("/show system") == type_("system") == "Be brief.\nBe kind."
    (tmp_path / "rules").write_text("From a file.\n")
    type_(f"/system @{tmp_path / 'rules'}")
    assert type_("system") == "From a file."
    with pytest.raises(UsageError, match="missing"):
        type_(f"/system @{tmp_path / 'missing'}")


def test_set_changes_options_for_the_next_reply(type_: Type, conversation: Conversation) -> None:
    type_("/set temperature 0.3")
    type_("/set top-p 0.8")
    type_("/set seed 11")
    type_("/set max_new_tokens 3")
    assert type_("hello") == "hel"
    assert conversation.last is not None
    assert conversation.last.seed == 11
    strategy = conversation.last.strategy
    assert (strategy["temperature"], strategy["top_p"]) == (0.3, 0.8)
    type_("/set max_new_tokens default")
    assert type_("hello") == "hello"


@pytest.mark.parametrize(
    "line",
    ["/set", "/set temperature", "/set temprature 1", "/set temperature hot", "/set top_k 1.5",
     "/set samplers top_k;psychic", "/set logit_bias 5", "/set logit_bias 999=1",
     "/set bad_words ;", "/set no_repeat_ngram_size 1.5", "/set repetition_penalty 0",
     "/set temperature -1", "/set top_p 2", "/set max_new_tokens 0", "/set strategy psychic"],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_and_changes_nothing(
    type_: Type, conversation: Conversation, line: str
) -> None:
    before = type_("/show params")
    with pytest.raises(UsageError):
        interpret(line, conversation)
    assert type_("/show params") == before


def test_a_strategy_that_contradicts_what_was_set_is_refused(type_: Type) -> None:
    type_("/set temperature 0.5")
    with pytest.raises(UsageError, match=r"greedy.*temperature"):
        type_("/set strategy greedy")


def test_show_tells_the_origin_of_every_value(type_: Type) -> None:
    type_("/set top_k 5")
    rows = {line.split()[0]: line.split()[1:] for line in type_("/show params").splitlines()}
    assert rows["temperature"] == ["0.5", "generation_config.json"]
    assert rows["top_k"] == ["5", "you"]
    assert rows["top_p"] == ["0.9", "built", "in"]


def test_settings_are_shown_as_they_are_set(type_: Type) -> None:
    settings = {
        "samplers": "top_k;temperature", "bad_words": "damn;hell", "logit_bias": "5=1.5;6=-100",
        "repetition_penalty": "1.2",
    }  # fmt: skip
    for name, value in settings.items():
        type_(f"/set {name} {value}")
    rows = {line.split()[0]: line.split()[1:] for line in type_("/show params").splitlines()}
    for name, value in settings.items():
        assert rows[name] == [value, "you"]
    assert rows["top_p"] == ["1", "samplers"]
    type_("/set samplers default")
    assert "\nsamplers              hf              built in\n" in type_("/show params")


def test_show_shows_the_prompt_as_text_and_ids(type_: Type) -> None:
    type_("hello")
    prompt = type_("/show prompt")
    assert prompt.startswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello")
    ids = [int(word) for word in type_("/show ids").split()]
    assert ids[:6] == [scripted.START, *b"user\n"]
    assert f"{len(ids)} of 8,192 tokens" in type_("/show context")


def test_show_knows_the_model_its_template_and_how_fast_it_was(type_: Type) -> None:
    assert type_("/show model") == "a scripted model"
    assert type_("/show template") == scripted.CHATML
    assert type_("/show stats") == "No reply yet."
    type_("hello")
    assert "5 tokens" in type_("/show stats")


def test_show_refuses_what_it_does_not_know_with_the_nearest_name(type_: Type) -> None:
    with pytest.raises(UsageError) as refused:
        type_("/show parms")
    assert refused.value.hint == "did you mean params?"


def test_continue_goes_on_with_the_last_reply(type_: Type, conversation: Conversation) -> None:
    conversation.session.max_new_tokens = 3
    type_("hello")
    assert type_("/continue") == "lo"
    assert conversation.session.messages[-1].content == "hello"


def test_continue_needs_a_reply(type_: Type) -> None:
    with pytest.raises(UsageError, match="no reply"):
        type_("/continue")


def test_seed_is_the_seed_of_what_follows(type_: Type, conversation: Conversation) -> None:
    type_("/seed 11")
    type_("hello")
    assert conversation.last is not None
    assert conversation.last.seed == 11
    with pytest.raises(UsageError, match="hot"):
        type_("/seed hot")


def test_stop_adds_a_text_that_ends_a_reply_and_off_takes_all_back(type_: Type) -> None:
    assert type_("/stop") == "stop = none"
    type_("/stop two")
    assert type_(r'/stop "\n"') == r'stop = "two" "\n"'
    assert type_("one two") == "one "
    assert type_('"""one\nthree"""') == "one"
    type_("/stop off")
    assert type_("one two") == "one two"


@pytest.mark.parametrize("name", ["speculate", "stop_loops"])
def test_drafts_and_loops_are_set_for_the_session(
    type_: Type, conversation: Conversation, name: str
) -> None:
    type_(f"/set {name} 4")
    assert getattr(conversation.session, name) == 4
    assert any(line.split() == [name, "4", "you"] for line in type_("/show params").splitlines())
    type_(f"/set {name} default")
    assert getattr(conversation.session, name) == 0
    with pytest.raises(UsageError, match="0 or more"):
        type_(f"/set {name} -1")


def test_drafts_and_beams_refuse_each_other(type_: Type, conversation: Conversation) -> None:
    type_("/strategy beam:4")
    with pytest.raises(UsageError, match=r"--speculate.*--num-beams"):
        type_("/set speculate 4")
    assert conversation.session.speculate == 0
    type_("/strategy greedy")
    type_("/set speculate 4")
    with pytest.raises(UsageError, match=r"--speculate.*--num-beams"):
        type_("/strategy beam:4")
    assert type_("/strategy") == "greedy"


def test_statistics_tell_the_attempt_and_what_came_of_drafts(
    type_: Type, conversation: Conversation
) -> None:
    type_("/set speculate 4")
    type_("hello")
    type_("/regen")
    assert ", attempt 1" in type_("/show stats")
    assert "2 of 3 drafted tokens accepted" in type_("/show stats")


def test_probs_asks_for_probabilities_and_show_lists_them(
    type_: Type, conversation: Conversation
) -> None:
    type_("/probs 2")
    assert conversation.session.logprobs == 2
    type_("a0")
    heading, a, zero = type_("/show probs").splitlines()
    assert heading.split() == ["token", "model", "filtered"]
    assert a.split() == ["1", "50.0", "%", "100.0", "%", "'a'", "or", "id", "257", "50.0", "%"]
    assert zero.split() == ["2", "1.0", "%", "100.0", "%", "'0'", "or", "'1'", "99.0", "%"]
    walked = interpret("/probs", conversation)
    assert isinstance(walked, Walk)
    assert walked.spoken is conversation.session.spoken
    type_("/probs off")
    assert conversation.session.logprobs == 0


@pytest.mark.parametrize("argument", ["0", "21", "-1", "1.5", "on", "5 5"])
def test_probs_refuses_a_number_out_of_range(type_: Type, argument: str) -> None:
    with pytest.raises(UsageError, match="expected 1 to 20, or off"):
        type_(f"/probs {argument}")


@pytest.mark.parametrize("line", ["/probs", "/show probs"])
def test_without_probabilities_there_is_nothing_to_walk_over(type_: Type, line: str) -> None:
    type_("hello")
    with pytest.raises(UsageError, match="no reply with probabilities"):
        type_(line)


@pytest.mark.parametrize(
    "lines", [("/probs 2", "/strategy beam:4"), ("/strategy beam:4", "/probs 2")]
)
def test_beams_have_no_probabilities(type_: Type, lines: tuple[str, str]) -> None:
    type_(lines[0])
    with pytest.raises(UsageError, match=r"/probs.*beams"):
        type_(lines[1])
    assert type_("hello") == "hello"


def test_a_value_of_a_flag_or_the_file_is_yours_once_you_set_it(
    type_: Type, conversation: Conversation
) -> None:
    session = conversation.session
    said = {"max_new_tokens": "flag", "top_k": "config.toml"}
    session.max_new_tokens = 5
    session.options = replace(session.options.saying(top_k=3), origins=said)

    def origins() -> dict[str, str]:
        rows = [line.split() for line in type_("/show params").splitlines()]
        return {row[0]: row[-1] for row in rows if row[0] in said}

    assert origins() == said
    type_("/set max_new_tokens 9")
    assert origins() == {**said, "max_new_tokens": "you"}
    type_("/set top_k 4")
    assert origins() == dict.fromkeys(said, "you")
