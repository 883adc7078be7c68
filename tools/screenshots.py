"""Pictures of the main views, as a terminal shows them: docs/images/*.svg.

    llamachat pull smollm2-135m; python tools/screenshots.py

The program runs on a pseudo-terminal; what its screen shows becomes an SVG. The rendered reply is
spoken by the scripted model of the tests, the rest by the default model. Speeds are left out, so
that the same program draws the same pictures.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

from llamachat import settings

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT / "tests"))
from programs import LLAMACHAT, environment  # noqa: E402  # found there

READY = "\x1b[?2004h"  # a line is asked for
SPEED = re.compile(r"[\d.,]+ tok/s")
REPLY = """\
## Two ways to sort

Python's `sorted` is *stable* and takes **O(n log n)** comparisons:

```python
def by_length(words: list[str]) -> list[str]:
    \"\"\"Shortest first; ties stay as they were.\"\"\"
    return sorted(words, key=len)  # Timsort
```

| method | worst case | stable |
|---|---:|:-:|
| Timsort | n log n | yes |
| Quicksort | n² | no |

1. Measure first
   - on *your* data
2. Then choose
"""
SPEAKS = """
import sys
sys.path.insert(0, {tests!r})
import scripted
from llamachat.terminal import opening
scripted.reply_to = lambda turns: {reply!r}
opening.open_session = scripted.open_session
scripted.main()
"""


def main() -> None:
    """Write every picture."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    speaks = SPEAKS.format(tests=str(ROOT / "tests"), reply=REPLY)
    scripted = (sys.executable, "-c", speaks, "chat", "-q")
    question = "How do I sort words in Python?"
    save("reply", "llamachat chat", talk(scripted, question, columns=72, lines=26))
    probabilities = (*LLAMACHAT, "chat", "-q", "--logprobs", "3", "--seed", "1", "-n", "60")
    shown = talk(probabilities, "Why is the sky blue?", columns=72, lines=10)
    save("probs", "llamachat chat --logprobs 3", shown)
    flags = ("--with", "greedy", "--with", "top-p:0.9,seed=7", "-n", "40", "-q")
    compared = talk((*LLAMACHAT, "compare", "Name three rivers.", *flags), columns=90, lines=14)
    save("compare", "llamachat compare", compared)


def talk(command: tuple[str, ...], question: str = "", *, columns: int, lines: int) -> list[Text]:
    """The lines of the screen after a question, or when the program has ended."""
    screen = pyte.Screen(columns, lines)
    stream = pyte.Stream(screen)
    with tempfile.TemporaryDirectory() as home:
        cache = str(settings.cache_dir()[0])  # where the model is
        variables = environment(Path(home), PROMPT_TOOLKIT_NO_CPR="1", LLAMACHAT_CACHE_DIR=cache)
        child = pexpect.spawn(
            command[0], list(command[1:]), env=variables, dimensions=(lines, columns),
            encoding="utf-8", timeout=120,
        )  # fmt: skip
        for keys in ["", f"{question}\r"] if question else []:
            child.send(keys)
            child.expect_exact(READY)
            stream.feed(child.before + child.after)
        if not question:
            child.expect(pexpect.EOF)
            stream.feed(SPEED.sub("", child.before))
        child.close(force=True)
    rows = [row_of(screen, n) for n in range(lines)]
    while rows and not rows[-1].plain.strip():
        rows.pop()
    return rows


def row_of(screen: pyte.Screen, n: int) -> Text:
    """A line of a screen, with its colours."""
    cells = [screen.buffer[n][column] for column in range(screen.columns)]
    row = Text()
    for style, run in groupby(cells, style_of):
        row.append("".join(cell.data for cell in run), style)
    row.rstrip()
    return row


def style_of(cell: pyte.screens.Char) -> Style:
    """How a character looks."""
    return Style(
        color=cell.fg.replace("bright", "bright_").replace("brown", "yellow"),
        bold=cell.bold,
        italic=cell.italics,
        underline=cell.underscore,
    )


def save(name: str, title: str, rows: list[Text]) -> None:
    """Write a picture."""
    console = Console(
        file=io.StringIO(), record=True, width=max(row.cell_len for row in rows) + 1,
        force_terminal=True, color_system="truecolor",
    )  # fmt: skip
    for row in rows:
        console.print(row, soft_wrap=True)
    svg = console.export_svg(title=title, unique_id=name)
    (IMAGES / f"{name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
