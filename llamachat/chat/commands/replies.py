"""Commands about what replies look like, and what is taken from them."""

from __future__ import annotations

from llamachat.chat.code_blocks import CodeBlock, code_blocks
from llamachat.chat.commands.effects import (
    BlockNumber,
    Choices,
    Command,
    Conversation,
    Copy,
    Effect,
    Say,
)
from llamachat.errors import UsageError


def _markdown(conversation: Conversation, argument: str) -> Effect:
    if argument not in ("", "on", "off"):
        raise UsageError(f"/markdown {argument}: expected on or off")
    if argument:
        conversation.markdown = argument == "on"
    how = "rendered as Markdown" if conversation.markdown else "shown as they are written"
    return Say(f"Replies are {how}.")


def _copy(conversation: Conversation, argument: str) -> Effect:
    reply = last_reply(conversation)
    if reply is None:
        raise UsageError("there is no reply to copy")
    blocks = code_blocks(reply)
    if not argument:
        listed = [f"/copy {n}: {_told(block)}" for n, block in enumerate(blocks, 1)]
        return Copy(reply, "\n".join([f"the last reply, {len(reply):,} characters", *listed]))
    if not (argument.isdecimal() and 1 <= int(argument) <= len(blocks)):
        have = f"{len(blocks)} block{'s' * (len(blocks) != 1)} of code"
        raise UsageError(f"/copy {argument}: the last reply has {have}")
    block = blocks[int(argument) - 1]
    return Copy(block.code, f"block {argument} of {len(blocks)}, {_told(block)}")


def last_reply(conversation: Conversation) -> str | None:
    """The text of the last reply, if there is one."""
    messages = reversed(conversation.session.messages)
    return next((it.content for it in messages if it.role == "assistant"), None)


def _told(block: CodeBlock) -> str:
    lines = len(block.code.splitlines())
    return f"{block.language or 'code'}, {lines} line{'s' * (lines != 1)}"


COMMANDS: dict[str, Command] = {
    "copy": Command(
        "/copy [N]", "the last reply, or its Nth code block, to the clipboard", _copy, BlockNumber()
    ),
    "markdown": Command(
        "/markdown on|off",
        "render replies, or show them as written",
        _markdown,
        Choices(("on", "off")),
    ),
}
