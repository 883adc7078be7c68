"""Blocks of Markdown as rows of a terminal, without borders, gutters or blanks at their ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from markdown_it import MarkdownIt
from markdown_it.rules_block.table import escapedSplit
from markdown_it.tree import SyntaxTreeNode as Node
from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.style import Style
from rich.table import Table
from rich.text import Text

from llamachat.terminal.markdown_code import highlighted
from llamachat.terminal.output import shown

NARROWEST_COLUMN = 6
GAP = 3  # between columns
RULE = "─" * 20
STYLES = {
    "em": "italic", "strong": "bold", "s": "strike", "code_inline": "bold cyan",
    "link": "underline", "image": "underline",
}  # fmt: skip
APART = ("fence", "code_block", "table")  # from what stands before and after, always
_ENDS_ROW = re.compile(r"[\n\t]")
_LINE_BREAK = re.compile(r"<br ?/?>")
_TASK = re.compile(r"\[([ xX])\] ")


def parser() -> MarkdownIt:
    """CommonMark with tables; what would hide text (HTML, definitions of links) stays text."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    return markdown.disable(["reference", "text_join", "html_block", "html_inline"])


def units(root: Node) -> list[Node]:
    """What is printed as a whole: blocks, and the items of lists."""
    return [
        unit
        for block in root.children
        for unit in (block.children if block.type.endswith("_list") else [block])
    ]


def is_blank(line: str) -> bool:
    """Whether a line parts blocks, in a quotation, too."""
    return not line.strip(" \t>")


