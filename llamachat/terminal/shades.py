"""How a token looks by its probability, with colours and without."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llamachat import settings
from llamachat.chat.events import Probabilities, Text
from llamachat.terminal.failure import say

_WORDS = re.compile(r"\S(?:.*\S)?")  # of each line what can be seen


@dataclass(frozen=True, slots=True)
class Shade:
    """A look: its name, its SGR parameters, its style in prompt_toolkit, and from where it holds.

    Plain has neither parameters nor a style.
    """

    name: str
    sgr: str
    style: str
    least: float


COLOURS = (
    Shade("plain", "", "", 0.5),
    Shade("cyan", "36", "fg:ansicyan", 0.2),
    Shade("yellow", "33", "fg:ansiyellow", 0.05),
    Shade("red", "4;31", "fg:ansired underline", 0.0),
)
COLOURLESS = (
    Shade("plain", "", "", 0.2),
    Shade("underlined", "4", "underline", 0.05),
    Shade("bold", "1;4", "bold underline", 0.0),
)


def shades() -> tuple[Shade, ...]:
    """Those of this terminal, the likeliest first."""
    return COLOURLESS if settings.forbids_colors() else COLOURS


def shade_of(probability: float) -> Shade:
    """The look of a token."""
    return next(shade for shade in shades() if probability >= shade.least)


def probability_of(known: Probabilities | None) -> float:
    """What the model itself gave the choice; 1 where that is not known."""
    return 1.0 if known is None else math.exp(known.chosen.logprob)


def legend() -> str:
    """One line that says what the looks mean."""
    *above, last = shades()
    parts = [f"{shade.name} {shade.least:.0%}+" for shade in above]
    return f"probability: {', '.join(parts)}, {last.name} below"


def shaded(text: str, shade: Shade) -> str:
    """Text as a terminal shows it; spaces and line ends stay as they are."""
    if not shade.sgr:
        return text
    return _WORDS.sub(lambda found: f"\033[{shade.sgr}m{found[0]}\033[0m", text)


class Shading:
    """The looks of replies as they come; nothing where escapes are not known."""

    def __init__(self) -> None:
        self._is_on = sys.stdout.isatty() and not settings.terminal_is_dumb()
        self._is_explained = False
        self._least = 1.0  # of the tokens whose text was held back

    def begin(self) -> None:
        """A reply begins."""
        self._least = 1.0

    def look(self, event: Text) -> Callable[[str], str]:
        """That of its text, by the least probable of the tokens that made it.

        What it means is said once, before the first.
        """
        if not self._is_on:
            return str
        if event.probabilities is not None and not self._is_explained:
            self._is_explained = True
            say(f"[{legend()}]")
        self._least = min(self._least, probability_of(event.probabilities))
        shade = shade_of(self._least)
        if event.text:
            self._least = 1.0
        return partial(shaded, shade=shade)
