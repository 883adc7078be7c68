"""What Tab offers: commands, and what each says that its argument is."""

from __future__ import annotations

from collections.abc import Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from llamachat import settings
from llamachat.chat.commands import COMMANDS, Choices, FileName, ModelName
from llamachat.chat.commands.effects import Argument
from llamachat.library.catalog import CATALOG
from llamachat.library.store import installed

_COMMAND = Choices(COMMANDS, after={n: c.argument for n, c in COMMANDS.items() if c.argument})


class LineCompleter(Completer):
    """Completes the last word of a line that begins with a slash."""

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        """What may follow."""
        line = document.text_before_cursor
        if not line.startswith("/") or "\n" in line:
            return
        argument, typed = _last(_COMMAND, line[1:])
        if isinstance(argument, FileName) and typed.startswith(argument.prefix):
            path = Document(typed.removeprefix(argument.prefix))
            yield from PathCompleter(expanduser=True).get_completions(path, complete_event)
            return
        for word in _words(argument):
            if word.startswith(typed):
                yield Completion(word, start_position=-len(typed))


def _last(argument: Argument | None, typed: str) -> tuple[Argument | None, str]:
    """The argument that the last word belongs to, and that word; a path may have blanks."""
    while isinstance(argument, Choices):
        word, blank, rest = typed.partition(" ")
        if not blank:
            break
        argument = argument if argument.repeats else argument.after.get(word)
        typed = rest.lstrip()
    return argument, typed


def _words(argument: Argument | None) -> list[str]:
    if isinstance(argument, Choices):
        return list(argument.words)
    if not isinstance(argument, ModelName):
        return []
    on_disk = (model.name for model in installed())
    aliases = (*settings.aliases(), *(entry.alias for entry in CATALOG))
    return sorted({*on_disk, *aliases})
