"""What quantizing did to each weight: a table, and a plot beside the model."""

from __future__ import annotations

import math
from pathlib import Path, PureWindowsPath

from llamachat.checkpoints.quantized import QuantizedCheckpoint
from llamachat.checkpoints.quantized_layout import StoredWeight
from llamachat.errors import TransferError
from llamachat.terminal.errors_plot import plot
from llamachat.terminal.output import write
from llamachat.terminal.tables import write_columns

PLOT = "report.svg"
MB = 1e6


def show_report(folder: Path) -> None:
    """Size, bits, and the error of each weight, the largest first; the plot into the folder.

    Raises:
        DamagedFileError: the folder is damaged.
        TransferError: the plot cannot be written.
    """
    checkpoint = QuantizedCheckpoint(folder)
    facts, errors = checkpoint.facts, checkpoint.facts.errors
    name = PureWindowsPath(facts.source["name"]).name  # which knows both separators
    write_columns([
        ("source", f"{facts.source['name']} ({facts.source['form']})"),
        ("recipe", str(facts.recipe["key"])),
        ("size", f"{checkpoint.size_bytes / MB:,.1f} MB"),
        ("of the source", f"{checkpoint.share_of_source:.0%}"),
        ("bits per weight", f"{checkpoint.bits_per_weight:.3f}"),
        ("folder", str(folder)),
        ("plot", str(folder / PLOT)),
    ])  # fmt: skip
    write("\n")

    def worst_first(weight: StoredWeight) -> tuple[bool, bool, float]:
        error = errors.get(weight.name)
        return error is None, not math.isnan(error or 0), -(error or 0)

    heading = ("weight", "shape", "bits", "MB", "error")
    rows = [
        (it.name, " x ".join(map(str, it.shape)), f"{it.bits_per_value:.2f}",
         f"{it.n_bytes / MB:.2f}", f"{errors[it.name]:.2%}" if it.name in errors else "none")
        for it in sorted(checkpoint.weights, key=worst_first)
    ]  # fmt: skip
    write_columns([heading, *rows])
    try:
        (folder / PLOT).write_text(plot(f"{name}, {facts.recipe['key']}", errors), encoding="utf-8")
    except OSError as error:
        raise TransferError(f"{folder / PLOT}: {error.strerror or error}") from error
