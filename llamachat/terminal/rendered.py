"""A reply as Markdown, while it comes: finished blocks above, the open one live below them."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from llamachat import settings
from llamachat.chat.events import Tails
from llamachat.terminal.live import LiveRows
from llamachat.terminal.markdown import Markdown
from llamachat.terminal.markdown_rows import Rows
from llamachat.terminal.tails import tail_line

REDRAW_S = 0.03
SHARE = 0.1  # of the time that drawing may take


class Rendered:
    """Renders text on a terminal that knows escapes; open continuations show below it."""

    def __init__(self) -> None:
        console = Console(highlight=False, markup=False, emoji=False)
        self._markdown = Markdown(Rows(console, links=settings.terminal_opens_links()))
        self._live = LiveRows(console)
        self._finished: list[Text] = []  # not drawn
        self._due = 0.0

    def write(self, text: str, *, look: Callable[[str], str] = str) -> None:
        """The text goes on; how it would look unrendered has no meaning here."""
        self._finished += self._markdown.write(text, self._live.size().columns)
        if time.monotonic() >= self._due:
            self._draw()

    def show(self, tails: Tails) -> None:
        """Show these continuations until the text goes on."""
        self._draw(tails)

    def end(self) -> None:
        """Nothing follows."""
        rest = self._markdown.finish(self._live.size().columns)
        try:
            self._live.draw([*self._finished, *rest], [])
        finally:
            self._live.close()

    def _draw(self, tails: Tails | None = None) -> None:
        began = time.monotonic()
        columns, lines = self._live.size()
        below = [
            Text(tail_line(tail, columns - 1), "dim") for tail in (tails.tails if tails else ())
        ]
        self._live.draw(self._finished, self._markdown.open_rows(columns), below[: lines // 3])
        self._finished = []
        now = time.monotonic()
        self._due = now + max(REDRAW_S, (now - began) / SHARE)
