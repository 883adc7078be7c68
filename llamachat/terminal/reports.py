"""What was measured, row by row as it comes: a table for people, or JSON or CSV for programs."""

from __future__ import annotations

import csv
import io
import json as jsonlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PureWindowsPath  # which knows both separators
from typing import Any

from llamachat.errors import UsageError
from llamachat.terminal.output import write
from llamachat.terminal.progress import Status

Row = Mapping[str, Any]
Columns = tuple[tuple[str, int, str, Callable[[Row], str]], ...]
GIB = 2**30


def _reading(row: Row) -> str:
    rate = row["gb_per_s"]
    return "" if rate is None else f"{rate:.1f} of {row['bandwidth_gb_per_s']:.1f}"


def _share(row: Row) -> str:
    share = row["bandwidth_share"]
    return "" if share is None else f"{share:.0%}"


# Heading, width, alignment, and the cell of a row.
_COLUMNS: Columns = (
    ("model", 24, "<", lambda row: PureWindowsPath(row["model"]).name),
    ("quantize", 8, "<", lambda row: str(row["quantize"])),
    ("backend", 9, "<", lambda row: str(row["backend"])),
    ("threads", 7, ">", lambda row: str(row["threads"])),
    ("test", 11, ">", lambda row: str(row["test"])),
    ("tok/s", 16, ">", lambda row: f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}"),
    ("GB/s read", 14, ">", _reading),
    ("share", 5, ">", _share),
    ("first token", 11, ">", lambda row: f"{row['ttft_s']:.3f} s"),
    ("load", 7, ">", lambda row: f"{row['load_s']:.2f} s"),
    ("peak", 9, ">", lambda row: f"{row['peak_bytes'] / GIB:.2f} GiB"),
)

# Of a server the rest is not known.
_SERVED_COLUMNS: Columns = (
    ("model", 24, "<", lambda row: str(row["model"])),
    ("server", 16, "<", lambda row: str(row["server"])),
    ("test", 11, ">", lambda row: str(row["test"])),
    ("prompt", 7, ">", lambda row: str(row["prompt_tokens"])),
    ("tok/s", 16, ">", lambda row: f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}"),
    ("first token", 11, ">", lambda row: f"{row['ttft_s']:.3f} s"),
)


def form_of(asked: str | None, *, json: bool) -> str:
    """The form of a report: what `--output` says, or `--json`; default "md".

    Raises:
        UsageError: there is no such form, or the two disagree.
    """
    if asked is not None and asked not in _WRITERS:
        raise UsageError(f"--output is {asked!r}, expected one of {', '.join(_WRITERS)}")
    if json and asked not in (None, "json"):
        raise UsageError(f"--json and --output {asked} are two forms")
    return "json" if json else asked or "md"


def show_rows(rows: Iterable[Row], form: str, status: Status) -> None:
    """Write rows as they come. If the rest fails or is interrupted, these are still whole."""
    try:
        _WRITERS[form](_under(status, rows))
    finally:
        status.clear()


def _under(status: Status, rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        status.clear()
        yield row


def _write_table(rows: Iterable[Row]) -> None:
    last = None
    try:
        for row in rows:
            columns = _SERVED_COLUMNS if "endpoint" in row else _COLUMNS
            if last is None:
                rules = ("-" * (width - 1) + "-:"[align == ">"] for _, width, align, _ in columns)
                _write_line((heading for heading, *_ in columns), columns)
                _write_line(rules, columns)
            _write_line((cell(row) for *_, cell in columns), columns)
            last = row
    finally:
        if last is not None:
            where = last["endpoint"] if "endpoint" in last else last["gpu"] or last["cpu"]
            write(f"\nllamachat {last['version']}, {where}\n")


def _write_line(cells: Iterable[str], shape: Columns) -> None:
    columns = zip(cells, shape, strict=True)
    padded = (f"{cell:{align}{width}}" for cell, (_, width, align, _) in columns)
    write(f"| {' | '.join(padded)} |\n")


def _write_json(rows: Iterable[Row]) -> None:
    done: list[Row] = []
    try:
        for row in rows:
            done.append(row)
    finally:
        if done:
            write(jsonlib.dumps(done, ensure_ascii=False, indent=2) + "\n")


def _write_json_lines(rows: Iterable[Row]) -> None:
    for row in rows:
        write(jsonlib.dumps(row, ensure_ascii=False) + "\n")


def _write_csv(rows: Iterable[Row]) -> None:
    headed = False
    for row in rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        if not headed:
            writer.writeheader()
        headed = True
        samples = " ".join(map(str, row["samples_ts"]))
        writer.writerow({**row, "samples_ts": samples})
        write(text.getvalue())


_WRITERS = {"md": _write_table, "json": _write_json, "jsonl": _write_json_lines, "csv": _write_csv}
