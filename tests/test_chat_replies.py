"""Commands about replies, and the code in them."""

from __future__ import annotations

from typing import cast

import pytest
import scripted

from llamachat.chat.code_blocks import CodeBlock, code_blocks
from llamachat.chat.commands import Answer, Conversation, Copy, Say, interpret
from llamachat.chat.session import ChatSession
from llamachat.errors import UsageError

REPLY = "Two:\n\n```python\nprint(1)\n\nprint(2)\n```\n\n- in a list:\n  ~~~\n  <ls>\n  ~~~\n"


@pytest.fixture
def conversation() -> Conversation:
    speaker = scripted.model()
    return Conversation(ChatSession(speaker, template=scripted.template()), "a scripted model")


def ask(conversation: Conversation, question: str) -> None:
    list(cast("Answer", interpret(question, conversation)).events)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (REPLY, [CodeBlock("python", "print(1)\n\nprint(2)\n"), CodeBlock("", "<ls>\n")]),
        ("```c++ title=x\nint a;", [CodeBlock("c++", "int a;")]),
        ("````\n```\n````", [CodeBlock("", "```\n")]),
        ("`one`\n\n    indented\n", []),
        ("", []),
    ],
)
def test_code_blocks_stand_between_fences(text: str, expected: list[CodeBlock]) -> None:
    assert code_blocks(text) == expected


def test_the_last_reply_is_copied_and_its_code_offered(conversation: Conversation) -> None:
    ask(conversation, "first")
    ask(conversation, REPLY)
    copied = interpret("/copy", conversation)
    assert isinstance(copied, Copy)
    assert copied.text == REPLY
    assert "/copy 1: python, 3 lines\n/copy 2: code, 1 line" in copied.what


def test_a_number_copies_a_block_of_code(conversation: Conversation) -> None:
    ask(conversation, REPLY)
    assert interpret("/copy 2", conversation) == Copy("<ls>\n", "block 2 of 2, code, 1 line")


@pytest.mark.parametrize("number", ["0", "3", "x", "-1"])
def test_a_block_that_is_not_there_is_refused(conversation: Conversation, number: str) -> None:
    ask(conversation, REPLY)
    with pytest.raises(UsageError, match="2 blocks of code"):
        interpret(f"/copy {number}", conversation)


def test_without_a_reply_there_is_nothing_to_copy(conversation: Conversation) -> None:
    with pytest.raises(UsageError, match="no reply"):
        interpret("/copy", conversation)


def test_markdown_can_be_switched_off_and_on(conversation: Conversation) -> None:
    said = [interpret(f"/markdown {word}".strip(), conversation) for word in ("off", "", "on")]
    assert [("as they are" in cast("Say", it).text) for it in said] == [True, True, False]
    assert conversation.markdown
    with pytest.raises(UsageError, match="on or off"):
        interpret("/markdown maybe", conversation)
