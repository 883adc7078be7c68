"""Commands for files, editors, models and the context, on a scripted model."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_chat_commands import Type, conversation, type_

from llamachat.chat.commands import Answer, Conversation, Edit, Say, Switch, interpret
from llamachat.chat.events import Text
from llamachat.errors import PromptTooLongError, UsageError

__all__ = ["conversation", "type_"]  # fixtures


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: two files, and one in a folder with a space."""
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "b.py").write_text("x = '```'")
    (tmp_path / "my notes").mkdir()
    (tmp_path / "my notes" / "c.txt").write_bytes(b"\xffthird\r\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FENCED = {
    "a.txt": "```a.txt\nfirst\n```",
    "b.py": "````b.py\nx = '```'\n````",
    "c.txt": "```c.txt\n\ufffdthird\n```",
}


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("a.txt", ["a.txt"]),
        ("a.txt b.py", ["a.txt", "b.py"]),
        ("*", ["a.txt", "b.py"]),
        ("'my notes/c.txt'", ["c.txt"]),
        ("**/*.txt", ["a.txt", "c.txt"]),
    ],
)
@pytest.mark.usefixtures("folder")
def test_files_that_are_read_go_before_the_next_message(
    type_: Type, argument: str, names: list[str]
) -> None:
    assert f"{len(names)} file" in type_(f"/read {argument}")
    assert type_("why?") == "\n\n".join([*(FENCED[name] for name in names), "why?"])
    assert type_("and?") == "and?"


@pytest.mark.usefixtures("folder")
def test_files_add_up_until_they_are_sent_or_taken_back(type_: Type) -> None:
    type_("/read a.txt")
    assert "2 files: 45 tokens" in type_("/read b.py")
    type_("/read off")
    assert type_("why?") == "why?"


@pytest.mark.usefixtures("folder")
def test_what_is_not_utf_8_is_said(type_: Type) -> None:
    assert "not all UTF-8" in type_("/read 'my notes/c.txt'")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("argument", ["", "missing", "*.rs", "'my notes'", "'a.txt"])
def test_what_cannot_be_read_is_refused_and_nothing_is_kept(type_: Type, argument: str) -> None:
    with pytest.raises(UsageError):
        type_(f"/read {argument}")
    assert type_("why?") == "why?"


@pytest.mark.parametrize("size", [8192, 10_000_000])
def test_files_that_cannot_fit_are_refused_with_the_numbers(
    type_: Type, folder: Path, size: int
) -> None:
    (folder / "big").write_bytes(b"x" * size)
    with pytest.raises(PromptTooLongError, match=r"8,192"):
        type_("/read big")
    assert type_("why?") == "why?"


def test_files_for_which_turns_must_go_are_announced(type_: Type, folder: Path) -> None:
    type_("x" * 2000)
    (folder / "large").write_bytes(b"x" * 5000)
    assert "the oldest turns will not fit" in type_("/read large")


@pytest.mark.usefixtures("folder")
def test_files_wait_until_their_question_is_answered(
    type_: Type, conversation: Conversation
) -> None:
    type_("/read a.txt")
    with pytest.raises(PromptTooLongError):
        type_("x" * 9000)
    effect = interpret("why?", conversation)
    assert isinstance(effect, Answer)
    next(effect.events)
    effect.events.close()
    assert type_("why?") == f"{FENCED['a.txt']}\n\nwhy?"


def test_edit_asks_the_changed_question_in_place_of_the_last(
    type_: Type, conversation: Conversation
) -> None:
    type_("one")
    type_("two")
    effect = interpret("/edit", conversation)
    assert isinstance(effect, Edit)
    assert effect.text == "two"
    answer = effect.then("three")
    assert isinstance(answer, Answer)
    assert "".join(e.text for e in answer.events if isinstance(e, Text)) == "three"
    assert type_("recall") == "one | three | recall"


def test_edit_reply_changes_what_was_said(type_: Type, conversation: Conversation) -> None:
    type_("one")
    effect = interpret("/edit-reply", conversation)
    assert isinstance(effect, Edit)
    assert effect.text == "one"
    assert isinstance(effect.then("uno"), Say)
    assert conversation.session.messages[-1].content == "uno"
    assert type_("/undo") == "Took back /edit-reply; 1 turn left."


@pytest.mark.parametrize("line", ["/edit", "/edit-reply"])
def test_without_a_turn_there_is_nothing_to_edit(conversation: Conversation, line: str) -> None:
    with pytest.raises(UsageError, match=r"no (question|reply) to edit"):
        interpret(line, conversation)


def test_models_and_adapters_are_switched(conversation: Conversation) -> None:
    assert interpret("/model other", conversation) == Switch("other")
    assert interpret("/model 'my model'", conversation) == Switch("my model")
    assert interpret("/lora a:0.5 b", conversation) == Switch(None, ("a:0.5", "b"))
    conversation.lora = ("a:0.5",)
    assert interpret("/lora off", conversation) == Switch(None, ())
    assert interpret("/lora", conversation) == Say("a:0.5")
    assert interpret("/model", conversation) == Say("a scripted model")


@pytest.mark.parametrize("line", ["/model one two", "/lora off"])
def test_a_switch_to_nothing_is_refused(conversation: Conversation, line: str) -> None:
    with pytest.raises(UsageError):
        interpret(line, conversation)


def test_context_shows_where_the_tokens_went(type_: Type, conversation: Conversation) -> None:
    conversation.session.model.engine.ctx_size = 200  # type: ignore[misc]
    type_("/system Be brief.")
    type_("what\nis it?")
    heading, *rows = type_("/context").splitlines()
    used = len(conversation.session.prompt_ids)
    assert heading == f"{used} of 200 tokens ({used / 200:.0%})"
    table = {row[2:12].strip(): row[12:].split() for row in rows}
    assert list(table) == ["system", "turn 1", "template", "free"]
    assert table["turn 1"] == ["22", "██" + 8 * "·", "11", "+", "11", "what", "is", "it?"]
    assert sum(int(columns[0]) for columns in table.values()) == 200


def test_overflow_is_set_and_shown(type_: Type, conversation: Conversation) -> None:
    type_("/set overflow summarize")
    assert conversation.session.overflow == "summarize"
    assert ["overflow", "summarize", "you"] in map(str.split, type_("/show params").splitlines())
    with pytest.raises(UsageError, match="shrink"):
        type_("/set overflow shrink")
    type_("/set overflow default")
    assert conversation.session.overflow == "trim"


@pytest.mark.parametrize("name", ["edit", "edit-reply", "read", "model", "lora", "context", "undo"])
def test_help_says_more_of_one_command(type_: Type, name: str) -> None:
    first, *more = type_(f"/help {name}").splitlines()
    assert first.startswith(f"/{name}")
    assert more
    assert all(len(line) <= 100 for line in more)
