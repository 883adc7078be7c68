"""The code in a reply."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """What stands between two fences, and the language that the first one names, if any."""

    language: str
    code: str


def code_blocks(text: str) -> list[CodeBlock]:
    """The fenced blocks of a Markdown text, those in lists and quotations, too.

    The last one may lack its end. Nothing of them is escaped.
    """
    from markdown_it import MarkdownIt  # not before there is a reply

    fences = (it for it in MarkdownIt("commonmark").parse(text) if it.type == "fence")
    return [CodeBlock("".join(it.info.split()[:1]), it.content) for it in fences]
