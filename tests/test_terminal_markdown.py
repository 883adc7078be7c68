"""Replies as Markdown on a terminal: every line once, whatever comes in between."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

if sys.platform == "win32":
    pytest.skip("POSIX pseudo-terminals", allow_module_level=True)

from screens import Screen, screen

from llamachat.chat.events import OpenText, Tails, Text
from llamachat.terminal.markdown import Markdown
from llamachat.terminal.markdown_rows import Rows
from llamachat.terminal.shades import Shading
from llamachat.terminal.stream import ReplyView

REPLY = """\
# Rivers of *Europe*

Three rivers, **bold** and `code` and a [link](https://example.org/).
A second line, 2 \\* 3, \\( x^2 \\).

1. Danube
   - flows east
   - into the sea
2. Rhine

   A paragraph of the Rhine.
10. Volga
- [x] done
- [ ] not done

```python
def flow(river):
    \"\"\"Water.\"\"\"
    return {"Danube": 6_500, "Rhine": 2_900}.get(river, 0)
```
> Quoted words that go on for some time.
> - a point

| river | km | name |
|:--|--:|:-:|
| Danube | 2850 | 多瑙河 |
| Rhine | 1230 | 莱茵河<br>🚢 |

---
Done.
"""
AT_40 = """\
Rivers of Europe

Three rivers, bold and code and a link
(https://example.org/).
A second line, 2 * 3, \\( x^2 \\).

1. Danube
   • flows east
   • into the sea
2. Rhine

   A paragraph of the Rhine.
10. Volga
☑ done
☐ not done

def flow(river):
    \"\"\"Water.\"\"\"
    return {"Danube": 6_500, "Rhine": 2_
900}.get(river, 0)

> Quoted words that go on for some time.
> • a point

river      km    name
──────────────────────
Danube   2850   多瑙河
Rhine    1230   莱茵河
                  🚢

────────────────────
Done.
""".splitlines()


def shown(pieces: Iterable[str], columns: int = 80, lines: int = 24, **variables: str) -> Screen:
    """The terminal after a reply."""
    with (
        screen(columns, lines, **variables) as terminal,
        ReplyView(Shading(), markdown=True) as view,
    ):
        for piece in pieces:
            view.show(Text(piece))
    return terminal


def pieces_of(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 4, 30, 2000])
def test_blocks_are_drawn_for_the_width(size: int) -> None:
    found = shown(pieces_of(REPLY, size), columns=40).scrollback()
    assert [line.replace(" ", "") for line in found] == [line.replace(" ", "") for line in AT_40]


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_the_scrollback_of_a_long_reply_holds_every_line_once(columns: int) -> None:
    paragraphs = "".join(f"Line {n}.\n\n* Item {n}\n* Next {n}\n\n" for n in range(40))
    code = "```\n" + "".join(f"code {n}\n" for n in range(300)) + "```\n"
    found = shown(pieces_of(paragraphs + code, 4), columns).scrollback()
    expected = [f"{what} {n}{end}" for n in range(40) for what, end in
                (("Line", "."), ("• Item", ""), ("• Next", ""))]  # fmt: skip
    assert [line for line in found if line] == expected + [f"code {n}" for n in range(300)]


@pytest.mark.parametrize("size", [3, 11])
def test_a_terminal_resized_meanwhile_holds_every_line_once(size: int) -> None:
    words = [f"word{n:03}" for n in range(400)]
    text = "".join(" ".join(words[n : n + 20]) + "\n\n" for n in range(0, 400, 20))
    with screen(200) as terminal, ReplyView(Shading(), markdown=True) as view:
        for n, piece in enumerate(pieces_of(text, size)):
            view.show(Text(piece))
            if n % 40 == 0:
                terminal.resize(200 + n % 7, 24)  # pyte drops what a narrower one has no room for
        view.__exit__(None, None, None)
        assert " ".join(terminal.scrollback()).split() == words


def test_the_open_block_is_live_on_a_third_of_the_terminal_and_then_whole() -> None:
    with screen(40, 12) as terminal, ReplyView(Shading(), markdown=True) as view:
        view.show(Text("Before.\n\n"))
        view.show(Text("| a |\n|---|\n"))
        for n in range(30):
            view.show(Text(f"| {n} |\n"))
            view.show(Tails(()))  # draws what is not drawn yet
            assert len(terminal.visible()) <= 2 + 4
        view.show(Text("\n"))
        view.__exit__(None, None, None)
        found = terminal.scrollback()
    assert found == ["Before.", "", "a", "──", *map(str, range(30))]


def test_what_is_finished_is_not_written_again() -> None:
    first, second = "First paragraph.\n\n", "second words " * 20
    terminal = shown([first, *pieces_of(second, 4)])
    assert terminal.written.count("First paragraph.") == 1


def test_open_beams_stand_below_the_open_block_until_the_text_goes_on() -> None:
    with screen(40) as terminal, ReplyView(Shading(), markdown=True) as view:
        view.show(Text("# Title\nsome *te"))
        view.show(Tails((OpenText("xt* here", -1.0), OpenText("st*", -2.5))))
        during = terminal.visible()
        view.show(Text("xt* here"))
        view.__exit__(None, None, None)
        after = terminal.visible()
    assert during == ["Title", "some *te", "  -1.000  xt* here", "  -2.500  st*"]
    assert after == ["Title", "some text here"]


def test_a_line_of_code_is_as_long_as_it_is() -> None:
    line = "x = " + "1 + " * 60 + "1"
    written = shown([f"```python\n{line}\n", "y = 2\n```\n"], columns=60).written
    assert line in re.sub(r"\x1b\[[0-9;]*m", "", written)


def test_an_open_line_of_code_is_folded_until_it_is_finished() -> None:
    with screen(20) as terminal, ReplyView(Shading(), markdown=True) as view:
        view.show(Text("```\n" + "0123456789" * 5))
        assert terminal.visible() == ["01234567890123456789"] * 2 + ["0123456789"]


def test_lines_of_a_long_string_keep_its_colour() -> None:
    code = "".join(f"return {n}\n" for n in range(12))
    text = f'```python\nx = """\n{code}"""\nreturn 99\n```\n'
    *within, after = shown(pieces_of(text, 5)).colours("return")
    assert len(within) == 12
    assert len(set(within)) == 1
    assert after not in within


def test_a_line_without_an_end_is_finished_as_far_as_it_is_long() -> None:
    words = [f"w{n}" for n in range(6000)]
    with screen(80) as terminal, ReplyView(Shading(), markdown=True) as view:
        for piece in pieces_of(" ".join(words), 400):
            view.show(Text(piece))
        view.show(Tails(()))  # draws what is not drawn yet
        so_far = terminal.scrollback()
        view.__exit__(None, None, None)
        whole = terminal.scrollback()
    assert so_far[:200] == whole[:200]
    assert " ".join(whole).split() == words
    assert shown([" ".join(words)]).scrollback() == whole


def test_copies_have_no_blanks_at_the_end_of_lines() -> None:
    written = shown(pieces_of(REPLY, 9), columns=60, lines=60).written
    assert not re.search(r"[ \t](\x1b\[[0-9;]*m)*\r\n", written.replace("\x1b[0m", ""))


HOSTILE = "\x1b]0;owned\x07 \x9b31m \r\x08 \u202e &#x202e; &#27;"


@pytest.mark.parametrize(
    "text",
    [
        f"{HOSTILE}\n",
        f"```{HOSTILE}\n{HOSTILE}\n```\n",
        f"| a |\n|---|\n| {HOSTILE} |\n",
        f"[{HOSTILE}](http://x/{HOSTILE.replace(' ', '')})\n",
        f"`{HOSTILE}`",
        f"    {HOSTILE}\n",
        f"<{HOSTILE}>",
    ],
)
def test_only_escapes_of_our_own_reach_the_terminal(text: str) -> None:
    for variables in ({}, {"TERM_PROGRAM": "WezTerm"}):
        written = shown(pieces_of(text, 2), **variables).written
        escapes = r"\x1b\[[0-9;]*[mACJK]|\x1b\[\?(25|7|2026)[hl]|\x1b\]8;[^\x1b\x07]*\x1b\\"
        ours = rf"{escapes}|\r\n|\r(?=\x1b)"
        assert re.sub(ours, "", written).isprintable()


def test_addresses_are_opened_by_a_terminal_that_can() -> None:
    text = "[name](https://example.org/) <https://example.com/>"
    assert shown([text]).scrollback() == ["name (https://example.org/) https://example.com/"]
    linked = shown([text], TERM_PROGRAM="WezTerm").written
    assert re.search(r"\x1b\]8;[^;]*;https://example\.org/\x1b\\\x1b\[4mname", linked)


def test_no_color_leaves_bold_and_italics() -> None:
    written = shown(["**b** *i* `c`\n\n```python\nreturn 1\n```\n"], NO_COLOR="1").written
    parts = {part for sgr in re.findall(r"\x1b\[([0-9;]*)m", written) for part in sgr.split(";")}
    assert {"1", "3"} <= parts <= {"", "0", "1", "2", "3", "4"}


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}])
def test_a_dumb_terminal_gets_the_text_as_it_comes(variables: dict[str, str]) -> None:
    assert shown(["# a\n", "**b**"], **variables).written == "# a\r\n**b**\r\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n- b\n- c", ["a", "• b", "• c"]),
        ("- a\n\n- b\n\n\n\nc", ["• a", "", "• b", "", "c"]),
        ("\n\n\nfirst\n\nlast\n\n\n", ["first", "", "last"]),
        ("Title\n=====\ntext", ["Title", "text"]),
        ("```\nnot closed", ["not closed"]),
        ("a\n```\nb\n```\nc", ["a", "", "b", "", "c"]),
        ("~~~~\n```\n~~~\n~~~~~\nend", ["```", "~~~", "", "end"]),
        ("<b>text</b> &lt; &amp;", ["<b>text</b> < &"]),
        ("[a]: http://x\n\n[a]", ["[a]: http://x", "", "[a]"]),
        ("| a | b |\n|---|---|\n| 1 | 2 | 3 |", ["| a | b |", "|---|---|", "| 1 | 2 | 3 |"]),
        (
            "| a | b |\n|:-:|--:|\n| one | *2* |\n| x | 1234 |",
            [" a       b", "──────────", "one      2", " x    1234"],
        ),
        ("1. a\n   ```sh\n   ls\n   ```\n2. b", ["1. a", "", "   ls", "2. b"]),
        ("one\r\ntwo\r\n", ["one", "two"]),
        ("![alt](http://x/y.png)", ["alt (http://x/y.png)"]),
        ("x_1 * y_2 ~~gone~~", ["x_1 * y_2 gone"]),
        ("", []),
    ],
)
def test_text_becomes_rows(text: str, expected: list[str]) -> None:
    assert shown([text]).scrollback() == expected


def test_a_table_on_a_narrow_terminal_becomes_a_list() -> None:
    table = "| name | length | country | ends in |\n|-|-|-|-|\n| Rhine | 1230 | CH | NL |\n"
    expected = ["name: Rhine", "length: 1230", "country: CH", "ends in: NL"]
    assert shown([table], columns=20).scrollback() == expected


def test_a_long_table_is_finished_with_the_blank_line_after_it() -> None:
    markdown = Markdown(Rows(Console(), links=False))
    assert markdown.write("| n | what |\n|--:|---|\n" + "| 1 | row |\n" * 2000, 80) == []
    assert len(markdown.write("\n", 80)) == 2002


FRAGMENTS = st.sampled_from([
    "word ", "two words", "\n", "\n\n", "- ", "  - ", "1. ", "> ", "```", "```py\n", "~~~\n", "# ",
    "| a | b |\n|---|---|\n", "| 1 | 2 |\n", "**", "*", "`", "[a](b)", "---\n", "===\n", "    ",
    "漢字", "😀", "\t", "\\", "<b>", "def f():\n    return 1\n", "\x1b[2J", "\r\n", "long " * 30,
])  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(FRAGMENTS, max_size=25), st.integers(1, 9), st.sampled_from([20, 40, 80]))
def test_any_pieces_of_a_text_give_the_same_scrollback(
    fragments: list[str], size: int, columns: int
) -> None:
    text = "".join(fragments)
    whole = shown([text], columns).scrollback()
    assert shown(pieces_of(text, size), columns).scrollback() == whole


BLOCKS = st.sampled_from([
    "{} {} {}\n\n", "{}\n{} {}\n\n", "# {} {} {}\n", "- {}\n- {}\n- {}\n\n",
    "1. {}\n   - {} {}\n\n",
    "> {} {}\n> {}\n\n", "```\n{}\n  {}\n\n{}\n```\n", "| {} | {} |\n|---|---|\n| {} | x |\n\n",
    "**{}** *{}* `{}`\n\n", "{}\n\n    {} {}\n\n", "- {}\n\n  {}\n\n  ```py\n  {}\n  ```\n\n",
])  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(BLOCKS, max_size=12), st.sampled_from([40, 80, 200]))
def test_every_word_arrives_once_and_in_order(blocks: list[str], columns: int) -> None:
    names = iter(f"word{n}" for n in range(100))
    text = "".join(block.format(*(next(names) for _ in range(3))) for block in blocks)
    found = " ".join(shown(pieces_of(text, 4), columns).scrollback())
    assert re.findall(r"word\d+", found) == [f"word{n}" for n in range(3 * len(blocks))]


TALKS = """
import sys, time
from llamachat.chat.events import Text
from llamachat.terminal.markdown import Markdown
from llamachat.terminal.markdown_rows import Rows
from llamachat.terminal.shades import Shading
from llamachat.terminal.stream import ReplyView
print(sys.argv[1], end="")
with ReplyView(Shading(), markdown=True) as view:
    for n in range(60):
        for piece in (f"- item{n:02} ", *["and on "] * 12, "to its end.\\n"):
            view.show(Text(piece))
            time.sleep(0.002)
print("over")
"""


HOME = "\033[2J\033[H"  # the reply begins in the first line of the screen


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux, which wraps lines anew")
@pytest.mark.parametrize(
    ("before", "sizes"),
    [  # resized, tmux itself loses its place at the top of an empty screen
        ("before\n" * 30, [(60, 24), (90, 12), (41, 30), (120, 20)]),
        (HOME, [(100, 24)]),
    ],
    ids=["resized", "at home"],
)
def test_tmux_holds_every_line_of_a_reply_once(
    tmp_path: Path, before: str, sizes: list[tuple[int, int]]
) -> None:
    tmux = ("tmux", "-L", f"llamachat{os.getpid()}", "-f", "/dev/null")

    def ask(*command: str) -> str:
        return subprocess.run([*tmux, *command], check=True, capture_output=True, text=True).stdout

    (tmp_path / "talks.py").write_text(TALKS, "utf-8")
    talks = shlex.join([sys.executable, str(tmp_path / "talks.py"), before])
    program = f"{talks}; sleep 60"
    ask("new-session", "-d", "-x", "100", "-y", "24", program)
    try:
        deadline = time.monotonic() + 30
        for columns, lines in cycle(sizes):
            ask("resize-window", "-x", str(columns), "-y", str(lines))
            found = ask("capture-pane", "-p", "-S", "-")
            if "over" in found or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        ask("kill-server")
    expected = [word for n in range(60) for word in (f"item{n:02}", *["on"] * 12, "end.")]
    assert re.findall(r"item\d+|\bon\b|end\.", found) == expected
