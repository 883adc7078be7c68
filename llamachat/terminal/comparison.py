"""Answers of several kinds to one question: in columns, one after the other, or as JSON."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from llamachat import settings
from llamachat.chat.compare import Comparison, Indexed, Parting
from llamachat.chat.events import Done, Prefill, Text, Trimmed
from llamachat.chat.remote import Server
from llamachat.chat.specs import Spec
from llamachat.errors import UsageError
from llamachat.terminal.columns import MARK, NARROWEST, Columns, Footer, column_width
from llamachat.terminal.failure import Notices, one_line
from llamachat.terminal.interrupts import interruptible
from llamachat.terminal.opening import Opened, Run, open_session, reopened
from llamachat.terminal.output import Lines, write
from llamachat.terminal.progress import PrefillProgress
from llamachat.terminal.reply import named, report, write_event, write_failure
from llamachat.terminal.stream import overflow_notice

if TYPE_CHECKING:
    from llamachat.loading import Model

ENDINGS = {
    "length": "cut by its length", "interrupted": "interrupted", "loop": "ended: it repeats itself",
}  # fmt: skip


class Models:
    """The model of a session, and other forms of it, one at a time."""

    def __init__(self, opened: Opened, run: Run) -> None:
        self.now = self._own = opened
        self._run = run

    def use(self, form: str | None) -> Model | Server:
        """The model in this form.

        Raises:
            UsageError: a server runs it, in a form of its own.
        """
        self.now = self._own  # another form is let go before the next one is loaded
        if form is not None and isinstance(self._own.model, Server):
            raise self._own.model.dialect.refusal(f"quantize={form}")
        if not isinstance(self._own.model, Server) and form not in (None, self._own.model.quantize):
            self.now = reopened(self._own, replace(self._run, quantize=str(form)))
        return self.now.model


class View(Protocol):
    """Shows texts that grow, by their place in a group."""

    def write(self, index: int, text: str) -> None:
        """A text goes on."""
        ...

    def mark(self, index: int, span: tuple[int, int]) -> None:
        """Where it parts from the first one."""
        ...

    def end(self, index: int) -> None:
        """A text is whole."""
        ...

    def close(self) -> None:
        """Nothing follows."""
        ...


class InTurn:
    """Texts one below the other: each as it comes, once those before it are whole."""

    def __init__(self, headings: Sequence[str], footer: Footer) -> None:
        self._headings, self._footer = headings, footer
        self._texts = [""] * len(headings)
        self._starts: list[int | None] = [None] * len(headings)  # of the token that is marked
        self._ended = [False] * len(headings)
        self._now, self._written = 0, 0
        self._marks = sys.stdout.isatty()
        self._begin()

    def write(self, index: int, text: str) -> None:
        """A text goes on."""
        self._texts[index] += text
        self._go_on()

    def mark(self, index: int, span: tuple[int, int]) -> None:
        """Where it parts from the first one; only a terminal shows it in the text."""
        self._starts[index] = span[0] if self._marks else None

    def end(self, index: int) -> None:
        """A text is whole."""
        self._ended[index] = True
        while self._now < len(self._texts) and self._ended[self._now]:
            self._go_on()
            self._lines.end(complete=True)
            write("".join(f"-- {line}\n" for line in self._footer(self._now)))
            self._now, self._written = self._now + 1, 0
            if self._now < len(self._texts):
                self._begin()
                self._go_on()

    def close(self) -> None:
        """Nothing follows."""
        for index in range(self._now, len(self._texts)):
            self.end(index)

    def _begin(self) -> None:
        between = "\n" if self._now else ""
        write(f"{between}== {self._headings[self._now]}\n")
        self._lines = Lines()

    def _go_on(self) -> None:
        text, start = self._texts[self._now], self._starts[self._now]
        if start is not None and self._written <= start < len(text):
            self._lines.write(text[self._written : start] + MARK)
            self._written = start
        self._lines.write(text[self._written :])
        self._written = len(text)


def compare(
    question: str, run: Run, specs: Sequence[Spec], *, json: bool, stream: bool | None = None
) -> None:
    """Ask once and write the answers.

    Args:
        question: what is asked.
        run: how.
        specs: the ways to answer.
        json: one object instead of text; with `stream` True, one event a line.
        stream: None is as it comes, unless as one object.

    Raises:
        KeyboardInterrupt: it was interrupted; what there was is written.
        UsageError: text was to come only when it is whole, which columns never do.
    """
    if stream is False and not json:
        raise UsageError("--no-stream is for JSON here", hint="add --json, or leave it out")
    if json and stream:
        comparison = _stream_events(question, run, specs)
    else:
        opened = open_session(run)
        models = Models(opened, run)
        comparison = Comparison(opened.session, specs, question, use=models.use)
        if json:
            _write_json(comparison, models)
        else:
            show(comparison, run.notices)
    ended = comparison.done.values()
    if problem := next((done.problem for done in ended if done.problem), None):
        raise problem
    if len(ended) < len(specs) or any(done.finish_reason == "interrupted" for done in ended):
        raise KeyboardInterrupt


def show(comparison: Comparison, notices: Notices) -> None:
    """Run a comparison and show it: in columns where the terminal has room, else in turn."""
    progress = PrefillProgress(quiet=notices.quiet)
    events = interruptible(comparison.run())
    shown_before = False
    for group, those in groupby(events, lambda item: comparison.group_of(item[0])):
        if shown_before:
            write("\n")
        shown_before = True
        view = _view(comparison, group)
        try:
            _show_group(those, group, view, comparison, progress, notices)
        finally:
            progress.clear()
            view.close()


def figures(comparison: Comparison, index: int) -> list[str]:
    """What is told below a reply."""
    done, parting = comparison.done.get(index), comparison.parting(index)
    if done is None:
        return []
    n = done.completion_tokens
    parts = [f"{n} token{'s' * (n != 1)}"]
    if done.mean_logprob is not None:
        parts.append(f"mean logprob {done.mean_logprob:.3f}")
    if done.timings.decode_s > 0 and n > 1:
        parts.append(f"{(n - 1) / done.timings.decode_s:.1f} tok/s")
    if done.seed is not None:
        parts.append(f"seed {done.seed}")
    if done.finish_reason != "stop":
        parts.append(ENDINGS[done.finish_reason])
    lines = [" · ".join(parts)]
    first = comparison.specs[0].text
    if parting is not None:
        before, here = ("the end" if it is None else repr(it) for it in parting.tokens)
        lines.append(f"parts from {first} at token {parting.index}: {here}, there {before}")
    elif index and comparison.is_whole(index) and comparison.is_whole(0):
        lines.append(f"the same as {first}")
    return lines


def _view(comparison: Comparison, group: Sequence[int]) -> View:
    headings = [comparison.specs[i].text for i in group]

    def footer(place: int) -> list[str]:
        return figures(comparison, group[place])

    if len(group) > 1 and sys.stdout.isatty() and not settings.terminal_is_dumb():
        from rich.console import Console

        console = Console(highlight=False, markup=False, emoji=False)
        if column_width(len(group), console.width) >= NARROWEST:
            return Columns(headings, footer, console)
    return InTurn([one_line(heading) for heading in headings], footer)


def _show_group(
    events: Iterator[Indexed],
    group: Sequence[int],
    view: View,
    comparison: Comparison,
    progress: PrefillProgress,
    notices: Notices,
) -> None:
    unmarked = set(group)
    for i, event in events:
        if isinstance(event, Prefill):
            progress.show(event)
        elif isinstance(event, Trimmed):
            notices(overflow_notice(event))
        for other in sorted(unmarked):
            if (parting := comparison.parting(other)) is not None:
                unmarked.remove(other)
                view.mark(group.index(other), parting.span)
        if isinstance(event, Text):
            view.write(group.index(i), event.text)
        elif isinstance(event, Done):
            view.end(group.index(i))


def _write_json(comparison: Comparison, models: Models) -> None:
    """One object, in the order of the specs; each run as `chat --json` tells it."""
    reports: dict[int, dict[str, Any]] = {}
    for i, event in interruptible(comparison.run()):
        if isinstance(event, Done):
            reports[i] = report(event, models.now)
    runs = [
        {**_said(comparison, i), **told, **_parted(comparison.parting(i))}
        for i, told in sorted(reports.items())
    ]
    write(jsonlib.dumps({"runs": runs}, ensure_ascii=False) + "\n")


def _stream_events(question: str, run: Run, specs: Sequence[Spec]) -> Comparison:
    """One JSON object a line, each with its run's index: prefill, token, parted, done.

    Before them comes start, with the specs; a failure is told last.
    """
    try:
        opened = open_session(run)
        models = Models(opened, run)
        comparison = Comparison(opened.session, specs, question, use=models.use)
        write_event("start", **named(opened.model), specs=[it.text for it in specs])
        together = set(range(1, len(specs)))
        for i, event in interruptible(comparison.run()):
            for other in sorted(together):
                if (parting := comparison.parting(other)) is not None:
                    together.remove(other)
                    write_event("parted", run=other, **_parted(parting))
            if isinstance(event, Prefill):
                write_event("prefill", run=i, **asdict(event))
            elif isinstance(event, Text):
                write_event("token", run=i, text=event.text)
            elif isinstance(event, Done):
                told = report(event, models.now)
                write_event("done", run=i, **_said(comparison, i), **told)
    except Exception as error:
        write_failure(error)
        raise
    return comparison


def _said(comparison: Comparison, index: int) -> dict[str, Any]:
    """What is known of a run beside its report."""
    mean = comparison.done[index].mean_logprob
    return {
        "spec": comparison.specs[index].text,
        "mean_logprob": None if mean is None else round(mean, 6),
    }


def _parted(parting: Parting | None) -> dict[str, Any]:
    """Where a run parts from the first one."""
    return {
        "parts_at": parting and parting.index,
        "parts": parting and list(parting.tokens),
    }
