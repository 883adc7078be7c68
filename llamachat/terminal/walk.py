"""A walk over the tokens of a reply: what else could have been said, and to say that instead."""

from __future__ import annotations

import sys
from collections.abc import Callable

from prompt_toolkit.application import Application
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout import FormattedTextControl, HSplit, Layout, Window
from prompt_toolkit.layout.dimension import Dimension
from rich.cells import set_cell_size

from llamachat import settings
from llamachat.chat.events import Probability
from llamachat.chat.spoken import Spoken, alternatives, percent, spelled
from llamachat.terminal.output import shown
from llamachat.terminal.shades import probability_of, shade_of
from llamachat.tokenizer import Tokenizer

KEYS = "←→ token · ↑↓ 1-9 choice · Enter takes it · Esc leaves"
TEXT_LINES, TOKEN_COLUMNS, NUMBER_COLUMNS = 8, 32, 26
ESCAPE_S = 0.05  # to tell Esc from the keys that begin with it
CURSOR = ("[SetCursorPosition]", "")

Choice = tuple[int, int]  # which token of the reply, and the id to say instead


def can_walk() -> bool:
    """Whether this is a terminal that can redraw what it shows."""
    return sys.stdin.isatty() and sys.stdout.isatty() and not settings.terminal_is_dumb()


def walk(spoken: Spoken, tokenizer: Tokenizer) -> Choice | None:
    """Let the user walk, and take another choice; None: the reply stays as it is."""
    return _application(Walker(spoken, tokenizer)).run()


class Walker:
    """Where the user stands: a token of the reply, and one of its alternatives.

    Attributes:
        index: of the token.
        row: of the alternative.
    """

    def __init__(self, spoken: Spoken, tokenizer: Tokenizer) -> None:
        self._spoken, self._tokenizer = spoken, tokenizer
        self._pieces = [shown(piece.text) for piece in spoken.pieces(tokenizer)]
        known = (probability_of(token.probabilities) for token in spoken.tokens)
        self._styles = [shade_of(probability).style for probability in known]
        self.go_to(0)

    def go_to(self, index: int) -> None:
        """Stand on a token, and on the choice that was made there."""
        self.index = max(0, min(index, len(self._pieces) - 1))
        made = [one.id for one in self._offered]
        chosen = self._spoken.tokens[self.index].id
        self.row = made.index(chosen) if chosen in made else 0

    def select(self, row: int) -> None:
        """Stand on an alternative."""
        self.row = max(0, min(row, len(self._offered) - 1))

    def choice(self, row: int) -> Choice | None:
        """What is said instead; None where there is no such row, or it was chosen already."""
        if row >= len(self._offered):
            return None
        token = self._offered[row].id
        return None if token == self._spoken.tokens[self.index].id else (self.index, token)

    def text(self) -> StyleAndTextTuples:
        """The reply, the token marked."""
        parts: StyleAndTextTuples = list(zip(self._styles, self._pieces, strict=True))
        here = self._pieces[self.index].replace("\n", "↵\n") or "·"
        marked = ("reverse", here)
        return [*parts[: self.index], CURSOR, marked, *parts[self.index + 1 :]]

    def table(self, columns: int) -> StyleAndTextTuples:
        """The alternatives with their probabilities, in lines of at most so many columns."""
        width = max(4, min(TOKEN_COLUMNS, columns - NUMBER_COLUMNS))
        where = set_cell_size(f"token {self.index + 1} of {len(self._pieces)}", width + 5)
        lines: StyleAndTextTuples = [("bold", f"{where}    model  filtered")]
        for row, one in enumerate(self._offered):
            is_here = row == self.row
            lines += [("", "\n"), *([CURSOR] if is_here else [])]
            lines.append(("reverse" if is_here else "", self._line(row, one, width)))
        return lines if self._offered else [*lines, ("", "\nwas said without probabilities")]

    @property
    def _offered(self) -> tuple[Probability, ...]:
        return alternatives(self._spoken.tokens[self.index].probabilities)

    def _line(self, row: int, one: Probability, width: int) -> str:
        """A star for the choice that was made, a number, and the token."""
        star = "*" if one.id == self._spoken.tokens[self.index].id else " "
        token = set_cell_size(shown(spelled(one.id, self._tokenizer)), width)
        shares = f"{percent(one.logprob)}   {percent(one.filtered_logprob)}"
        return f"{star}{row + 1:2}  {token}  {shares}"


def _application(walker: Walker) -> Application[Choice | None]:
    def table() -> StyleAndTextTuples:
        return walker.table(application.output.get_size().columns)

    application: Application[Choice | None] = Application(
        layout=Layout(
            HSplit(
                [
                    _window(walker.text, Dimension(max=TEXT_LINES), wrap_lines=True),
                    Window(height=1),
                    _window(table, Dimension(min=3)),
                    Window(height=1),
                    _window(lambda: [("", KEYS)], Dimension.exact(1)),
                ]
            )
        ),
        key_bindings=_keys(walker),
        erase_when_done=True,
    )
    application.ttimeoutlen = ESCAPE_S
    return application


def _window(
    text: Callable[[], StyleAndTextTuples], height: Dimension, *, wrap_lines: bool = False
) -> Window:
    control = FormattedTextControl(text, show_cursor=False)
    return Window(control, height=height, wrap_lines=wrap_lines, dont_extend_height=True)


def _keys(walker: Walker) -> KeyBindings:
    keys = KeyBindings()
    moves: dict[str, Callable[[], None]] = {
        "left": lambda: walker.go_to(walker.index - 1),
        "right": lambda: walker.go_to(walker.index + 1),
        "home": lambda: walker.go_to(0),
        "end": lambda: walker.go_to(sys.maxsize),
        "up": lambda: walker.select(walker.row - 1),
        "down": lambda: walker.select(walker.row + 1),
    }
    for key, move in moves.items():
        keys.add(key)(lambda event, move=move: move())

    @keys.add("enter")
    def _take(event: KeyPressEvent) -> None:
        event.app.exit(result=walker.choice(walker.row))

    for number in range(1, 10):

        @keys.add(str(number))
        def _take_number(event: KeyPressEvent, row: int = number - 1) -> None:
            if (choice := walker.choice(row)) is not None:
                event.app.exit(result=choice)

    @keys.add("escape", eager=True)
    @keys.add("q")
    @keys.add("c-c")
    @keys.add("c-d")
    @keys.add("<sigint>")
    def _leave(event: KeyPressEvent) -> None:
        event.app.exit()

    return keys
