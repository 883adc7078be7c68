"""What Tab offers: commands, and what each says that its argument is."""

from __future__ import annotations

from collections.abc import Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from llamachat import settings
from llamachat.chat import saved
from llamachat.chat.code_blocks import code_blocks
from llamachat.chat.commands import COMMANDS, Choices, Conversation, FileName, ModelName
from llamachat.chat.commands.effects import Argument, BlockNumber, SessionName
from llamachat.chat.commands.replies import last_reply
from llamachat.library.catalog import CATALOG
from llamachat.library.store import installed

_COMMAND = Choices(COMMANDS, after={n: c.argument for n, c in COMMANDS.items() if c.argument})


class LineCompleter(Completer):
    """Completes the last word of a line that begins with a slash.

    Args:
        conversation: what is talked about, once there is a model.
    """

    def __init__(self, conversation: Conversation | None = None) -> None:
        self._conversation = conversation

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        """What may follow."""
        line = document.text_before_cursor
        if not line.startswith("/") or "\n" in line:
            return
        argument, typed = _last(_COMMAND, line[1:])
        prefix = argument.prefix if isinstance(argument, FileName) else ""
        if isinstance(argument, FileName | SessionName) and typed.startswith(prefix):
            path = Document(typed.removeprefix(prefix))
            yield from PathCompleter(expanduser=True).get_completions(path, complete_event)
        for word in self._words(argument):
            if word.startswith(typed):
                yield Completion(word, start_position=-len(typed))

    def _words(self, argument: Argument | None) -> Iterable[str]:
        if isinstance(argument, Choices):
            return argument.words
        if isinstance(argument, SessionName):
            return saved.names()
        if isinstance(argument, BlockNumber) and self._conversation is not None:
            blocks = code_blocks(last_reply(self._conversation) or "")
            return [str(number) for number, _ in enumerate(blocks, 1)]
        return _models() if isinstance(argument, ModelName) else []


def _last(argument: Argument | None, typed: str) -> tuple[Argument | None, str]:
    """The argument that the last word belongs to, and that word; a path may have blanks."""
    while isinstance(argument, Choices):
        word, blank, rest = typed.partition(" ")
        if not blank:
            break
        argument = argument if argument.repeats else argument.after.get(word)
        typed = rest.lstrip()
    return argument, typed


def _models() -> list[str]:
    on_disk = (model.name for model in installed())
    aliases = (*settings.aliases(), *(entry.alias for entry in CATALOG))
    return sorted({*on_disk, *aliases})