class Rows:
    """Draws blocks for one console.

    Args:
        console: whose colours are used.
        links: whether it opens addresses that are not shown; else they stand behind their text.
    """

    def __init__(self, console: Console, *, links: bool) -> None:
        self._console, self._links = console, links
        self._kinds: dict[str, Callable[[Node, Sequence[str], int], list[Text]]] = {
            "paragraph": self._inline_rows,
            "heading": self._inline_rows,
            "list_item": self._item,
            "bullet_list": self._children,
            "ordered_list": self._children,
            "blockquote": self._quote,
            "fence": self._code,
            "code_block": self._code,
            "table": self._table,
            "hr": lambda *_: [Text(RULE, "dim")],
        }

    def block(self, node: Node, lines: Sequence[str], width: int) -> list[Text]:
        """The rows of a block, of which only those of code may be wider than `width`.

        Args:
            node: the block.
            lines: the source that it was parsed from.
            width: in cells.
        """
        return self._kinds[node.type](node, lines, max(1, width))

    def sequence(
        self, nodes: Sequence[Node], lines: Sequence[str], width: int, before: str = ""
    ) -> list[Text]:
        """Blocks below each other, parted as they are in the source.

        Args:
            nodes: the blocks.
            lines: the source that they were parsed from.
            width: in cells.
            before: the type of what stands before the first; nothing if empty.
        """
        rows: list[Text] = []
        for node in nodes:
            if before and (
                is_blank(lines[_first_line(node) - 1] if _first_line(node) else "x")
                or before in APART
                or node.type in APART
            ):
                rows.append(Text())
            rows += self.block(node, lines, width)
            before = node.type
        return rows

    def _children(self, node: Node, lines: Sequence[str], width: int) -> list[Text]:
        return self.sequence(node.children, lines, width)

    def _item(self, node: Node, lines: Sequence[str], width: int) -> list[Text]:
        marker = f"{node.info}{node.markup} " if node.info else "• "
        rows = self.sequence(node.children, lines, width - len(marker)) or [Text()]
        task = _TASK.match(rows[0].plain) if not node.info else None
        if task:
            marker = "☐ " if task[1] == " " else "☑ "
            rows[0] = rows[0][task.end() :]
        return _indented(rows, marker, " " * len(marker))

    def _quote(self, node: Node, lines: Sequence[str], width: int) -> list[Text]:
        return _indented(self._children(node, lines, width - 2), "> ", "> ")

    def _code(self, node: Node, _lines: Sequence[str], _width: int) -> list[Text]:
        return highlighted(node.content.removesuffix("\n").split("\n"), node.info)

    def _inline_rows(self, node: Node, _lines: Sequence[str], width: int) -> list[Text]:
        text = self._inline(node)
        if node.type == "heading":
            text.stylize("bold underline" if node.tag == "h1" else "bold")
        return self._wrapped(text, width)

    def _wrapped(self, text: Text, width: int) -> list[Text]:
        fits = cell_len(text.plain) <= width and not _ENDS_ROW.search(text.plain)
        rows = [text] if fits else list(text.wrap(self._console, width)) or [Text()]
        for row in rows:
            row.rstrip()
        return rows

    def _inline(self, block: Node) -> Text:
        """The text of a paragraph, a heading or a cell."""
        text = Text()
        for inline in block.children:
            self._append(inline, Style(), text)
        return text

    def _append(self, node: Node, style: Style, text: Text) -> None:
        style += Style.parse(STYLES.get(node.type, ""))
        if node.type in ("softbreak", "hardbreak"):
            text.append("\n")
        elif node.type == "text_special":
            # An escaped bracket is mathematics more often than it is a bracket.
            escaped = node.info == "escape" and node.content in "()[]"
            text.append(node.markup if escaped else shown(node.content), style)
        elif node.type in ("link", "image"):
            self._append_link(node, style, text)
        elif node.children:
            for child in node.children:
                self._append(child, style, text)
        else:
            text.append(node.content, style)

    def _append_link(self, node: Node, style: Style, text: Text) -> None:
        address = shown(str(node.attrs.get("href") or node.attrs.get("src") or ""))
        begin = len(text)
        if self._links:
            style += Style(link=address)
        for child in node.children:
            self._append(child, style, text)
        named = text.plain[begin:]
        if not named:
            text.append(address, style)
        elif not self._links and address and named not in (address, address[len("mailto:") :]):
            text.append(f" ({address})")

    def _table(self, node: Node, lines: Sequence[str], width: int) -> list[Text]:
        heading, *body = _table_rows(node)
        source = [line.strip() for line in lines[slice(*(node.map or (0, 0)))]]
        if any(len(_cells(line)) > len(heading) for line in source):
            return self._wrapped(Text("\n".join(source)), width)  # a cell too many would be lost
        cells = [[self._cell(cell) for cell in row] for row in body]
        if width < NARROWEST_COLUMN * len(heading):
            return self._records([self._cell(cell) for cell in heading], cells, width)
        titles = [self._cell(cell) for cell in heading]
        sides: list[JustifyMethod] = [_side(cell) for cell in heading]
        rows = _unfolded(titles, sides, cells, width) or self._folded(titles, sides, cells, width)
        for row in rows:
            row.rstrip()
        return rows

    def _folded(
        self,
        heading: Sequence[Text],
        sides: Sequence[JustifyMethod],
        body: Sequence[Sequence[Text]],
        width: int,
    ) -> list[Text]:
        """A table whose cells are folded to fit."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        for title, side in zip(heading, sides, strict=True):
            table.add_column(title, justify=side, overflow="fold")
        for row in body:
            table.add_row(*row)
        options = self._console.options.update(width=width)
        drawn = self._console.render_lines(table, options, pad=False)
        return [Text.assemble(*((it.text, it.style or "") for it in row)) for row in drawn]

    def _records(
        self, heading: Sequence[Text], body: Sequence[Sequence[Text]], width: int
    ) -> list[Text]:
        """A table that is too wide: the cells of a row below each other."""
        rows = [] if body else self._wrapped(Text("\n").join(heading), width)
        for i, cells in enumerate(body):
            rows += [Text()] if i else []
            for name, cell in zip(heading, cells, strict=False):
                rows += self._wrapped(Text.assemble(name, ": ", cell), width)
        return rows

    def _cell(self, node: Node) -> Text:
        text = self._inline(node)
        return (
            Text("\n").join(_split(text, _LINE_BREAK)) if _LINE_BREAK.search(text.plain) else text
        )


def folded(row: Text, width: int) -> list[Text]:
    """A row in parts that are no wider."""
    plain = row.plain.expandtabs(8)
    if cell_len(plain) <= width:
        return [row]
    row.expand_tabs(8)
    cuts, used = [], 0
    for i, character in enumerate(row.plain):
        used += (cells := cell_len(character))
        if used > width:
            cuts.append(i)
            used = cells
    return list(row.divide(cuts))


def _first_line(node: Node) -> int:
    return node.map[0] if node.map else 0


def _indented(rows: Sequence[Text], first: str, rest: str) -> list[Text]:
    """Rows behind a marker; those that are blank stay so, without the blanks."""
    marked = []
    for i, row in enumerate(rows):
        marked.append(Text.assemble(rest if i else first, row))
        marked[-1].rstrip()
    return marked


def _side(cell: Node) -> JustifyMethod:
    side = str(cell.attrs.get("style", "left")).rpartition(":")[2]
    return "center" if side == "center" else "right" if side == "right" else "left"


def _unfolded(
    heading: Sequence[Text],
    sides: Sequence[JustifyMethod],
    body: Sequence[Sequence[Text]],
    width: int,
) -> list[Text] | None:
    """A table as rich draws it, in a tenth of the time; None if a cell has to be folded."""
    cells = [heading, *body]
    sizes = [[cell_len(cell.plain) for cell in row] for row in cells]
    widths = [max(column) for column in zip(*sizes, strict=True)]
    whole = sum(widths) + GAP * (len(widths) - 1)
    if whole > width or not any(widths) or any("\n" in it.plain for row in cells for it in row):
        return None
    rows = []
    for row, used in zip(cells, sizes, strict=True):
        text = Text()
        for i, cell in enumerate(row):
            free = widths[i] - used[i]
            before = {"left": 0, "center": free // 2, "right": free}[sides[i]]
            text.append(" " * (before + GAP * (i > 0)))
            text.append_text(cell)
            text.append(" " * (free - before))
        rows.append(text)
    rows[0].stylize("bold")
    return [rows[0], Text("─" * whole), *rows[1:]]


def _table_rows(node: Node) -> list[list[Node]]:
    return [list(row.children) for part in node.children for row in part.children]


def _cells(line: str) -> list[str]:
    return escapedSplit(line.removeprefix("|").removesuffix("|"))


def _split(text: Text, separator: re.Pattern[str]) -> Iterator[Text]:
    begin = 0
    for found in separator.finditer(text.plain):
        yield text[begin : found.start()]
        begin = found.end()
    yield text[begin:]
